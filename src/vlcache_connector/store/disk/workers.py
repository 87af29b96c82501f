"""Threads that help the one that reads or writes an entry. I/O side of the scheduler process."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

MAX_THREADS = 4


class Workers:
    """Up to `num_threads` threads, the caller's included, share the tasks of one transfer.

    Reading and hashing leave the interpreter lock alone. Several transfers at a time are welcome: each goes on with its
    caller's thread when all the others are busy.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(max(1, self.num_threads - 1), thread_name_prefix="vlcache-disk")

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Raises what one of the tasks raised. When this returns, nothing of them runs any more."""
        waiting = iter(tasks)

        def take_turns() -> None:
            try:
                for task in waiting:
                    task()
            except BaseException:
                for _ in waiting:  # the others need not go on
                    pass
                raise

        others: list[Future[None]] = []
        if self.num_threads > 1:
            others = [self._pool.submit(take_turns) for _ in range(min(self.num_threads, len(tasks)) - 1)]
        try:
            take_turns()
        finally:
            started = [other for other in others if not other.cancel()]  # who has not started has nothing left to do
            errors = [error for other in started if (error := other.exception())]
        for error in errors:
            raise error

    def close(self) -> None:
        self._pool.shutdown()
