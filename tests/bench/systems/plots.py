"""Plots of `bench_systems`, one for each part but `text`, which is in that of `sizes`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from bench.systems.cold import BEHIND, COLD, OFF
from bench.systems.growth import AGAIN, COPY, HIT
from bench.systems.laps import RECOMPUTE
from bench.systems.mixed import ENCODED
from bench.systems.records import EXACT, PLAIN, Record, Row, Spread, reuse, rows_of, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, GREEN, BLUE, RED, ORANGE = "#8a8f98", "#4c9f70", "#2f6db5", "#b5482f", "#d9962f"
VIOLET, BROWN, BLACK = "#6a4fb3", "#8c6d46", "#222222"
Style = tuple[str, str, str]  # colour, line style, marker
# (system, variant) -> its line; others are not drawn
LINES: dict[tuple[str, str], Style] = {
    ("vlcache", PLAIN): (GREY, "-", "o"),
    ("vlcache", EXACT): (GREEN, "-", "o"),
    ("vLLM alone", PLAIN): (GREY, "--", "x"),
    ("vLLM alone", EXACT): (GREEN, "--", "x"),
    ("vlcache", reuse(0.0)): (BLUE, ":", "."),
    ("vlcache", reuse(0.02)): (BLUE, "-", "o"),
    ("vlcache", reuse(0.05)): (BLUE, "--", "s"),
    ("vlcache", reuse(0.1)): (BLUE, "-.", "^"),
    ("vlcache", "reuse 2%, disk"): (ORANGE, "-", "o"),
    ("vlcache, 64 tokens", "reuse 64 tokens"): (VIOLET, "-", "o"),
    ("ExampleConnector", "same prompt"): (RED, "--", "s"),
    ("ExampleConnector", "new text"): (RED, "-", "o"),
    ("ECExampleConnector", "new text"): (BROWN, "-", "o"),
    ("LMCacheMPConnector", PLAIN): (BLACK, ":", "x"),
    ("LMCacheMPConnector", EXACT): (BLACK, ":", "."),
    ("LMCacheMPConnector", "LMCache"): (BLACK, "-", "o"),
}
VARIANTS: dict[str, Style] = {
    PLAIN: (GREY, "-", "o"),
    ENCODED: (BROWN, "-", "o"),
    EXACT: (GREEN, "-", "o"),
    reuse(0.0): (BLUE, ":", "."),
    reuse(0.02): (BLUE, "-", "o"),
    reuse(0.05): (BLUE, "--", "s"),
}


def draw(content: Mapping[str, Any], folder: Path) -> None:
    """All parts that were measured, now or before."""
    for name, plot in (("sizes", sizes), ("mixed", mixed), ("zipf", zipf), ("parts", parts), ("targets", targets)):
        if name in content:
            plot(content, folder / f"bench_systems_{name}.png")


def sizes(content: Mapping[str, Any], path: Path) -> None:
    """Seconds, and seconds over those of an exact hit of the same system, against tokens; all logarithmic."""
    figure, axes = _figure(2)
    records = content["sizes"]["records"] + content.get("text", {"records": []})["records"]
    rows = rows_of(Record(**record) for record in records)
    for (system, variant), style in LINES.items():
        line = sorted((r for r in rows if (r.system, r.variant) == (system, variant)), key=lambda r: r.num_tokens)
        label = f"{system}: {variant}" + (" (text, a client's time)" if system.startswith("LMCache") else "")
        tokens = [row.num_tokens for row in line]
        _line(axes[0], tokens, [row.seconds for row in line], style, label)
        if variant != EXACT:
            _line(axes[1], tokens, [row.over_exact for row in line], style, label)
    ticks = sorted({row.num_tokens for row in rows})
    for one in axes:
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
        one.yaxis.set_major_formatter("{x:g}")
        one.set_xlabel("image tokens (LMCache: text tokens)")
    axes[0].set_ylabel("seconds to the first token (median, lowest and highest)")
    axes[0].set_title("One known picture under new text")
    axes[1].set_ylabel("over an exact prefix hit of the same system")
    axes[1].set_title("Beside the limit of any cache")
    _save(figure, axes, path)


def mixed(content: Mapping[str, Any], path: Path) -> None:
    """Seconds against the number of pictures, and by turn."""
    figure, axes = _figure(2)
    for one, kind in zip(axes, ("orders", "turns"), strict=True):
        rows = rows_of(Record(**record) for record in content["mixed"][kind])
        cases = list(dict.fromkeys((row.system, row.num_tokens) for row in rows))
        for variant, style in VARIANTS.items():
            line: list[Row] = [row for row in rows if row.variant == variant]
            _line(one, [cases.index((r.system, r.num_tokens)) for r in line], [r.seconds for r in line], style, variant)
        one.set_xticks(range(len(cases)), [f"{title}\n{tokens:,} image tokens" for title, tokens in cases])
        one.set_yscale("log")
        one.yaxis.set_major_formatter("{x:g}")
        one.set_ylabel("seconds to the first token (median, lowest and highest)")
    axes[0].set_title("Known pictures in a new order, behind new text")
    axes[1].set_title("A chat, one more known picture in each turn")
    _save(figure, axes, path)


def targets(content: Mapping[str, Any], path: Path) -> None:
    """Ratios of a cold request, and growth under a fixed budget, where they were measured."""
    figure, axes = _figure(2)
    found = content["targets"]
    if "cold" in found:
        _cold(axes[0], found["cold"])
    if "growth" in found:
        _growth(axes[1], found["growth"])
    _save(figure, axes, path)


def _cold(axes: Axes, found: Mapping[str, Any]) -> None:
    rounds = found["rounds"]
    names = [(COLD, ""), (COLD, BEHIND), (OFF, ""), (OFF, BEHIND)]
    for place, (name, behind) in enumerate(names):
        ratios = [one[name + behind] / one[PLAIN + behind] for one in rounds]
        axes.scatter([place] * len(ratios), ratios, color=BLUE if name == COLD else GREY, alpha=0.5)
        axes.hlines(statistics.median(ratios), place - 0.2, place + 0.2, colors=BLACK)
    axes.axhline(1, color=GREY, linewidth=0.5)
    axes.axhline(1.03, color=RED, linestyle=":", label="target")
    labels = [f"{'saving' if name == COLD else 'mode off'}:\n{behind[2:] or 'new picture'}" for name, behind in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_ylabel("over vLLM without a connector, each round and median")
    axes.set_title(f"What the connector costs a new picture of {found['num_tokens']} tokens")


def _growth(axes: Axes, found: Mapping[str, Any]) -> None:
    tokens = [row["num_tokens"] for row in found["sizes"]]
    styles = {HIT: (BLUE, "-", "o"), AGAIN: (GREEN, "-", "o"), COPY: (RED, "-", "o")}
    labels = {HIT: "hit", AGAIN: "vLLM's prefix cache", COPY: "copy of its KV"}
    for name, style in styles.items():
        seconds = [row["seconds"][name] for row in found["sizes"]]
        _line(axes, tokens, [_spread_ms(one) for one in seconds], style, labels[name])
    axes.set_xticks(tokens, [f"{tick:,}" for tick in tokens])
    axes.set_xlabel("image tokens")
    axes.set_ylabel("ms (median, lowest and highest)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"At most {found['budget_tokens']} tokens recomputed")


def _spread_ms(seconds: Sequence[float]) -> Spread:
    return spread([1e3 * one for one in seconds])


def _line(axes: Axes, places: Sequence[float], values: Sequence[Spread], style: Style, label: str) -> None:
    if not places:
        return
    colour, line, marker = style
    medians = [one.median for one in values]
    ranges = [[one.median - one.low for one in values], [one.high - one.median for one in values]]
    axes.errorbar(places, medians, ranges, color=colour, linestyle=line, marker=marker, capsize=3, label=label)


def zipf(content: Mapping[str, Any], path: Path) -> None:
    """Throughput against the share of reused tokens; time to the first token against the number of clients."""
    figure, axes = _figure(2)
    runs = content["zipf"]["runs"]
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
        for key, style in (("first_p50_s", "-"), ("first_p90_s", "--")):
            line = medians(runs, key, mode=mode, num_pictures=common)
            axes[1].plot(list(line), list(line.values()), style, color=colour, marker="o", label=f"{label}, {key[6:9]}")
    axes[1].set_yscale("log")
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
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


def parts(content: Mapping[str, Any], path: Path) -> None:
    """Milliseconds of each hit, stacked; the recompute pass divided by kind of operation."""
    figure, axes = _figure(1)
    hits = content["parts"]["hits"]
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
