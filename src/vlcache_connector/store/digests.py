"""Digests of what leaves the host tier: every byte is hashed while it moves. I/O side of the scheduler process.

Work goes in pieces: one that was just moved is still in the processor's cache when it is hashed, and several threads
can share one part. Pieces are hashed by AES-GMAC, several times as fast as any cryptographic hash, under a key that
follows from the entry's: bytes of another entry fail as altered ones do. It guards against accidents, as blake3 would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vlcache_connector.store.base import Part

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


@dataclass(slots=True)
class Piece:
    """The next bytes of a part, and `at`, how far behind the start of the first part they lie."""

    at: int
    buffer: memoryview
    digest: bytes = b""


class Pieces:
    """One rank's share of an entry in memory, as pieces in order."""

    def __init__(self, key: bytes, parts: Sequence[Part]) -> None:
        self._hashed = PieceHash(key)
        self._by_part: list[list[Piece]] = []
        start = 0
        for part in parts:
            buffer = part.buffer.cast("B")
            cuts = range(0, len(buffer), PIECE_NBYTES)
            self._by_part.append([Piece(start + first, buffer[first : first + PIECE_NBYTES]) for first in cuts])
            start += len(buffer)

    @property
    def all(self) -> list[Piece]:
        return [piece for pieces in self._by_part for piece in pieces]

    def hash(self, piece: Piece) -> None:
        """What its buffer holds now. Different pieces may be hashed by different threads."""
        piece.digest = self._hashed(piece.buffer)

    def digests(self) -> tuple[str, ...]:
        """Of the parts, once all pieces were hashed."""
        return tuple(digest_of([piece.digest for piece in pieces]) for pieces in self._by_part)
