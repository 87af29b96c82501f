"""Who measures times on a machine takes turns: a file's lock says whose it is."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """Waits for the lock, and holds it; without a file nobody else is there."""
    if file is None:
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
