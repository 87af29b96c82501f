"""What the connector still holds: written to a file when the process gets SIGUSR1, while the engine is idle."""

import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from soak import journal
from vlcache_connector.engine.ec_sides import ECScheduler

_connectors: "weakref.WeakSet[Any]" = weakref.WeakSet()
_ec_schedulers: "weakref.WeakSet[ECScheduler]" = weakref.WeakSet()


def attach(connector_class: Any, spoil: Callable[..., None]) -> None:
    """Watch connectors as they are made; SIGUSR2 calls `spoil`. Processes that are ready for signals say so in the
    journal's folder.
    """
    start, start_ec = connector_class.__init__, ECScheduler.__init__

    def starting(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        _connectors.add(self)
        signal.signal(signal.SIGUSR1, _dump)
        signal.signal(signal.SIGUSR2, spoil)
        side = "scheduler" if self._scheduler is not None else "worker"
        (journal.folder() / f"ready-{side}-{os.getpid()}").touch()

    def starting_ec(self: ECScheduler, *args: Any, **kwargs: Any) -> None:
        start_ec(self, *args, **kwargs)
        _ec_schedulers.add(self)

    connector_class.__init__ = starting
    ECScheduler.__init__ = starting_ec  # type: ignore[method-assign]


def ready_processes(folder: Path) -> dict[int, str]:
    """Process -> side."""
    return {int(path.name.split("-")[2]): path.name.split("-")[1] for path in folder.glob("ready-*")}


def _dump(number: int, frame: FrameType | None) -> None:
    found: dict[str, Any] = {}
    for connector in _connectors:
        if connector._scheduler is not None:
            found |= _scheduler_state(connector._scheduler)
        if connector._worker is not None:
            worker = connector._worker
            found |= {"positions": len(worker._loader._positions), "errors": len(worker._errors)}
    for ec_scheduler in _ec_schedulers:
        found["embedding_loads"] = len(ec_scheduler._loads)
    path = journal.folder() / f"state-{os.getpid()}.json"
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    session, pool = scheduler._session, scheduler._pool
    try:
        session.index.check()
        problem = None
    except AssertionError as error:
        problem = str(error)
    return {
        "index_problem": problem,
        "pins": sum(entry.pins for entry in session.index._pinned),
        "jobs": len(session._jobs),
        "requests": len(scheduler._states),
        "open_loads": scheduler._loads.num_open,
        "queued_loads": len(scheduler._loads._loads),
        "queued_compiles": len(scheduler._saves.compiles),
        "wanted_embeddings": len(session.wanted_embeddings),
        "blocks_in_use": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "entries": len(session.index),
    }


MAY_BE_LEFT = {"entries", "index_problem"}
"""Everything else in a dump must be zero when the engine is idle; `index_problem` must be None."""


def problems(dump: dict[str, Any]) -> list[str]:
    left = [f"{count} {name} left" for name, count in dump.items() if name not in MAY_BE_LEFT and count]
    return left + ([f"the index is broken: {dump['index_problem']}"] if dump.get("index_problem") else [])
