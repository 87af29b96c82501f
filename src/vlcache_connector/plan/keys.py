"""Keys of entries: one SHA-256 digest over everything that decides whether stored bytes may stand in for computed ones.

Always full width. Every field is length-prefixed, so no two different tuples of fields give the same input.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from vlcache_connector.types import EntryClass

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


def tenant_tag(salt: str | None) -> str:
    """What stands for a tenant in quotas, files and reports: 16 hex digits; empty for those without a salt."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()[:16]


@lru_cache(maxsize=1024)
def entry_class(kind: str, modality: str, salt: str | None) -> EntryClass:
    """The class of a media item's entry; `kind` is "kv" or "embedding". Entries of one class share one object."""
    return EntryClass(kind, modality, tenant_tag(salt))


def by_tag(limits: Mapping[str, float]) -> dict[str, float]:
    """Limits as users write them, with tenants by tag in place of name."""
    split = ((name.partition("tenant:"), limit) for name, limit in limits.items())
    return {before + sep + (tenant_tag(tenant) if sep else tenant): limit for (before, sep, tenant), limit in split}


@dataclass(slots=True)
class KeySpace:
    """Makes the keys of one engine. `kv_facts` and `embedding_facts` are canonical descriptions of all that must match.

    After `forget` nothing older is found again, nor anything that another engine keeps: the weights may have been
    replaced by ones that no fingerprint describes.
    """

    kv_facts: bytes
    embedding_facts: bytes
    epoch: bytes = b""

    @property
    def facts(self) -> str:
        """A digest of all that these keys have in common, in hex."""
        return digest(self.kv_facts, self.embedding_facts, self.epoch).hex()

    def forget(self) -> None:
        self.epoch = secrets.token_bytes(16)

    def kv(self, modality: str, identifier: str, salt: str | None, form: str) -> bytes:
        """`form`: how the item's content became tokens. The same frames may be shown at another speed, or with other
        text between them.
        """
        return self._key(b"kv", self.kv_facts, salt, modality, identifier, form)

    def embedding(self, modality: str, identifier: str, salt: str | None) -> bytes:
        return self._key(b"embedding", self.embedding_facts, salt, modality, identifier)

    def _key(self, kind: bytes, facts: bytes, salt: str | None, *item: str) -> bytes:
        # A missing salt and an empty one are different tenants.
        tenant = b"-" if salt is None else b"+" + salt.encode()
        return digest(kind, facts, self.epoch, tenant, *(part.encode() for part in item))
