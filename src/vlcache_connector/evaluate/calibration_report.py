"""What `vlcache calibrate` tells people, and what it writes into the profile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlcache_connector.evaluate.calibration import Calibration
from vlcache_connector.policy import profile
from vlcache_connector.policy.layered import Layered
from vlcache_connector.policy.shifted import Shifted

TITLES = ("LAYERS", "KL, REUSED FROM HERE ON", "SHARE FOUND")
NUMBERS = frozenset(TITLES[1:])


def write(path: Path, model: str, calibration: Calibration) -> None:
    """The profile. Raises `OSError`."""
    profile.write(path, profile.Profile(model, calibration.shares), _measured(calibration))


def table(calibration: Calibration) -> Iterator[list[str]]:
    """Cells under `TITLES`: a row for each group of layers, and one for uniform shares."""
    *cuts, uniform = calibration.sensitivity
    for group, kl in zip(calibration.groups, cuts, strict=True):
        yield [_name(group), f"{kl:.2g}", f"{calibration.result.shares[group.start]:.2f}"]
    yield ["none", f"{uniform:.2g}", ""]


def lines(calibration: Calibration, path: Path) -> Iterator[str]:
    """What came out, and what to do with it."""
    uniform, found, gain = calibration.uniform, calibration.found, calibration.gain
    yield (
        f"KL (first token, nats) at {100 * calibration.ratio:g} % of the tokens: uniform {uniform.kl:.2g}, found "
        f"{found.kl:.2g} (difference {-gain.mean:+.1g} +- {gain.error:.1g}); on average over layers and questions "
        f"{uniform.recomputed_tokens:.1f} and {found.recomputed_tokens:.1f} tokens were recomputed"
    )
    if calibration.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(calibration.left_out.items()))
        yield f"questions that reuse nothing were left out, by reason: {reasons}"
    if gain.is_sure:
        yield "the shares were chosen by these same questions: see with `vlcache eval` and others what they are worth"
    else:
        yield (
            f"uniform shares are not worse for sure, so the profile has these, with which {Layered.name!r} is "
            f"{Shifted.name!r}; more questions may tell them apart"
        )
    use = json.dumps({"policy": Layered.name, "profile": str(path.absolute())})
    yield f"{path} is written; to use it, give the connector {use}"


def _measured(calibration: Calibration) -> dict[str, Any]:
    found, uniform = calibration.found, calibration.uniform
    cuts = zip([*map(_name, calibration.groups), None], calibration.sensitivity, strict=True)
    return {
        "ratio": calibration.ratio,
        "questions": calibration.num_questions,
        "left_out": dict(calibration.left_out),
        "uniform": {"kl": uniform.kl, "recomputed_tokens": uniform.recomputed_tokens},
        "found": {
            "shares": list(calibration.result.shares),
            "kl": found.kl,
            "recomputed_tokens": found.recomputed_tokens,
        },
        "sensitivity": [{"reused_from_layers": name, "kl": kl} for name, kl in cuts],
        "steps": [
            {"quanta": list(step.quanta), "ratio": step.ratio, "kl": step.kl} for step in calibration.result.steps
        ],
    }


def _name(group: range) -> str:
    return f"{group.start}" if len(group) == 1 else f"{group.start}-{group.stop - 1}"
