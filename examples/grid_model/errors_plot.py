"""The plot of `errors`: by position in the picture, and by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BY_BLOCK = {
    "self": "Own error when reused\n(relative, mean of layers 2 and on)",
    "handed_on": "Handed on to later image tokens in total,\nfor each token (one block reused alone)",
    "answers_kl": "KL of the answers, nats\n(one block reused alone)",
    "saved_kl": "KL saved, share of that of full reuse\n(all reused but one block)",
}


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(22, 5))
    for one, (key, title) in zip(axes, BY_BLOCK.items(), strict=False):
        _by_block(one, results, key, title)
    _by_layer(axes[4], results)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle("What goes wrong when pictures are reused, by row of 16 tokens and by layer: grid model, float32")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(results), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _by_block(axes: Axes, results: dict[str, dict[str, Any]], key: str, title: str) -> None:
    for kind, result in results.items():
        values = np.array(result[key])
        if values.ndim > 1:
            values = values[1:].mean((0, 1))
        if key == "saved_kl":
            values = values / result["reused_kl"]
        axes.plot(range(1, len(values) + 1), np.where(values == 0, np.nan, values), label=kind)
    if key in ("handed_on", "answers_kl"):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("row of the picture")


def _by_layer(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    for kind, result in results.items():
        shares = np.array(result["common"])[1:].mean(1)
        axes.plot(range(2, len(shares) + 2), shares, marker="o", label=kind)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(2, len(shares) + 2))
    axes.set_title("Share of a picture's deviation that is\ncommon to its tokens", fontsize=10)
    axes.set_xlabel("layer")
