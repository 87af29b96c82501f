"""Plots of `bench_systems`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from bench.systems.laps import RECOMPUTE
from bench.systems.records import EXACT, PLAIN, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, GREEN, BLUE, RED, ORANGE = "#8a8f98", "#4c9f70", "#2f6db5", "#b5482f", "#d9962f"
# (system, variant) -> colour, line style, marker; others are not drawn
LINES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("vlcache", PLAIN): (GREY, "-", "o"),
    ("vlcache", EXACT): (GREEN, "-", "o"),
    ("vlcache", "reuse 0%"): (BLUE, ":", "."),
    ("vlcache", "reuse 2%"): (BLUE, "-", "o"),
    ("vlcache", "reuse 5%"): (BLUE, "--", "s"),
    ("vlcache", "reuse 10%"): (BLUE, "-.", "^"),
    ("vlcache", "reuse 2%, disk"): (ORANGE, "-", "o"),
    ("vlcache, 64 tokens", "reuse 64 tokens"): ("#6a4fb3", "-", "o"),
    ("ExampleConnector", "same prompt"): (RED, "--", "s"),
    ("ExampleConnector", "new text"): (RED, "-", "o"),
    ("ECExampleConnector", "new text"): ("#8c6d46", "-", "o"),
}


def sizes(rows: Sequence[Row], path: Path) -> None:
    """Seconds against image tokens, both logarithmic."""
    figure, axes = _figure(1)
    for (system, variant), (colour, style, marker) in LINES.items():
        line = sorted((r.num_tokens, r.seconds) for r in rows if (r.system, r.variant) == (system, variant))
        if not line:
            continue
        medians = [seconds.median for _, seconds in line]
        ranges = [[one.median - one.low for _, one in line], [one.high - one.median for _, one in line]]
        axes[0].errorbar(
            [tokens for tokens, _ in line],
            medians,
            ranges,
            color=colour,
            linestyle=style,
            marker=marker,
            capsize=3,
            label=f"{system}: {variant}",
        )
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    ticks = sorted({row.num_tokens for row in rows})
    axes[0].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_xlabel("image tokens")
    axes[0].set_ylabel("seconds to the first token (median, lowest and highest)")
    axes[0].set_title("One known picture under new text")
    _save(figure, axes, path)


def zipf(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput against the share of reused tokens; time to the first token against the number of clients."""
    figure, axes = _figure(2)
    for mode, label, colour in (("off", "plain vLLM", GREY), ("reuse", "vlcache", BLUE)):
        for num_pictures in sorted({run["num_pictures"] for run in runs}):
            _throughput(axes[0], runs, mode, num_pictures, colour, label)
            label = ""
    axes[0].set_xlabel("share of image tokens that vlcache reuses (fewer distinct pictures: more)")
    axes[0].set_ylabel("requests per second")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("Throughput; numbers: distinct pictures / clients")
    common = Counter(run["num_pictures"] for run in runs).most_common(1)[0][0]
    for mode, label, colour in (("off", "plain vLLM", GREY), ("reuse", "vlcache", BLUE)):
        for key, style in (("first_p50_s", "-"), ("first_p99_s", "--")):
            line = medians(runs, key, mode=mode, num_pictures=common)
            axes[1].plot(list(line), list(line.values()), style, color=colour, marker="o", label=f"{label}, {key[6:9]}")
    axes[1].set_yscale("log")
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_xlabel("clients")
    axes[1].set_ylabel("seconds to the first token")
    axes[1].set_title(f"{common} distinct pictures")
    _save(figure, axes, path)


def medians(runs: Sequence[Mapping[str, Any]], key: str, **chosen: Any) -> dict[int, float]:
    """Number of clients -> median over repeats of `key`, for the runs with the `chosen` values."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if all(run[name] == value for name, value in chosen.items()):
            found.setdefault(run["concurrency"], []).append(run[key])
    return {clients: statistics.median(values) for clients, values in sorted(found.items())}


def parts(hits: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of each hit, stacked; the recompute pass divided by kind of operation."""
    figure, axes = _figure(1)
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    bars = _merged([_pieces(hit) for hit in hits], 0.01 * max(hit["seconds"] for hit in hits))
    bottoms = [0.0] * len(bars)
    for number, name in enumerate(dict.fromkeys(name for bar in bars for name in bar)):
        heights = [1e3 * bar.get(name, 0.0) for bar in bars]
        axes[0].bar(range(len(bars)), heights, 0.6, bottom=bottoms, color=colours[number % 20], label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes[0].set_xticks(range(len(hits)), [f"{hit['num_tokens']} tokens\n{hit['variant']}" for hit in hits])
    axes[0].set_ylabel("ms to the first token (median of each part)")
    axes[0].set_title("Where the time of a hit goes")
    _save(figure, axes, path)


def _pieces(hit: Mapping[str, Any]) -> dict[str, float]:
    """Seconds, in the order in which they are stacked."""
    pieces: dict[str, float] = {}
    for part, seconds in hit["parts"].items():
        if part == RECOMPUTE and hit["pass"]:
            pieces |= {f"recompute: {name}": share * seconds for name, share in hit["pass"].items()}
        else:
            pieces[part] = max(seconds, 0.0)
    return pieces


def _merged(bars: Sequence[Mapping[str, float]], least_s: float) -> list[dict[str, float]]:
    """Pieces that are shorter than `least_s` everywhere become one."""
    names = dict.fromkeys(name for bar in bars for name in bar)
    shown = [name for name in names if max(bar.get(name, 0.0) for bar in bars) >= least_s]
    return [
        {name: bar[name] for name in shown if name in bar}
        | {"all else": sum(seconds for name, seconds in bar.items() if name not in shown)}
        for bar in bars
    ]


def _throughput(
    axes: Axes, runs: Sequence[Mapping[str, Any]], mode: str, num_pictures: int, colour: str, label: str
) -> None:
    rates = medians(runs, "requests_per_s", mode=mode, num_pictures=num_pictures)
    shares = medians(runs, "reused_share", mode="reuse", num_pictures=num_pictures)
    axes.scatter([shares[clients] for clients in rates], list(rates.values()), color=colour, label=label or None)
    for clients, rate in rates.items():
        axes.annotate(f" {num_pictures}/{clients}", (shares[clients], rate), fontsize="small", color=colour)


def _figure(columns: int) -> tuple[Any, list[Axes]]:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(9 * columns, 6), squeeze=False)
    return figure, list(axes[0])


def _save(figure: Any, axes: Sequence[Axes], path: Path) -> None:
    from matplotlib import pyplot as plt

    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
