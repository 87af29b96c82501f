"""Faults that the soak plants in the engine's processes: functions of the connector raise now and then, by a die.

A function of the worker side raises before its work, or behind it, when the bytes are already where they belong and
only the answer is lost. On the scheduler side an error behind the work would be one that no statement can raise.
"""

import functools
import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from soak import journal


class PlantedError(RuntimeError):
    """Its name is how the log's reader tells planted tracebacks from others."""


@dataclass(frozen=True)
class Site:
    """A function, its owner (`module` or `module:Class`), and how often it raises in relation to the others."""

    owner: str
    name: str
    weight: float = 1.0
    may_be_late: bool = False


_ENGINE = "vlcache_connector.engine."
SITES = (
    Site(_ENGINE + "kv_scheduler", "describe"),
    Site(_ENGINE + "kv_scheduler:VLCacheScheduler", "_plan"),
    Site(_ENGINE + "chains:Chains", "enter"),
    Site(_ENGINE + "loads:LoadQueue", "add"),
    Site(_ENGINE + "saves:SavePlanner", "_save"),
    Site(_ENGINE + "models.qwen_vl:QwenVLStack", "positions", may_be_late=True),
    Site(_ENGINE + "pass_impl:PassImpl", "forward", weight=0.3, may_be_late=True),
    Site(_ENGINE + "piece_loader", "position_delta", may_be_late=True),
    Site(_ENGINE + "piece_loader", "load_runs", may_be_late=True),
    Site(_ENGINE + "kv_worker", "save_run", may_be_late=True),
    Site(_ENGINE + "kv_worker", "save_embedding", may_be_late=True),
    Site(_ENGINE + "ec_sides", "save_embedding", may_be_late=True),
    Site(_ENGINE + "ec_sides:ECWorker", "_load", weight=10, may_be_late=True),  # once in a hundred requests
    Site("vlcache_connector.exec.recompute:Recompute", "run", may_be_late=True),
    Site("vlcache_connector.exec.shift", "shift_rows", weight=0.3, may_be_late=True),
)

_calm = 0


@contextmanager
def calm() -> Iterator[None]:
    """No faults inside: for auditors, which run the same functions."""
    global _calm
    _calm += 1
    try:
        yield
    finally:
        _calm -= 1


def plant(seed: int, rate: float) -> None:
    """Wrap all sites. `rate` is the chance of a call to raise, times the site's weight."""
    for site in SITES:
        owner = find(site.owner)
        setattr(owner, site.name, _unreliable(getattr(owner, site.name), site, seed, rate))


def find(owner: str) -> Any:
    module, _, attribute = owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _unreliable(function: Callable[..., Any], site: Site, seed: int, rate: float) -> Callable[..., Any]:
    dice = random.Random(f"{seed} {site.owner} {site.name}")

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _calm or dice.random() >= rate * site.weight:
            return function(*args, **kwargs)
        is_late = site.may_be_late and dice.random() < 0.5
        if is_late:
            function(*args, **kwargs)
        journal.note("fault", site=f"{site.owner}.{site.name}", late=is_late)
        raise PlantedError(f"planted in {site.name}")

    return wrapped
