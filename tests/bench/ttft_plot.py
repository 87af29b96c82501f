"""The plot of `bench_ttft`: times of the four variants, and the two kinds of ratios with their ranges."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from bench.ttft_report import RATIOS, TARGETS, Results, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"full": "#8a8f98", "exact hit": "#4c9f70", "reuse 5 %": "#2f6db5", "reuse 2 %": "#7fb2e5"}


def plot(results: Results, path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5.5))
    _times(axes[0], results)
    _ratios(axes[1], results, ["full / reuse 5 %", "full / reuse 2 %"], "How much sooner than full")
    _ratios(axes[2], results, ["reuse 5 % / exact", "reuse 2 % / exact"], "How much later than an exact hit")
    for one in axes:
        one.set_xlim(-0.5, len(results) - 0.5)
        one.set_xticks(range(len(results)), [case.title.replace(", ", "\n") for case in results])
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Time to the first token (engine side), random Qwen2.5-VL; image tokens per prompt")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _times(axes: Axes, results: Results) -> None:
    width = 0.2
    for number, (name, colour) in enumerate(COLOURS.items()):
        medians = [statistics.median(r.variants()[name].engine_s for r in repeats) for repeats in results.values()]
        axes.bar(np.arange(len(results)) + (number - 1.5) * width, medians, width, label=name, color=colour)
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.set_yticks([at for at in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if lowest <= at <= highest])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("seconds (median)")
    axes.set_title("Time to the first token")
    axes.legend(frameon=False)


def _ratios(axes: Axes, results: Results, names: Sequence[str], title: str) -> None:
    for number, name in enumerate(names):
        spreads = [spread(repeats, RATIOS[name]) for repeats in results.values()]
        medians = [one.median for one in spreads]
        ranges = [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
        colour = list(COLOURS.values())[2 + number]
        places = np.arange(len(results)) + 0.1 * (2 * number - 1)
        axes.errorbar(places, medians, ranges, fmt="o", capsize=4, color=colour, label=name)
    for target in (target for target in TARGETS if target.ratio in names):
        colour = list(COLOURS.values())[2 + names.index(target.ratio)]
        reached = [i for i, case in enumerate(results) if case.num_image_tokens >= target.min_image_tokens]
        if reached:
            axes.hlines(target.limit, reached[0] - 0.4, reached[-1] + 0.4, colors=colour, linestyles=":")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{title}\n(median, lowest and highest; dotted: target)")
    axes.legend(frameon=False)
