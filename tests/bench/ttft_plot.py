"""The plot of `bench_ttft`: times of its variants, and the two kinds of ratios with their ranges."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from bench.ttft_report import EXACT, FLOOR, FULL, LATER, PERCENTS, SOONER, TARGETS, Ratio, Results, reuse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# variant -> colour; the others are thin lines, see `_floor`
COLOURS = {
    FULL: "#8a8f98",
    EXACT: "#4c9f70",
    reuse(0): "#b9d5ef",
    reuse(2): "#7fb2e5",
    reuse(5): "#2f6db5",
    reuse(10): "#173f70",
}


def plot(results: Results, path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 5.5))
    _times(axes[0], results)
    _ratios(axes[1], results, SOONER)
    axes[1].set_title("How much sooner than full\n(median, lowest and highest; dotted: target)")
    _ratios(axes[2], results, LATER)
    _floor(axes[2], results)
    axes[2].set_title("How much later than an exact hit\n(thin: the engine alone, for as many tokens)")
    for one in axes:
        one.set_xlim(-0.5, len(results) - 0.5)
        one.set_xticks(range(len(results)), [case.title.replace(", ", "\n") for case in results])
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False)
    figure.suptitle("Time to the first token (engine side), random Qwen2.5-VL; image tokens per prompt")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _times(axes: Axes, results: Results) -> None:
    width = 0.8 / len(COLOURS)
    for number, (name, colour) in enumerate(COLOURS.items()):
        medians = [statistics.median(repeat[name].engine_s for repeat in repeats) for repeats in results.values()]
        places = np.arange(len(results)) + (number - (len(COLOURS) - 1) / 2) * width
        axes.bar(places, medians, width, label=name, color=colour)
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.set_yticks([at for at in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if lowest <= at <= highest])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("seconds (median)")
    axes.set_title("Time to the first token")


def _ratios(axes: Axes, results: Results, ratios: Mapping[int, Ratio]) -> None:
    for percent, ratio in ratios.items():
        spreads = [ratio.spread(repeats) for repeats in results.values()]
        medians = [one.median for one in spreads]
        ranges = [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
        colour = COLOURS[reuse(percent)]
        places = _places(results, percent)
        axes.errorbar(places, medians, ranges, fmt="o", capsize=4, color=colour, label=str(ratio))
        for target in (target for target in TARGETS if target.ratio == ratio):
            reached = [i for i, case in enumerate(results) if case.num_image_tokens >= target.min_image_tokens]
            if reached:
                axes.hlines(target.limit, reached[0] - 0.4, reached[-1] + 0.4, colors=colour, linestyles=":")
    axes.set_ylim(bottom=0)


def _floor(axes: Axes, results: Results) -> None:
    for percent, ratio in FLOOR.items():
        medians = [ratio.spread(repeats).median for repeats in results.values()]
        places = _places(results, percent)
        axes.hlines(medians, places - 0.12, places + 0.12, colors=COLOURS[reuse(percent)], linewidths=1)


def _places(results: Results, percent: int) -> NDArray[np.floating]:
    """Where the ratios of a reuse stand, beside those of the others."""
    return np.arange(len(results)) + 0.18 * (PERCENTS.index(percent) - (len(PERCENTS) - 1) / 2)
