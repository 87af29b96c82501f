"""How an entry lies in a store that knows keys and values only. Pure bytes, no I/O.

What one rank has of an entry is the same bytes as a file of the disk tier, without provenance, so that their number is
known before they are read. They are cut into blobs of at most `BLOB_NBYTES`: stores bound the size of a value, and
several connections share the work. Cuts lie between pieces. The first blob holds the header with all digests and is
written last: where it is, the others have been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.store.digests import Piece, Pieces
from vlcache_connector.store.disk.format import Header, decode_header, difference, encode_header, specs_of

BLOB_NBYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BlobKey:
    """Names one blob of an entry."""

    key: bytes  # of the entry
    rank: int
    world_size: int
    number: int
    tenant: str  # 16 hex digits; empty without one


@dataclass(frozen=True, slots=True)
class Blob:
    """Some pieces of one rank's share, in order; the first blob begins with the header."""

    key: BlobKey
    nbytes: int
    pieces: tuple[Piece, ...]


class RankBlobs:
    """One rank's share of an entry, in memory, and the blobs that it fills or is filled from."""

    def __init__(self, meta: EntryMeta, rank: int, world_size: int, parts: Sequence[Part]) -> None:
        specs = specs_of(parts)
        self._header = Header(replace(meta, provenance={}), rank, world_size, specs, ("0" * 64,) * len(specs))
        self._header_nbytes = len(encode_header(self._header))
        self._pieces = Pieces(meta.key, parts)
        self._expected: tuple[str, ...] | None = None
        self.blobs = tuple(self._cut())

    def fill(self, blob: Blob, value: memoryview) -> None:
        """From memory. The first blob last, because its header has the digests of all."""
        at = self._header_nbytes if blob.key.number == 0 else 0
        for piece in blob.pieces:
            value[at : at + len(piece.buffer)] = piece.buffer
            self._pieces.hash(piece)
            at += len(piece.buffer)
        if blob.key.number == 0:
            value[: self._header_nbytes] = encode_header(replace(self._header, digests=self._pieces.digests()))

    def take(self, blob: Blob, value: memoryview) -> None:
        """Into memory. Raises `EntryLostError` when the header is not what it must be."""
        at = 0
        if blob.key.number == 0:
            at = self._header_nbytes
            found = decode_header(bytes(value[:at]))
            if (reason := difference(found, self._header)) is not None:
                raise EntryLostError(reason)
            self._expected = found.digests
        for piece in blob.pieces:
            piece.buffer[:] = value[at : at + len(piece.buffer)]
            self._pieces.hash(piece)
            at += len(piece.buffer)

    def verify(self) -> None:
        """Raises `EntryLostError` unless all bytes that were taken are those that were written."""
        for spec, found, expected in zip(
            self._header.parts, self._pieces.digests(), self._expected or self._header.digests, strict=True
        ):
            if found != expected:
                raise EntryLostError(f"the bytes of {spec.name} were altered")

    def _cut(self) -> Iterator[Blob]:
        meta = self._header.meta
        number, nbytes, pieces = 0, self._header_nbytes, list[Piece]()
        for piece in self._pieces.all:
            if pieces and nbytes + len(piece.buffer) > BLOB_NBYTES:
                yield Blob(self._key(meta, number), nbytes, tuple(pieces))
                number, nbytes, pieces = number + 1, 0, []
            nbytes += len(piece.buffer)
            pieces.append(piece)
        yield Blob(self._key(meta, number), nbytes, tuple(pieces))

    def _key(self, meta: EntryMeta, number: int) -> BlobKey:
        return BlobKey(meta.key, self._header.rank, self._header.world_size, number, meta.entry_class.tenant)


def first_blobs(meta: EntryMeta, world_size: int) -> list[BlobKey]:
    """The blobs that tell whether an entry is there: one for each rank."""
    return [BlobKey(meta.key, rank, world_size, 0, meta.entry_class.tenant) for rank in range(world_size)]
