"""Keys of entries: one SHA-256 digest over everything that decides whether stored bytes may stand in for computed ones.

Always full width. Every field is length-prefixed, so no two different tuples of fields give the same input.
"""

import hashlib
import re
from dataclasses import dataclass

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_content_hash(identifier: str) -> bool:
    """Whether vLLM made this media identifier by hashing content (64 hex digits), and not a client or a request name.

    A client that supplies 64 hex digits as its own UUID cannot be told apart.
    """
    return _HEX_DIGEST.fullmatch(identifier) is not None


def digest(*parts: bytes) -> bytes:
    """SHA-256 of the parts, each preceded by its length as 8 bytes."""
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


@dataclass(slots=True)
class KeySpace:
    """Makes the keys of one engine. `kv_facts` and `embedding_facts` are canonical descriptions of all that must match.

    `epoch` counts `reset_cache` calls: weights may have been replaced, so older entries must never be found again.
    """

    kv_facts: bytes
    embedding_facts: bytes
    epoch: int = 0

    def kv(self, identifier: str, salt: str | None) -> bytes:
        return self._key(b"kv", self.kv_facts, identifier, salt)

    def embedding(self, identifier: str, salt: str | None) -> bytes:
        return self._key(b"embedding", self.embedding_facts, identifier, salt)

    def _key(self, kind: bytes, facts: bytes, identifier: str, salt: str | None) -> bytes:
        # A missing salt and an empty one are different tenants.
        tenant = b"-" if salt is None else b"+" + salt.encode()
        return digest(kind, facts, self.epoch.to_bytes(8, "little"), tenant, identifier.encode())
