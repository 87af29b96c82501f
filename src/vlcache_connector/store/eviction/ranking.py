"""Entries in the order of their priorities, as a heap whose items move late.

While an entry stays, its priority mostly rises. Its item in the heap then stays where it is, and is put in its place
when it comes up, so a use costs no work on the heap; inserting and evicting cost O(log n).
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from vlcache_connector.store.eviction.policies import Facts

_Place = tuple[float, int, Facts]  # priority, number of the use that set it

_SPARE = 64  # items of entries that are gone, tolerated in any case


class Ranking:
    """The entries of one tier, or of one class of them."""

    def __init__(self) -> None:
        self.floor = 0.0  # highest priority of an entry that left because `in_order` offered it
        self.nbytes = 0
        self._places: dict[bytes, _Place] = {}
        self._heap: list[_Place] = []
        self._offered: list[_Place] = []  # taken from the heap by `in_order`; most of them are gone
        self._on_offer: _Place | None = None  # the last of them, while the caller looks at it

    def __len__(self) -> int:
        return len(self._places)

    def facts(self, key: bytes) -> Facts | None:
        place = self._places.get(key)
        return place[2] if place is not None else None

    def place(self, facts: Facts, priority: float) -> None:
        """The entry is new, or its priority has changed."""
        old, new = self._places.get(facts.key), (priority, facts.last_use, facts)
        self._places[facts.key] = new
        if old is None:
            self.nbytes += facts.nbytes
        if old is None or new < old:
            heappush(self._heap, new)
        if len(self._heap) + len(self._offered) > 2 * len(self._places) + _SPARE:
            self._heap = list(self._places.values())
            heapify(self._heap)
            self._offered = []

    def remove(self, key: bytes) -> None:
        place = self._places.pop(key)
        self.nbytes -= place[2].nbytes
        if self._on_offer is place:
            self.floor = max(self.floor, place[0])

    def in_order(self) -> Iterator[tuple[float, Facts]]:
        """Priorities and entries, lowest first. The caller may remove entries on the way, and may stop; it does not
        place any.
        """
        for place in self._offered:  # those that stayed
            self._push_current(place)
        self._offered = []
        while self._heap:
            place = heappop(self._heap)
            if self._places.get(place[2].key) is not place:
                self._push_current(place)
                continue
            while self._heap and self._heap[0] is place:
                heappop(self._heap)
            self._offered.append(place)
            self._on_offer = place
            try:
                yield place[0], place[2]
            finally:  # also when the caller stops
                self._on_offer = None

    def _push_current(self, place: _Place) -> None:
        """Put an item where its entry is now, unless the entry is gone or has another item further down."""
        now = self._places.get(place[2].key)
        if now is not None and now[2] is place[2] and place <= now:
            heappush(self._heap, now)
