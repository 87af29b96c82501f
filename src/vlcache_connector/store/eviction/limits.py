"""Limits per class of entries: how much of a tier a class may fill, and how long its entries live. Pure data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vlcache_connector.types import EntryClass

_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limits:
    """Class names are "kv" and "embedding" (kinds), "image" and "video" (modalities), "tenant" (each tenant by itself)
    and "tenant:TAG" (one tenant, in place of "tenant"; the TAG is that of `EntryClass.tenant`).
    """

    quotas: Mapping[str, float] = field(default_factory=lambda: _NONE)  # class -> share of the tier's capacity
    ttl_s: float | Mapping[str, float] | None = None  # for all, or class -> seconds

    def quotas_of(self, entry_class: EntryClass) -> list[tuple[str, float]]:
        """Groups of entries that the class belongs to and that have a quota, each with its share."""
        return _of(self.quotas, entry_class) if self.quotas else []

    def ttl_of(self, entry_class: EntryClass) -> float:
        """Seconds from insertion to expiry: the shortest that applies, infinite when none does."""
        if self.ttl_s is None:
            return math.inf
        if not isinstance(self.ttl_s, Mapping):
            return self.ttl_s
        return min((seconds for _, seconds in _of(self.ttl_s, entry_class)), default=math.inf)


def _of(limits: Mapping[str, float], entry_class: EntryClass) -> list[tuple[str, float]]:
    tenant = f"tenant:{entry_class.tenant}"
    found = [(name, limits[name]) for name in (entry_class.kind, entry_class.modality) if name in limits]
    limit = limits.get(tenant, limits.get("tenant"))
    return found if limit is None else [*found, (tenant, limit)]
