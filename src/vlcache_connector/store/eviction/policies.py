"""Eviction policies: which entry of a bounded tier leaves first. Pure; `eviction_order` keeps the facts and asks."""

from dataclasses import dataclass
from typing import Protocol

from vlcache_connector.types import EntryClass


@dataclass(slots=True, eq=False)
class Facts:
    """What is known of one entry."""

    key: bytes
    nbytes: int
    entry_class: EntryClass
    seconds: float | None  # engine time that a hit saves; None while such work has no price yet
    inserted_s: float  # on the tier's monotonic clock
    used_s: float
    num_uses: int = 1  # the insertion is the first
    last_use: int = 0  # number of its latest use among all uses of all entries


class EvictionPolicy(Protocol):
    """Prices an entry whenever it is inserted or used. The entry with the lowest priority leaves first, among equals
    the one whose use is longest ago.
    """

    def priority(self, facts: Facts, floor: float) -> float:
        """`floor` is the highest priority of an entry that was evicted so far: adding it lets entries age without being
        visited, because what comes later starts higher.
        """
        ...


class LRU:
    """Least recently used first."""

    def priority(self, facts: Facts, floor: float) -> float:
        return float(facts.last_use)


class CostAware:
    """Fewest seconds saved per byte first: GreedyDual-Size-Frequency (Cherkasova, HPL-98-69, 1998), which is
    GreedyDual-Size (Cao and Irani, USITS 1997) times the number of uses. Here the cost of a miss is engine time.

    An entry without a price is worth the floor: it leaves before all that saves something.
    """

    def priority(self, facts: Facts, floor: float) -> float:
        return floor + facts.num_uses * (facts.seconds or 0.0) / facts.nbytes


EVICTION_POLICIES: dict[str, EvictionPolicy] = {"lru": LRU(), "cost": CostAware()}
