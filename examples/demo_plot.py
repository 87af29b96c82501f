"""The demo's plots: times to the first token, how far answers are from plain vLLM's, and answers that are words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from demo_answers import Answered
from demo_checks import NOISE_FACTOR, Comparison
from grid_model.chat import pictures_of
from grid_model.words import COLUMNS, ROWS

from bench.results import gap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.26
LEAST = 1e-3  # smaller differences are drawn at the left edge
COLOURS = {"plain": "#8a8f98", "exact": "#4c9f70", "reuse": "#2f6db5", "complete": "#c98a2b"}


def plot(comparisons: list[Comparison], noise: float, path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    known = [c for c in comparisons if c.reuse]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 7.5), sharey=True, width_ratios=(3, 2))
    rows = np.arange(len(known))
    left.set_yticks(rows, [f"{c.question.title}\n{c.plain.num_prompt_tokens} tokens" for c in known])
    left.invert_yaxis()
    _times(left, known, rows)
    _differences(right, known, rows, noise)
    figure.suptitle("Photographs that were seen before, in new prompts: random Qwen2.5-VL (768 x 10), real server, CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _times(axes: Axes, known: list[Comparison], rows: np.ndarray) -> None:
    series = {
        "plain": ("plain vLLM: encoder and prefill", [c.plain.ttft_s for c in known]),
        "exact": ("plain vLLM, exact prefix hit", [c.exact_s for c in known]),
        "reuse": ("reuse, 5 % recomputed", [c.reuse_s for c in known]),
    }
    for number, (name, (label, seconds)) in enumerate(series.items()):
        axes.barh(rows + (number - 1) * BAR, seconds, BAR, label=label, color=COLOURS[name])
    for row, c in zip(rows, known, strict=True):
        axes.text(
            c.reuse_s, row + BAR, f"  {c.plain.ttft_s / c.reuse_s:.1f}x sooner than plain", va="center", fontsize=9
        )
    axes.set_xlabel("seconds to the first token (HTTP client)")
    axes.set_title("Time to the first token", pad=72)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)


def _differences(axes: Axes, known: list[Comparison], rows: np.ndarray, noise: float) -> None:
    reuse = [max(LEAST, gap(c.plain.logprobs, c.reuse[0].logprobs)) for c in known]
    complete = [max(LEAST, gap(c.plain.logprobs, c.complete.logprobs)) for c in known if c.complete is not None]
    axes.axvspan(LEAST, NOISE_FACTOR * noise, color="#e8e8e8", label=f"within {NOISE_FACTOR:g} x noise")
    axes.plot(complete, rows, "o", clip_on=False, color=COLOURS["complete"], label="all recomputed (ratio 1.0)")
    axes.plot(reuse, rows, "s", color=COLOURS["reuse"], label="5 % recomputed (a trained model differs less)")
    axes.set_xscale("log")
    axes.set_xlim(left=LEAST)
    axes.set_xlabel("largest logprob difference of the likeliest first tokens\n(20 of them; left edge: none)")
    axes.set_title("Distance to plain vLLM's answer", pad=72)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)


def plot_answers(answered: list[Answered], path: Path) -> None:
    """The pictures, and below them every question with the truth and both answers."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 5.5 + 0.22 * len(answered)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4.5, 1 + 0.22 * len(answered)))
    shown = dict(p for a in answered for p in zip(a.case.pictures, pictures_of(a.case.scene), strict=True))
    for axes, (name, picture) in zip(above.subplots(1, len(shown)), sorted(shown.items()), strict=True):
        axes.imshow(picture)
        axes.set_title(f"[{name}]")
        centres = 32 * np.arange(8) + 15.5
        axes.set_xticks(centres, COLUMNS)
        axes.set_yticks(centres, ROWS)
    _answers(below.subplots(), answered)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _answers(axes: Axes, answered: list[Answered]) -> None:
    axes.axis("off")
    rows = [[a.case.prompt(), a.case.truth, a.plain, a.reuse] for a in answered]
    header = ["prompt", "truth", "plain vLLM", "reuse, 5 % recomputed"]
    cells = axes.table(rows, colLabels=header, colWidths=(0.58, 0.12, 0.12, 0.18), cellLoc="left", loc="upper center")
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    for row, a in enumerate(answered, 1):
        for column, text in ((2, a.plain), (3, a.reuse)):
            cells[row, column].set_facecolor("#dff0e2" if text == a.case.truth else "#f6d5d2")
