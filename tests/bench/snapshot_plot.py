"""The plot of `bench_snapshot`: latencies along the snapshot, and how often they are exceeded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from bench.snapshot_windows import RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"none, shared": "#8a8f98", "ours, shared": "#2f6db5", "fork, 4k": "#c8553d", "fork, huge": "#e0a458"}
LABELS = {
    "none, shared": "no snapshot",
    "ours, shared": "ours",
    "fork, 4k": "fork(), 4 KiB pages",
    "fork, huge": "fork(), huge pages",
}
BIN = RATE // 20  # operations

Timelines = Mapping[float, Mapping[str, list[np.ndarray]]]  # GiB -> variant -> latencies of each round


def plot(timelines: Timelines, path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(timelines), 2, figsize=(13, 4.2 * len(timelines)), squeeze=False)
    for (along, exceeded), (gib, variants) in zip(axes, timelines.items(), strict=True):
        _along(along, variants, f"{gib:g} GiB: longest latency in 50 ms, first round")
        _exceeded(exceeded, variants, f"{gib:g} GiB: share of operations that take longer, all rounds")
    for one in axes.flat:
        one.set_yscale("log")
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _along(axes: Axes, variants: Mapping[str, list[np.ndarray]], title: str) -> None:
    for name in reversed(COLOURS):
        latencies = variants[name][0]
        bins = [1e3 * latencies[i : i + BIN].max() for i in range(0, len(latencies), BIN)]
        axes.plot(np.arange(len(bins)) * BIN / RATE, bins, color=COLOURS[name], label=LABELS[name], linewidth=1)
    axes.set_xlabel("seconds since the snapshot began")
    axes.set_ylabel("ms")
    axes.set_title(title)


def _exceeded(axes: Axes, variants: Mapping[str, list[np.ndarray]], title: str) -> None:
    for name in COLOURS:
        latencies = 1e3 * np.sort(np.concatenate(variants[name]))
        share = 1 - np.arange(len(latencies)) / len(latencies)
        axes.plot(latencies, share, color=COLOURS[name], label=LABELS[name])
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.set_title(title)
