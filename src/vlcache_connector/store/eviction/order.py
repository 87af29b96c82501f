"""Who leaves a bounded tier, when, and why: by policy when room is needed, by quota, by age. Scheduler side, no I/O.

Every tier uses it the same way: it says what was inserted, used and removed, and asks who should leave before an
insertion. A class that has a quota is a small cache of its own, with its own floor: what it evicts does not age others.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.policies import EvictionPolicy, Facts
from vlcache_connector.store.eviction.ranking import Ranking
from vlcache_connector.types import EntryClass


class EvictionOrder:
    """The entries of one tier of `capacity_nbytes`, in the order in which they leave."""

    def __init__(
        self,
        policy: EvictionPolicy,
        capacity_nbytes: int,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._policy = policy
        self._capacity = capacity_nbytes
        self._limits = limits or Limits()
        self._all = Ranking()
        self._classes: dict[str, Ranking] = {}  # those that have a quota and entries
        self._by_age = Ranking()  # those that expire, by when they do
        self._uses = count(1)
        self._priced: dict[tuple[str, str], tuple[float, int]] = {}  # kind, modality -> seconds and bytes of all seen

    def __len__(self) -> int:
        return len(self._all)

    @property
    def nbytes(self) -> int:
        """Of all entries."""
        return self._all.nbytes

    def facts(self, key: bytes) -> Facts | None:
        return self._all.facts(key)

    # -- what happens -------------------------------------------------------------------------------------------------

    def inserted(
        self, key: bytes, nbytes: int, entry_class: EntryClass, seconds: float | None = None, age_s: float = 0.0
    ) -> float:
        """A new entry; `age_s` says how long the tier has had it. Returns when it expires, on `clock`."""
        assert self._all.facts(key) is None, "an entry is inserted once"
        now = self.clock()
        facts = Facts(key, nbytes, entry_class, seconds, now - age_s if age_s else now, now)
        if seconds is not None:
            of_class = (entry_class.kind, entry_class.modality)
            sum_s, sum_nbytes = self._priced.get(of_class, (0.0, 0))
            self._priced[of_class] = (sum_s + seconds, sum_nbytes + nbytes)
        self._place(facts)
        expires_s = facts.inserted_s + self._limits.ttl_of(entry_class)
        if expires_s < math.inf:
            self._by_age.place(facts, expires_s)
        return expires_s

    def used(self, key: bytes) -> None:
        facts = self._all.facts(key)
        assert facts is not None
        facts.num_uses += 1
        facts.used_s = self.clock()
        self._place(facts)

    def removed(self, key: bytes) -> None:
        """The entry is gone, for whatever reason."""
        facts = self._all.facts(key)
        assert facts is not None
        self._all.remove(key)
        if self._by_age.facts(key) is not None:
            self._by_age.remove(key)
        for name, _ in self._limits.quotas_of(facts.entry_class):
            self._classes[name].remove(key)
            if not len(self._classes[name]):
                del self._classes[name]

    # -- who leaves ---------------------------------------------------------------------------------------------------

    def admits(self, nbytes: int, entry_class: EntryClass, pinned: Iterable[bytes] = ()) -> bool:
        """Whether a new entry can be within its quotas, when all of its classes may leave but the `pinned` entries."""
        quotas = self._limits.quotas_of(entry_class)
        if not quotas:
            return True
        staying = [facts for key in pinned if (facts := self._all.facts(key)) is not None]
        for name, share in quotas:
            members = self._classes.get(name)
            stays = sum(f.nbytes for f in staying if members is not None and members.facts(f.key) is not None)
            if stays + nbytes > share * self._capacity:
                return False
        return True

    def victims(self) -> Iterator[bytes]:
        """Keys in the order in which they should leave when room is needed. The caller skips those that are pinned,
        calls `removed` for others while it iterates, and stops when it has room. The same holds for the two below.
        """
        return (facts.key for _, facts in self._all.in_order())

    def quota_victims(self, nbytes: int, entry_class: EntryClass) -> Iterator[bytes]:
        """Who must leave so that a new entry is within its quotas; ends when it is."""
        for name, share in self._limits.quotas_of(entry_class):
            members = self._classes.get(name)
            if members is None:
                continue
            for _, facts in members.in_order():
                if members.nbytes + nbytes <= share * self._capacity:
                    break
                yield facts.key

    def expired(self) -> Iterator[bytes]:
        """Who has outlived its time."""
        now = self.clock()
        for expires_s, facts in self._by_age.in_order():
            if expires_s > now:
                return
            yield facts.key

    # -----------------------------------------------------------------------------------------------------------------

    def _place(self, facts: Facts) -> None:
        facts.last_use = next(self._uses)
        if facts.seconds is None:
            facts.seconds = self._usual_seconds(facts)
        self._all.place(facts, self._policy.priority(facts, self._all.floor))
        for name, _ in self._limits.quotas_of(facts.entry_class):
            members = self._classes.setdefault(name, Ranking())
            members.place(facts, self._policy.priority(facts, members.floor))

    def _usual_seconds(self, facts: Facts) -> float | None:
        """What an entry of this size and class saves by the mean of those that came with a price."""
        sum_s, sum_nbytes = self._priced.get((facts.entry_class.kind, facts.entry_class.modality), (0.0, 0))
        return sum_s / sum_nbytes * facts.nbytes if sum_nbytes else None
