"""Entries that are read for longer than the job goes on that reads them: by copies of a GPU. Scheduler side."""

from collections.abc import Sequence

from vlcache_connector.store.host import HostEntry, HostIndex


class Readers:
    """Unpins the entries of a job when it has ended and no rank reads them any more, whichever is heard first."""

    def __init__(self, index: HostIndex, num_ranks: int) -> None:
        self._index = index
        self._num_ranks = num_ranks
        self._entries: dict[int, Sequence[HostEntry]] = {}  # of jobs that have ended
        self._released: dict[int, int] = {}  # job -> ranks that are done with its entries

    def __len__(self) -> int:
        """Jobs that have ended, and some rank may still read."""
        return len(self._entries)

    def job_ended(self, job_id: int, entries: Sequence[HostEntry]) -> None:
        """`entries` are pinned."""
        self._entries[job_id] = entries
        self._unpin(job_id)

    def released(self, job_id: int, num_ranks: int) -> None:
        """So many more ranks are done."""
        self._released[job_id] = self._released.get(job_id, 0) + num_ranks
        self._unpin(job_id)

    def _unpin(self, job_id: int) -> None:
        if job_id in self._entries and self._released.get(job_id) == self._num_ranks:
            del self._released[job_id]
            for entry in self._entries.pop(job_id):
                self._index.unpin(entry)
