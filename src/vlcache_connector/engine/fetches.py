"""What requests wait for: entries on their way up from the tiers below the host tier. Scheduler side.

What a tier that engines share holds is asked first, with the same patience.

vLLM asks for a waiting request in every step, and goes on with others when the answer is "not known yet". Entries that
a request waits for are pinned until it is admitted, so that they are all there at once. A request does not wait longer
than computing would take: what comes too late for it is there for the next one.
"""

import time
from collections.abc import Iterable
from itertools import takewhile
from typing import TYPE_CHECKING

from vlcache_connector.plan.keys import entry_class
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import EntryClass, Span

if TYPE_CHECKING:
    from vlcache_connector.engine.session import SchedulerSession

MIN_WAIT_S = 0.05  # less than this is not worth computing twice
MAX_WAIT_S = 10.0

Wanted = tuple[bytes, int, EntryClass]  # key, tokens, class of an entry


class Fetches:
    """The entries that requests wait for."""

    def __init__(self, session: "SchedulerSession") -> None:
        self._session = session
        self._pinned: dict[str, dict[bytes, HostEntry]] = {}  # request -> entries
        self._deadlines: dict[str, float] = {}
        self._tiers: dict[str, str] = {}  # request -> the lowest tier that it waited for

    def wait_for_spans(self, request_id: str, spans: Iterable[Span], salt: str | None) -> bool:
        """Begin to bring up what these spans need, up to the first one that nobody holds; whether there is anything to
        wait for.
        """
        lower = self._session.lower
        if lower is None:
            return False
        spans = list(spans)
        if self._wait_for_answer(request_id, _wanted(spans, salt)):
            return True
        wanted = _wanted(takewhile(self._is_held, spans), salt)
        if request_id not in self._pinned and all(self._session.index.get(key) is not None for key, *_ in wanted):
            return False
        return self._wait_for_all(request_id, wanted)

    def wait_for_embedding(self, request_id: str, wanted: Wanted) -> bool:
        """The same for one encoder output."""
        session, (key, num_tokens, _) = self._session, wanted
        if session.lower is None or session.index.get(key) is not None:
            return False
        if self._wait_for_answer(request_id, [wanted]):
            return True
        return session.is_held(key, num_tokens) and self._wait_for_all(request_id, [wanted])

    def tier(self, request_id: str) -> str:
        """Where the request's entries came from."""
        return self._tiers.get(request_id, "host")

    def release(self, request_id: str) -> None:
        """The request was admitted, or is gone."""
        for entry in self._pinned.pop(request_id, {}).values():
            self._session.index.unpin(entry)
        self._deadlines.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        self.release(request_id)
        self._tiers.pop(request_id, None)

    def _is_held(self, span: Span) -> bool:
        return all(self._session.is_held(key, num_tokens) for _, key, num_tokens in span.entries)

    def _wait_for_answer(self, request_id: str, wanted: list[Wanted]) -> bool:
        """Whether a shared tier is being asked for one of these entries and the request should wait for its answer."""
        lower, index = self._session.lower, self._session.index
        lacking = [one for one in wanted if not index.holds(one[0])]
        return lower is not None and lower.ask(lacking) and self._is_patient(request_id, lacking)

    def _wait_for_all(self, request_id: str, wanted: list[Wanted]) -> bool:
        """Whether one of these entries is on its way and the request should wait for it."""
        moving = [one for one in wanted if self._wait_for(request_id, *one)]
        return bool(moving) and self._is_patient(request_id, moving)

    def _is_patient(self, request_id: str, lacking: list[Wanted]) -> bool:
        """Whether a request should still wait for what it lacks: no longer than computing that would take, once the
        prices are known.
        """
        now = time.monotonic()
        if request_id not in self._deadlines:
            saved = [self._session.prices.saved_by(of_class.kind, num_tokens) for _, num_tokens, of_class in lacking]
            known = [seconds for seconds in saved if seconds is not None]
            patience = sum(known) if len(known) == len(lacking) else MAX_WAIT_S
            self._deadlines[request_id] = now + min(max(patience, MIN_WAIT_S), MAX_WAIT_S)
        return now <= self._deadlines[request_id]

    def _wait_for(self, request_id: str, key: bytes, num_tokens: int, wanted: EntryClass) -> bool:
        """Pin the entry; whether it is still on its way."""
        lower, index = self._session.lower, self._session.index
        assert lower is not None
        entry = index.get(key)
        is_moving = entry is None
        if entry is None and not index.holds(key) and (tier := lower.find(key, num_tokens)) is not None:
            nbytes = self._session.layout.nbytes(wanted.kind, num_tokens)
            seconds = self._session.prices.saved_by(wanted.kind, num_tokens)
            lower.fetch(tier, key, nbytes, num_tokens, wanted, seconds)
        if entry is None and (fetch := lower.fetching(key)) is not None:
            entry, self._tiers[request_id] = fetch.entry, fetch.tier.name
        pinned = self._pinned.setdefault(request_id, {})
        if entry is not None and pinned.get(key) is not entry:
            index.pin(entry, is_use=False)
            if key in pinned:
                index.unpin(pinned[key])
            pinned[key] = entry
        return is_moving and entry is not None


def _wanted(spans: Iterable[Span], salt: str | None) -> list[Wanted]:
    return [
        (key, num_tokens, entry_class(kind, span.modality, salt))
        for span in spans
        for kind, key, num_tokens in span.entries
    ]
