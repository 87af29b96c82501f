"""What the engine's processes tell the soak: a file of JSON lines per process, in a folder that the environment names.

Lines are written at once and whole, so that they survive a process that dies.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "VLCACHE_SOAK_FOLDER"
SEED = "VLCACHE_SOAK_SEED"
FAULT_RATE = "VLCACHE_SOAK_FAULT_RATE"
AUDIT_SHARE = "VLCACHE_SOAK_AUDIT_SHARE"
HAS_DISK = "VLCACHE_SOAK_HAS_DISK"


def folder() -> Path:
    return Path(os.environ[FOLDER])


def note(kind: str, **fields: Any) -> None:
    line = json.dumps({"kind": kind, "at_s": time.time()} | fields, default=str) + "\n"
    with (folder() / f"events-{os.getpid()}.jsonl").open("a") as file:
        file.write(line)


def read(where: Path) -> Iterator[dict[str, Any]]:
    """All lines of all processes; those of one process in their order."""
    for path in sorted(where.glob("events-*.jsonl")):
        with path.open() as file:
            yield from map(json.loads, file)
