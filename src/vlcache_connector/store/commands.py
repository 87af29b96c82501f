"""What `vlcache ls | check | clear | snapshot` does, for a running cache and for one that lies on disk. No torch.

Runs in threads of the control server (running) or in the command line's own process (stopped).
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from vlcache_connector.store.base import Tier
from vlcache_connector.store.control.protocol import MAX_SORTED, SORTS, ControlError, Message
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.disk.view import DiskView
from vlcache_connector.store.host import HostIndex
from vlcache_connector.store.views import HostView, Row, TierView, View, totals_of

_PROGRESS_EVERY_S = 0.2
_POLL_S = 0.2
_UNDER_WAY = ("preparing", "writing")  # states of a snapshot


class SnapshotProgress(Protocol):
    """How far the latest snapshot is."""

    @property
    def state(self) -> str:
        """One of none, preparing, writing, done, cancelled, failed."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def written_entries(self) -> int: ...

    @property
    def written_nbytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def error(self) -> str: ...


class Snapshots(Protocol):
    """Writes snapshots, one at a time, in a thread of its own."""

    @property
    def progress(self) -> SnapshotProgress: ...

    def start(self, target: Path, bytes_per_s: float | None = None) -> None:
        """Begin one; raises `VLCacheError` while another is being written."""
        ...

    def wait(self, timeout_s: float | None = None) -> SnapshotProgress:
        """Until the running one is over, or the time is."""
        ...

    def cancel(self) -> None:
        """Give the running one up, if there is one; `wait` tells when nothing is left of it."""
        ...


class Commands:
    """`CacheCommands` over views of tiers."""

    def __init__(self, views: Sequence[View], about: Callable[[], Message]) -> None:
        self._views = {view.name: view for view in views}
        self._about = about

    def about(self) -> Message:
        return {**self._about(), "tiers": [view.summary() for view in self._views.values()]}

    def list_entries(self, limit: int, sort: str) -> Iterator[Message]:
        counts: Counter[tuple[str, str | None, str]] = Counter()

        def counted() -> Iterator[Row]:
            for view in self._views.values():
                for row in view.rows():
                    kind = row.entry_class.kind if row.entry_class else None
                    counts[row.tier, kind, "entries"] += 1
                    counts[row.tier, kind, "num_tokens"] += row.num_tokens
                    counts[row.tier, kind, "nbytes"] += row.nbytes or 0
                    yield row

        def order(row: Row) -> float:
            values = (getattr(row, name) for name in SORTS[sort])
            return next((value for value in values if value is not None), 0)

        rows = heapq.nlargest(limit, counted(), order) if 0 < limit <= MAX_SORTED else counted()
        shown = 0
        for row in rows:
            shown += 1
            yield {"entry": row.message()}
        yield {"result": {"shown": shown, "totals": totals_of(counts)}}

    def check(self, deep: bool) -> Iterator[Message]:
        summaries = [view.summary() for view in self._views.values()]
        total = sum(summary["entries"] for summary in summaries)
        done, shown_s = 0, time.monotonic()
        problems: list[str] = []
        for view in self._views.values():
            for problem in view.problems(deep):
                if problem is not None:
                    problems.append(problem)
                    continue
                done += 1
                if time.monotonic() - shown_s >= _PROGRESS_EVERY_S:
                    shown_s = time.monotonic()
                    yield {"progress": {"done": done, "total": total, "unit": "entries"}}
        nbytes = sum(summary["used_nbytes"] or 0 for summary in summaries)
        yield {"result": {"problems": problems, "entries": total, "nbytes": nbytes}}

    def clear(self, tiers: list[str]) -> Message:
        for name in tiers:
            if name not in self._views:
                raise ControlError(f"there is no tier {name!r} here; there are {', '.join(self._views)}")
        return {name: self._views[name].clear() for name in dict.fromkeys(tiers)}

    def snapshot(self, path: Path, bandwidth: int | None) -> Iterator[Message]:
        raise ControlError("only a running cache has a host tier to write a snapshot of")

    def cancel_snapshot(self) -> bool:
        raise ControlError("only a running cache writes snapshots")


class LiveCommands(Commands):
    """Commands of a running engine. `lock` guards `index`; `about` adds what is known of the engine."""

    def __init__(
        self,
        index: HostIndex,
        lock: threading.RLock,
        tiers: Sequence[Tier],
        about: Callable[[], Message],
        snapshots: Snapshots | None = None,
    ) -> None:
        super().__init__([HostView(index, lock), *map(_view_of, tiers)], about)
        self._snapshots = snapshots

    def snapshot(self, path: Path, bandwidth: int | None) -> Iterator[Message]:
        """Whoever stops reading only stops waiting: the snapshot goes on."""
        if self._snapshots is None:
            raise ControlError("this engine writes no snapshots")
        self._snapshots.start(path, bandwidth)
        found = self._snapshots.progress
        while found.state in _UNDER_WAY:
            yield {"progress": {"done": found.written_nbytes, "total": found.nbytes, "unit": "B"}}
            found = self._snapshots.wait(_POLL_S)
        if found.state != "done":
            raise ControlError(found.error or f"the snapshot was {found.state}")
        written = {"entries": found.written_entries, "nbytes": found.written_nbytes, "seconds": found.seconds}
        yield {"result": {"path": str(path), **written}}

    def cancel_snapshot(self) -> bool:
        if self._snapshots is None or self._snapshots.progress.state not in _UNDER_WAY:
            return False
        self._snapshots.cancel()
        return self._snapshots.wait().state == "cancelled"


class StoppedCommands(Commands):
    """Commands of a cache that lies in a folder, with or without engines that run on it.

    Raises `NoCacheError` for a folder in which there has never been a cache.
    """

    def __init__(self, root: Path) -> None:
        about = {"pid": None, "model": None, "version": None, "started_s": None, "folder": str(root)}
        super().__init__([DiskView(root)], lambda: about)


def _view_of(tier: Tier) -> View:
    return DiskView(tier.root, tier) if isinstance(tier, DiskTier) else TierView(tier)
