"""What the scheduler's process and the one that writes snapshots tell each other: lines of JSON, over two pipes.

Orders: begin, then write for each entry, then finish; or cancel, at any time, also before begin. All but cancel are
answered, in order; a snapshot's last answer is finished, cancelled or failed. All carry the snapshot's number, so what
belongs to one that is over is recognised and dropped. An entry travels as the place of its parts in the workers' slabs,
which both processes have mapped; no byte of it is sent.
"""

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.types import EntryClass


class Order(StrEnum):
    BEGIN = "begin"
    WRITE = "write"
    FINISH = "finish"
    CANCEL = "cancel"


class Answer(StrEnum):
    BEGUN = "begun"
    WRITTEN = "written"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SharedSlab:
    """A worker's slab as the scheduler's process has it: a shared mapping (`view`) of a file (`fd`), from its start."""

    fd: int
    view: memoryview


def line(kind: Order | Answer, number: int, content: Any) -> bytes:
    return json.dumps([kind, number, content], separators=(",", ":")).encode() + b"\n"


def outline(meta: EntryMeta, ranks: Sequence[Sequence[Part]], starts: Sequence[int]) -> list[Any]:
    """An entry for the wire. `starts`: addresses of the ranks' slabs in this process."""
    places = [
        [[part.name, part.dtype, part.shape, address(part.buffer) - start, part.buffer.nbytes] for part in parts]
        for parts, start in zip(ranks, starts, strict=False)  # an embedding has one rank's parts only
    ]
    kept = meta.entry_class
    return [meta.key.hex(), meta.num_tokens, [kept.kind, kept.modality, kept.tenant], meta.provenance, places]


def entry_of(content: list[Any], slabs: Sequence[memoryview]) -> tuple[EntryMeta, list[list[Part]]]:
    """The entry of an `outline`, its parts in these mappings of the slabs."""
    key, num_tokens, kept, provenance, places = content
    ranks = [
        [Part(name, dtype, tuple(shape), slab[at : at + nbytes]) for name, dtype, shape, at, nbytes in parts]
        for parts, slab in zip(places, slabs, strict=False)
    ]
    return EntryMeta(bytes.fromhex(key), num_tokens, EntryClass(*kept), provenance), ranks


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
