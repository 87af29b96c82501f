"""Runs a whole simulation, and shows it as a table, as data or as a plot."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlcache_connector.plotting import require_matplotlib, save
from vlcache_connector.simulate.recording import Recording
from vlcache_connector.simulate.replay import BELADY, BOUND, MEASURES, Outcome, bound, infinite, replay
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def capacities_of(text: str) -> list[int]:
    """Bytes from a list such as "512M,1G,4G", in ascending order. Raises `ValueError`."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([KMGT]?)(i?B)?", part.strip(), re.IGNORECASE | re.ASCII)
        nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if nbytes < 1:
            raise ValueError(f"{part.strip()!r} is no size; write for example 512M or 4G")
        sizes.append(nbytes)
    return sorted(set(sizes))


def simulate(
    recording: Recording, capacities: Sequence[int], progress: Callable[[str, float], None] = lambda what, share: None
) -> list[Outcome]:
    """All policies at all capacities, the limits, and a tier without bound."""
    outcomes = []
    for capacity in capacities:
        for name in (*EVICTION_POLICIES, BELADY):
            what = f"{name} at {size(capacity)}"
            outcomes.append(replay(recording.lookups, name, capacity, partial(progress, what)))
        outcomes.append(bound(recording.lookups, capacity))
    return [*outcomes, infinite(recording.lookups)]


def default_capacities(recording: Recording) -> list[int]:
    """Around the one that was recorded."""
    return [max(1, int(recording.capacity * factor)) for factor in (0.25, 0.5, 1, 2, 4)]


def size(nbytes: int) -> str:
    """For readers."""
    unit = max((unit for unit in _UNITS.values() if unit <= nbytes), default=1)
    name = {factor: f"{letter}iB" if letter else "B" for letter, factor in _UNITS.items()}[unit]
    return f"{nbytes / unit:.4g} {name}"


def lines(recording: Recording, outcomes: Sequence[Outcome]) -> list[str]:
    """The table."""
    lookups = recording.lookups
    total = sum({lookup.key: lookup.nbytes for lookup in lookups}.values())
    shown = [
        f"{len(lookups)} look-ups of {recording.num_entries} entries ({size(total)}) in {lookups[-1].t:.0f} s;"
        " hits as shares of all look-ups, of their bytes, and of the seconds that hits save",
        "",
        f"{'capacity':>10}  {'policy':9}{'look-ups':>10}{'bytes':>10}{'seconds':>10}{'evictions':>11}",
    ]
    before: int | None = 0
    for outcome in outcomes:
        capacity = "unbounded" if outcome.capacity is None else size(outcome.capacity)
        ratios = "".join(f"{_percent(outcome.ratios[name]):>10}" for name in MEASURES)
        evictions = "" if outcome.num_evictions is None else str(outcome.num_evictions)
        first = capacity if outcome.capacity != before else ""
        shown.append(f"{first:>10}  {outcome.policy:9}{ratios}{evictions:>11}".rstrip())
        before = outcome.capacity
    note = f"{BELADY}: evicts what is used again last, knowing the future; {BOUND}: no schedule can reach more"
    return [*shown, "", note]


def data(recording: Recording, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "lookups": len(recording.lookups),
        "entries": recording.num_entries,
        "recorded_capacity": recording.capacity,
        "outcomes": [
            {"policy": o.policy, "capacity": o.capacity, "hit_ratio": o.ratios, "evictions": o.num_evictions}
            for o in outcomes
        ],
    }


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Hit ratios over capacity. Raises `PlotError`."""
    require_matplotlib()
    from matplotlib.figure import Figure

    bounded = [o for o in outcomes if o.capacity is not None]
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for policy in dict.fromkeys(o.policy for o in bounded):
            points = [(o.capacity, o.ratios[measure]) for o in bounded if o.policy == policy]
            axes.plot(*zip(*points, strict=True), marker="o", label=policy, ls=":" if policy == BOUND else "-")
        limit = outcomes[-1].ratios[measure]
        if limit is not None:
            axes.axhline(limit, color="grey", lw=0.8, label="unbounded")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_formatter(lambda nbytes, _: size(int(nbytes)))
        axes.set(title=f"hits by {measure}", xlabel="capacity")
    figure.axes[0].legend()
    save(figure, path)


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"
