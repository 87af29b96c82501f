"""Parts between memory and open files, every byte hashed on the way. I/O side of the scheduler process."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from stat import S_ISREG

from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.store.digests import PIECE_NBYTES, Piece, PieceHash, Pieces, digest_of
from vlcache_connector.store.disk.format import (
    LENGTH_NBYTES,
    MAX_HEADER_NBYTES,
    Header,
    decode_header,
    difference,
    encode_header,
    specs_of,
)
from vlcache_connector.store.disk.workers import Workers


class Shard:
    """One rank's share of an entry, in memory and in an open file."""

    def __init__(self, fd: int, header: Header, parts: Sequence[Part]) -> None:
        """`header` as it must be; its digests mean nothing."""
        self.fd = fd
        self.header = header
        self._pieces = Pieces(header.meta.key, parts)
        self.digests = self._pieces.digests

    def tasks(self, move: Callable[[int, memoryview, int], None], start: int) -> list[Callable[[], None]]:
        """`move(fd, piece, offset in the file)` and hash each piece; the parts begin at `start`."""

        def task(piece: Piece) -> None:
            move(self.fd, piece.buffer, start + piece.at)
            self._pieces.hash(piece)

        return [partial(task, piece) for piece in self._pieces.all]


def header_of(meta: EntryMeta, rank: int, world_size: int, parts: Sequence[Part]) -> Header:
    specs = specs_of(parts)
    return Header(meta, rank, world_size, specs, ("0" * 64,) * len(specs))


def file_nbytes(header: Header) -> int:
    return len(encode_header(header)) + header.data_nbytes


def write(shards: Sequence[Shard], workers: Workers) -> None:
    """Fill new files and wait until they are on the disk. Raises `OSError`."""
    starts = [len(encode_header(shard.header)) for shard in shards]
    workers.run([task for shard, at in zip(shards, starts, strict=True) for task in shard.tasks(_write, at)])
    for shard in shards:
        raw = encode_header(replace(shard.header, digests=shard.digests()))
        _write(shard.fd, memoryview(raw), 0)
        os.fsync(shard.fd)


def read(shards: Sequence[Shard], workers: Workers) -> None:
    """Fill the buffers. Raises `EntryLostError` unless each file is exactly what it must be, or `OSError`."""
    tasks: list[Callable[[], None]] = []
    expected = []
    for shard in shards:
        found, start = read_header(shard.fd)
        if (reason := difference(found, shard.header)) is not None:
            raise EntryLostError(reason)
        expected.append(found.digests)
        tasks += shard.tasks(_read, start)
    workers.run(tasks)
    for shard, digests in zip(shards, expected, strict=True):
        _compare(shard.header, shard.digests(), digests)


def read_header(fd: int) -> tuple[Header, int]:
    """What a file says of itself, and where its parts begin; as long as it must be, the parts not verified.

    Raises `EntryLostError`, or `OSError`. Allocates what the file says only within bounds.
    """
    status = os.fstat(fd)
    if not S_ISREG(status.st_mode):
        raise EntryLostError("it is not a regular file")
    length = os.pread(fd, LENGTH_NBYTES, 0)
    nbytes = int.from_bytes(length, "little")
    if nbytes > min(MAX_HEADER_NBYTES, status.st_size):
        raise EntryLostError("its header cannot be as long as it says")
    raw = bytearray(len(length) + nbytes)
    _read(fd, memoryview(raw), 0)
    header = decode_header(bytes(raw))
    if status.st_size != len(raw) + header.data_nbytes:
        raise EntryLostError(f"it has {status.st_size} bytes instead of {len(raw) + header.data_nbytes}")
    return header, len(raw)


def verify(fd: int) -> Header:
    """Read and verify a whole file, whatever entry it is of. Raises `EntryLostError`, or `OSError`."""
    header, start = read_header(fd)
    scratch = memoryview(bytearray(PIECE_NBYTES))
    hashed, digests = PieceHash(header.meta.key), []
    for part in header.parts:
        pieces = []
        for first in range(0, part.nbytes, PIECE_NBYTES):
            piece = scratch[: min(PIECE_NBYTES, part.nbytes - first)]
            _read(fd, piece, start + first)
            pieces.append(hashed(piece))
        digests.append(digest_of(pieces))
        start += part.nbytes
    _compare(header, digests, header.digests)
    return header


def _compare(header: Header, found: Sequence[str], expected: Sequence[str]) -> None:
    for part, one, other in zip(header.parts, found, expected, strict=True):
        if one != other:
            raise EntryLostError(f"the bytes of {part.name} were altered")


def _read(fd: int, piece: memoryview, at: int) -> None:
    while piece:
        done = os.preadv(fd, [piece], at)
        if not done:
            raise EntryLostError("it ends too early")
        piece, at = piece[done:], at + done


def _write(fd: int, piece: memoryview, at: int) -> None:
    while piece:
        done = os.pwritev(fd, [piece], at)
        piece, at = piece[done:], at + done
