"""The bytes of the host tier's entries, of all ranks, for threads and processes that move them."""

from collections.abc import Sequence

from vlcache_connector.store.base import EntryMeta, Part, RankBytes
from vlcache_connector.store.host import HostEntry


class HostBytes:
    """`provenance` is kept with every entry that leaves the host tier."""

    def __init__(self, slabs: Sequence[RankBytes], provenance: dict[str, str]) -> None:
        self._slabs = tuple(slabs)
        self._provenance = provenance

    @property
    def num_ranks(self) -> int:
        return len(self._slabs)

    def meta(self, entry: HostEntry) -> EntryMeta:
        return EntryMeta(entry.key, entry.num_tokens, entry.entry_class, self._provenance)

    def ranks(self, entry: HostEntry) -> list[list[Part]]:
        """The entry's parts on each rank."""
        return [slab.parts(entry.extent, entry.entry_class.kind, entry.num_tokens) for slab in self._slabs]

    def order(self, entry: HostEntry) -> Sequence[int]:
        """Tokens that stand for all of a KV entry, as the first rank has put them in order."""
        return self._slabs[0].order(entry.extent, entry.num_tokens)

    def kept(self, entry: HostEntry) -> tuple[EntryMeta, list[list[Part]]]:
        """What a tier below keeps: an embedding once, because it is the same on all ranks."""
        ranks = self.ranks(entry)
        return self.meta(entry), ranks[:1] if entry.entry_class.kind == "embedding" else ranks
