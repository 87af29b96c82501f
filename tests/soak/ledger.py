"""What the host slab of one worker should hold: a digest of each entry as it was written."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Record:
    key: bytes
    end: int
    digest: bytes


class Ledger:
    """Digests by offset. A write forgets what it overlaps: the index must have given those bytes up.

    With `comes_back`, another process may bring an entry back that had left: to any place, and as it once was.
    """

    def __init__(self, comes_back: bool = False) -> None:
        self._records: dict[int, _Record] = {}
        self._ever: dict[tuple[bytes, int], set[bytes]] | None = {} if comes_back else None  # key, size -> digests

    def wrote(self, slab: torch.Tensor, offset: int, nbytes: int, key: bytes) -> None:
        end = offset + nbytes
        overlapped = [start for start, record in self._records.items() if start < end and record.end > offset]
        for start in overlapped:
            del self._records[start]
        self._records[offset] = _Record(key, end, _digest(slab[offset:end]))
        if self._ever is not None:
            self._ever.setdefault((key, nbytes), set()).add(self._records[offset].digest)

    def offsets(self) -> list[int]:
        """Where entries begin."""
        return list(self._records)

    def problem(self, slab: torch.Tensor, offset: int, nbytes: int, key: bytes) -> str | None:
        """Why these bytes are not those that were written for `key`; None when they are."""
        record = self._records.get(offset)
        if self._ever is not None and _digest(slab[offset : offset + nbytes]) in self._ever.get((key, nbytes), ()):
            return None
        if record is None:
            return f"nothing was written at {offset}, or it was overwritten"
        if record.key != key:
            return f"the bytes at {offset} were written for another key"
        if record.end != offset + nbytes:
            return f"the entry at {offset} was written with another size"
        if record.digest != _digest(slab[offset : record.end]):
            return f"the bytes at {offset} changed after they were written"
        return None


def _digest(data: torch.Tensor) -> bytes:
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).digest()
