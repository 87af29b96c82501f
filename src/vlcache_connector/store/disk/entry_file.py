"""Parts between memory and open files, every byte hashed on the way. I/O side of the scheduler process.

Work goes in pieces: one that was just read is still in the processor's cache when it is hashed, and several threads can
share one part. Pieces are hashed by AES-GMAC, several times as fast as any cryptographic hash, under a key that follows
from the entry's: bytes of another entry fail as altered ones do. It guards against accidents, as blake3 would here.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from stat import S_ISREG

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
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

PIECE_NBYTES = 512 * 1024  # part of the format: see `digest_of`
_CONTEXT = "vlcache-connector 2026 digests of pieces"  # part of the format, as is the nonce
_NONCE = bytes(12)


def digest_of(piece_digests: Sequence[bytes]) -> str:
    """Of a part, given the digests of its pieces: the BLAKE3 digest of all these, in hex."""
    return blake3(b"".join(piece_digests)).hexdigest()


class PieceHash:
    """Digests, 16 bytes each, of the pieces of one entry. Threads may share it."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(blake3(key, derive_key_context=_CONTEXT).digest()[:16])

    def __call__(self, piece: memoryview) -> bytes:
        return self._cipher.encrypt(_NONCE, b"", piece)  # of nothing: what is left is the tag of `piece`


class Shard:
    """One rank's share of an entry, in memory and in an open file."""

    def __init__(self, fd: int, header: Header, parts: Sequence[Part]) -> None:
        """`header` as it must be; its digests mean nothing."""
        self.fd = fd
        self.header = header
        self._buffers = [part.buffer.cast("B") for part in parts]
        self._digests = [[b""] * -(-len(buffer) // PIECE_NBYTES) for buffer in self._buffers]

    def digests(self) -> tuple[str, ...]:
        """Of the parts, once all tasks have run."""
        return tuple(digest_of(digests) for digests in self._digests)

    def tasks(self, move: Callable[[int, memoryview, int], None], start: int) -> list[Callable[[], None]]:
        """`move(fd, piece, offset in the file)` and hash each piece; the parts begin at `start`."""
        tasks: list[Callable[[], None]] = []
        hashed = PieceHash(self.header.meta.key)
        for buffer, digests in zip(self._buffers, self._digests, strict=True):
            for i in range(len(digests)):
                first = i * PIECE_NBYTES
                piece = buffer[first : first + PIECE_NBYTES]
                tasks.append(partial(_move_and_hash, move, hashed, self.fd, piece, start + first, digests, i))
            start += len(buffer)
        return tasks


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


def _move_and_hash(
    move: Callable[[int, memoryview, int], None],
    hashed: PieceHash,
    fd: int,
    piece: memoryview,
    at: int,
    digests: list[bytes],
    i: int,
) -> None:
    move(fd, piece, at)
    digests[i] = hashed(piece)


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
