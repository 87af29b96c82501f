"""Can a tenant find out by timing whether another tenant has shown a picture?

    make bench-tenants      (or: python tests/bench/bench_tenants.py [--quick] [--trials N])

One engine with the connector, in this process. In each trial two new pictures of one size are drawn and the victim
shows one of them, the "seen" one. Then both are asked about, in random order, under other words than the victim's:

    attacker    under a cache salt of its own
    victim      under the salt that has shown the picture, which must see the hit: otherwise the trial proves nothing

For an attacker that can tell them apart, the chance that the seen picture takes longer to the first token (AUC) is far
from one half, and the difference of medians from zero. Both are given with their intervals. The verdict, which must
allow for chance, is a signed-rank test within the trials: its p is at least 0.01 for the attacker, and less for the
victim.

vLLM's own cache of encoder outputs knows no tenants: while a picture is in there, everybody skips the encoder, with or
without this connector. It is emptied between the requests; a third row shows what it tells when it is not, under mode
"off", where this connector takes no part. Preprocessed images, which vLLM shares as well, are not part of these times.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.engine import PLACEHOLDER, Engine, VariantError
from bench.intervals import auc, difference_of_medians, signed_rank_p
from bench.photos import PIXELS_PER_TOKEN_SIDE
from bench.results import OUT, circumstances, say, shown, table, warn_when_busy, write_json

MODEL: dict[str, Any] = {"hidden": 512, "layers": 8, "vision_hidden": 256, "vision_depth": 4, "max_pixels": 6_500_000}
ENGINE: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 4,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
    "hf_overrides": {"vision_config": {"fullatt_block_indexes": [3]}},
}
SIDE = 24  # of a picture, in tokens
MIN_P = 0.01


@dataclass
class Probes:
    """Times to first token of one way to ask, by trial."""

    seen: list[float] = field(default_factory=list)
    unseen: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "seen_ms": 1e3 * statistics.median(self.seen),
            "unseen_ms": 1e3 * statistics.median(self.unseen),
            "difference_ms": asdict(
                difference_of_medians([1e3 * t for t in self.seen], [1e3 * t for t in self.unseen])
            ),
            "auc": asdict(auc(self.seen, self.unseen)),
            "p": signed_rank_p(self.seen, self.unseen),
        }


def picture(dice: random.Random) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(dice.getrandbits(64)).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    size = (SIDE * PIXELS_PER_TOKEN_SIDE, SIDE * PIXELS_PER_TOKEN_SIDE)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


class Trials:
    """Pictures and salts that nothing else uses."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dice = random.Random(0)
        self._number = 0

    def run(self, salt: str, mode: str = "reuse", empties_encoder_cache: bool = True) -> tuple[float, float]:
        """Times to first token under `salt` of a picture that the victim has seen, and of one that nobody has."""
        self._number += 1
        seen, unseen = picture(self._dice), picture(self._dice)
        self._ask(seen, f"The victim's words, {self._number}. ", "victim", mode)
        times = {}
        probes = [("seen", seen), ("unseen", unseen)]
        self._dice.shuffle(probes)
        for name, image in probes:
            if empties_encoder_cache:
                self._engine.forget_encoder_outputs()
            found = self._ask(image, f"Other words in front, {self._number}, of a probe. ", salt, mode)
            is_hit = found.accounting["reused_tokens"] > 0
            if is_hit != (name == "seen" and salt == "victim" and mode == "reuse"):
                raise VariantError(f"the {name} picture under salt {salt!r}: {found.accounting}")
            times[name] = found.engine_s
        return times["seen"], times["unseen"]

    def _ask(self, image: Any, opening: str, salt: str, mode: str) -> Any:
        text = f"<|im_start|>user\n{opening}{PLACEHOLDER}What is it?<|im_end|>\n<|im_start|>assistant\n"
        return self._engine.ask(text, [image], {"mode": mode}, salt)


ROWS: dict[str, dict[str, Any]] = {
    "attacker": {"salt": "attacker"},
    "victim": {"salt": "victim"},
    "attacker, vLLM's encoder cache": {"salt": "attacker", "mode": "off", "empties_encoder_cache": False},
}


def measure(engine: Engine, num_trials: int) -> dict[str, Probes]:
    """The rows take turns, so that a slow moment of the machine hits all of them."""
    trials = Trials(engine)
    for options in ROWS.values():
        trials.run(**options)  # warms up
    found = {name: Probes() for name in ROWS}
    for number in range(num_trials):
        for name, options in ROWS.items():
            seen, unseen = trials.run(**options)
            found[name].seen.append(seen)
            found[name].unseen.append(unseen)
        if (number + 1) % 10 == 0:
            say(f"  {number + 1} of {num_trials} trials")
    return found


def print_results(found: dict[str, Probes]) -> bool:
    """Whether the attacker learns nothing and the victim's own hits are plain to see."""
    rows = []
    for name, probes in found.items():
        summary = probes.summary()
        cells = [f"{summary['seen_ms']:.1f}", f"{summary['unseen_ms']:.1f}"]
        cells += [_interval(summary["difference_ms"]), _interval(summary["auc"]), f"{summary['p']:.3f}"]
        rows.append([name, *cells])
    print("\nTime to first token, engine side, medians [ms]; 95 % intervals by bootstrap")
    print(table(["who asks", "seen", "unseen", "seen - unseen", "AUC (0.5: no telling)", "p"], rows))
    attacker, victim = found["attacker"].summary(), found["victim"].summary()
    is_blind: bool = attacker["p"] >= MIN_P
    sees: bool = victim["auc"]["high"] < 0.1 and victim["p"] < MIN_P
    print(f"\nThe attacker cannot tell: {'kept' if is_blind else 'NOT KEPT'}; the victim sees its hit: ", end="")
    print("yes\n" if sees else "NO, so nothing was proved\n")
    return is_blind and sees


def _interval(one: dict[str, float]) -> str:
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description="Try to learn by timing what another tenant has shown.")
    parser.add_argument("--quick", action="store_true", help="10 trials")
    parser.add_argument("--trials", type=int, help="default 60")
    options = parser.parse_args()
    trials: int = options.trials or (10 if options.quick else 60)
    facts = circumstances() | {"trials": trials, "model": MODEL, "engine": ENGINE}
    warn_when_busy()
    engine = Engine.start(MODEL, **ENGINE)
    facts["threads"] = engine.num_threads
    try:
        found = measure(engine, trials)
    except VariantError as error:
        print(f"FAILED: {error}")
        return 1
    is_kept = print_results(found)
    rows: Sequence[dict[str, Any]] = [{"who": name} | p.summary() | asdict(p) for name, p in found.items()]
    write_json(OUT / "bench_tenants.json", {"circumstances": facts, "is_kept": is_kept, "rows": rows})
    say(f"results: {shown(OUT / 'bench_tenants.json')}")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
