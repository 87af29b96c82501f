"""The error model of VLCache (arXiv:2512.12977), measured: what goes wrong at which token and layer when KV is reused.

cd examples && python -m grid_model.errors grid_model/model --json errors.json --plot errors.png

The paper says e_total(k) = e_self(k) + sum over i < k of e_prop(i, k): a token carries its own error and what earlier
ones hand on, so the earliest matter most. Tokens are taken in blocks of 16, a row of the picture.

- self: how far the entry's KV of a block is from the exact one, when all before it is exact.
- handed on: what reusing one block alone does to tokens that are computed behind it, and to the answers.
- saved: by how much the answers' divergence falls when everything is reused but this one block.
- sum rule: whether what blocks do to the answers one by one adds up to what they do together.
- common: how much of a picture's deviation is one vector for all its tokens, or one for all tokens of a colour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from grid_model.cases import KINDS, Case, cases
from grid_model.errors_plot import plot
from grid_model.reuse import SPAN, Answers, GridModel, answer, arranged, compute, load, reuse
from grid_model.tally import header
from grid_model.words import SHAPES
from vlcache_connector.types import Run

BLOCK = 16
BLOCKS = [Run(start, start + BLOCK) for start in range(0, SPAN, BLOCK)]


@dataclass(frozen=True)
class Errors:
    """Of one case. KV deviations are relative to the norm of the exact KV, keys and values apart."""

    own: np.ndarray  # [pictures, layers, 2, blocks]
    handed_on: np.ndarray  # [pictures, layers, 2, blocks]: sums over the image tokens behind, for each reused token
    answers: np.ndarray  # [pictures, blocks]: KL (nats) when this block alone is reused
    reused: float  # KL when everything is reused
    all_but: np.ndarray  # [pictures, blocks]: KL when everything is reused but this block
    common: np.ndarray  # [pictures, layers, 2]: share of the squared deviation that is the same for all tokens
    by_colour: np.ndarray  # [pictures, layers, 2]: and for all tokens of a colour
    residual: float  # |together - sum of one by one| / |together|, of logits, nothing recomputed in between
    handed_residual: float  # the same when tokens behind a block that is reused alone are recomputed


def measure(model: GridModel, case: Case) -> Errors:
    deviation = arranged(case.prompt, case.entries, case.exact) - case.exact
    alone = [[_alone(model, case, picture, block) for block in BLOCKS] for picture in range(len(case.entries))]
    held = [kv for kvs in alone for kv, _ in kvs]
    computed = [kv for kvs in alone for _, kv in kvs]
    say = _answers(model, case)
    total = say(arranged(case.prompt, case.entries, case.exact)).logits - case.expected.logits
    naive = say(reuse(model, case.prompt, case.entries, [()] * len(case.entries)))
    return Errors(
        np.stack([_own(case, deviation, span) for span in case.prompt.spans]),
        np.stack([_handed_on(case, kvs, span) for kvs, span in zip(alone, case.prompt.spans, strict=True)]),
        np.array([[_kl(case, say(kv)) for _, kv in kvs] for kvs in alone]),
        _kl(case, naive),
        np.array([[_kl(case, say(kv)) for kv in _all_but_one(model, case, p)] for p in range(len(case.entries))]),
        _shares(case, deviation, np.zeros_like),
        _shares(case, deviation, colours),
        _residual(total, [say(kv).logits - case.expected.logits for kv in held]),
        _residual(total, [say(kv).logits - case.expected.logits for kv in computed]),
    )


def common_share(deviation: Tensor, kind: Tensor) -> Tensor:
    """How much of the squared deviation [layers, 2, tokens, heads, dim] is that of the mean of each kind of tokens:
    sum n |mean|^2 / sum |each|^2, [layers, 2], 0 where nothing deviates.
    """
    each, member = deviation.flatten(3), functional.one_hot(kind).float()
    whole = each.square().sum((2, 3))
    of_means = (member.T @ each).square().sum(-1) / member.sum(0).clamp_min(1)
    return of_means.sum(-1) / whole.clamp_min(1e-12)


def colours(picture: np.ndarray) -> np.ndarray:
    """Of cell contents: 0 for empty cells, else from 1 on."""
    return -(-picture // len(SHAPES))


def _shares(case: Case, deviation: Tensor, kind: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[pictures, layers, 2]; a cell is 2 x 2 tokens."""
    kinds = [torch.from_numpy(kind(p).repeat(2, 0).repeat(2, 1)).flatten() for p in case.scene.pictures]
    pairs = zip(case.prompt.spans, kinds, strict=True)
    return torch.stack([common_share(deviation[:, :, span], kind) for span, kind in pairs]).numpy()


def _answers(model: GridModel, case: Case) -> Callable[[Tensor], Answers]:
    return lambda kv: answer(model, case.prompt, kv, case.questions)


def _kl(case: Case, given: Answers) -> float:
    return float(case.expected.divergence(given).mean())


def _alone(model: GridModel, case: Case, picture: int, block: Run) -> tuple[Tensor, Tensor]:
    """The KV when only this block is reused: everything else exact; and everything behind it computed over it."""
    held, tokens = case.exact.clone(), case.prompt.spans[picture][block.start : block.end]
    held[:, :, tokens] = case.entries[picture][:, :, block.start : block.end]
    computed = held.clone()
    compute(model, case.prompt, computed, torch.arange(int(tokens[-1]) + 1, len(case.prompt.x)))
    return held, computed


def _all_but_one(model: GridModel, case: Case, picture: int) -> Iterator[Tensor]:
    """The KV when everything is reused but one block of a picture."""
    for block in BLOCKS:
        chosen: list[Sequence[Run]] = [[block] if p == picture else [] for p in range(len(case.entries))]
        yield reuse(model, case.prompt, case.entries, chosen)


def _own(case: Case, deviation: Tensor, span: Tensor) -> np.ndarray:
    """[layers, 2, blocks]."""
    relative = _relative(deviation[:, :, span], case.exact[:, :, span])
    blocks: np.ndarray = relative.unflatten(-1, (-1, BLOCK)).mean(-1).numpy()
    return blocks


def _handed_on(case: Case, alone: list[tuple[Tensor, Tensor]], span: Tensor) -> np.ndarray:
    """[layers, 2, blocks]; 0 for the last block of the last picture, which no image token follows."""
    found = []
    for (_, computed), block in zip(alone, BLOCKS, strict=True):
        behind = case.prompt.spans.flatten()
        behind = behind[behind > span[block.end - 1]]
        relative = _relative((computed - case.exact)[:, :, behind], case.exact[:, :, behind])
        found.append(relative.sum(-1) / BLOCK)
    return torch.stack(found, -1).numpy()


def _relative(deviation: Tensor, exact: Tensor) -> Tensor:
    """[layers, 2, tokens]."""
    relative: Tensor = deviation.flatten(3).norm(dim=-1) / exact.flatten(3).norm(dim=-1)
    return relative


def _residual(together: Tensor, one_by_one: list[Tensor]) -> float:
    return float((together - torch.stack(one_by_one).sum(0)).norm() / together.norm())


def summary(found: Sequence[Errors]) -> dict[str, Any]:
    """Means over cases and pictures."""
    by_block = {
        "self": np.mean([e.own.mean(0) for e in found], 0),
        "handed_on": np.mean([e.handed_on.mean(0) for e in found], 0),
        "answers_kl": np.mean([e.answers.mean(0) for e in found], 0),
        "saved_kl": np.mean([e.reused - e.all_but.mean(0) for e in found], 0),
        "common": np.mean([e.common.mean(0) for e in found], 0),
        "by_colour": np.mean([e.by_colour.mean(0) for e in found], 0),
    }
    reused = float(np.mean([e.reused for e in found]))
    residuals = {name: float(np.median([getattr(e, name) for e in found])) for name in ("residual", "handed_residual")}
    return {name: value.tolist() for name, value in by_block.items()} | {"reused_kl": reused} | residuals


def lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Self errors, what is handed on and its effect, by quarters of the picture; the common share by layer."""
    quarters = [f"quarter {i}" for i in range(1, 5)]
    for title, key, digits in (
        ("self error of keys and values, mean of layers 2 and on", "self", 3),
        (
            "handed on to later image tokens' KV in total, for each token of one block that is reused alone",
            "handed_on",
            3,
        ),
        ("KL of the answers when one block alone is reused", "answers_kl", 4),
        ("KL that recomputing one block saves when all else is reused", "saved_kl", 4),
    ):
        yield f"\n{title}:\n"
        yield from header(["prompt", "first block", *quarters])
        for kind, result in results.items():
            values = np.array(result[key])
            values = values if values.ndim == 1 else values[1:].mean((0, 1))
            shown = [values[0], *values.reshape(4, -1).mean(1)]
            yield f"| {kind} | " + " | ".join(f"{value:.{digits}f}" for value in shown) + " |"
    for key, tokens in (("common", "its tokens"), ("by_colour", "its tokens of a colour")):
        yield f"\nshare of a picture's deviation that is common to {tokens} (keys / values):\n"
        yield from header(["prompt", *[f"layer {i}" for i in range(2, len(values_of(results)) + 1)]])
        for kind, result in results.items():
            yield f"| {kind} | " + " | ".join(f"{k:.2f} / {v:.2f}" for k, v in result[key][1:]) + " |"
    yield "\nsum rule, |together - sum| / |together| of the answers' logits (median of scenes):\n"
    yield from header(["prompt", "KL when all is reused", "others held", "tokens behind recomputed"])
    for kind, result in results.items():
        numbers = [result[name] for name in ("reused_kl", "residual", "handed_residual")]
        yield f"| {kind} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"


def values_of(results: dict[str, dict[str, Any]]) -> list[Any]:
    """The rows by layer of any kind."""
    layers: list[Any] = next(iter(results.values()))["common"]
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=8, help="of each kind")
    parser.add_argument("--questions", type=int, default=32, help="about each scene")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, results = load(options.checkpoint), {}
    for kind in KINDS:
        found = [measure(model, case) for case in cases(model, kind, options.scenes, options.questions)]
        results[kind] = summary(found)
        print(f"{kind}: {options.scenes} scenes", flush=True)
    print(*lines(results), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
