"""What a running cache answers to ls, check, clear and snapshot, while its index changes."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from small_host import ENTRY_NBYTES, KV, insert, key_of
from store.live_scene import ABOUT, Live
from vlcache_connector.store import views
from vlcache_connector.store.control.protocol import SORTS, ControlError, Message
from vlcache_connector.store.host import HostEntry, State
from vlcache_connector.types import Extent


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE", 3)


def others_can_lock(lock: threading.RLock) -> bool:
    found: list[bool] = []

    def attempt() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


# -- about and ls -----------------------------------------------------------------------------------------------------


def test_about_adds_the_tiers_to_what_is_known_of_the_engine() -> None:
    live = Live(3, num_free=1)
    tier = {"name": "host", "capacity_nbytes": 4 * ENTRY_NBYTES, "used_nbytes": 3 * ENTRY_NBYTES, "entries": 3}
    assert live.commands.about() == {**ABOUT, "tiers": [tier]}


def test_an_entry_is_listed_with_all_that_is_known_of_it() -> None:
    live = Live(2)
    live.index.pin(live.entries[0])
    entries, _ = live.listed(sort="tokens")
    now = time.time()
    assert now - 60 < entries[1].pop("created_s") < entries[1].pop("used_s") <= now
    about = {"tier": "host", "key": key_of(0).hex(), "num_tokens": 1, "nbytes": ENTRY_NBYTES}
    used = {"uses": 1, "is_pinned": True}
    assert entries[1] == {**about, "kind": "kv", "modality": "image", "tenant": KV.tenant, **used}
    assert entries[0]["kind"] == "embedding"
    assert entries[0]["tenant"] == ""
    assert (entries[0]["uses"], entries[0]["is_pinned"]) == (0, False)


def test_what_is_being_written_is_not_listed() -> None:
    live = Live(1)
    live.index.reserve(b"w", 1, 1, KV)
    entries, result = live.listed()
    assert [entry["key"] for entry in entries] == [key_of(0).hex()]
    assert result["totals"] == [{"tier": "host", "kind": "kv", "entries": 1, "num_tokens": 1, "nbytes": ENTRY_NBYTES}]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_the_order_is_the_one_asked_for_and_the_sums_are_over_everything(sort: str, limit: int) -> None:
    live = Live(0, num_free=100)
    for number in (5, 2, 8, 3, 9, 6, 1):
        entry = insert(live.index, number, nbytes=256 * (10 - number))
        facts = live.index.facts(entry.key)
        assert facts is not None
        facts.inserted_s, facts.used_s = number * 7 % 10, number * 3 % 10
    order: dict[str, Callable[[Message], float]] = {
        "new": lambda entry: entry["created_s"],
        "size": lambda entry: entry["nbytes"],
        "used": lambda entry: entry["used_s"],
        "tokens": lambda entry: entry["num_tokens"],
    }
    entries, result = live.listed(limit, sort)
    everything, _ = live.listed()
    values = sorted(map(order[sort], everything), reverse=True)
    assert [order[sort](entry) for entry in entries] == values[:limit]
    assert result["shown"] == len(entries)
    by_kind = {total["kind"]: total for total in result["totals"]}
    assert (by_kind["kv"]["entries"], by_kind["kv"]["num_tokens"], by_kind["kv"]["nbytes"]) == (3, 19, 256 * 14)
    assert (by_kind["embedding"]["entries"], by_kind["embedding"]["num_tokens"]) == (4, 22)


def test_entries_that_stay_are_listed_once_whatever_happens_between_pages() -> None:
    live = Live(20, num_free=0)
    stay = {entry.key for entry in live.entries[1::2]}
    rows = iter(views.HostView(live.index, live.lock).rows())
    seen = []
    for number, row in enumerate(rows):
        seen.append(row.key)
        if number % 2 == 0 and number < 20:  # another entry takes the room, and the place, of one of those that go
            if live.entries[number].state is State.READY:
                live.index.forget(live.entries[number])
            insert(live.index, 1000 + number)
    live.index.check()
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)


def test_the_lock_is_free_between_messages_and_held_for_one_page_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live(10)
    read: list[int] = []

    def page(start: int, count: int, original: Callable[[int, int], Any] = live.index.places.page) -> Any:
        assert not others_can_lock(live.lock)
        read.append(count)
        return original(start, count)

    def forget(entry: HostEntry, original: Callable[[HostEntry], None] = live.index.forget) -> None:
        assert not others_can_lock(live.lock)
        original(entry)

    monkeypatch.setattr(live.index.places, "page", page)
    monkeypatch.setattr(live.index, "forget", forget)
    for messages in (live.commands.list_entries(0, "new"), live.commands.check(False), views_of(live)):
        assert all(others_can_lock(live.lock) for _ in messages)
        assert sum(read) == 10 and max(read) <= views.PAGE
        read.clear()


def views_of(live: Live) -> Iterator[object]:
    yield live.commands.clear(["host"])


# -- check ------------------------------------------------------------------------------------------------------------


def share_bytes(live: Live) -> None:
    live.entries[3].extent = live.entries[1].extent


def leave_the_memory(live: Live) -> None:
    live.entries[3].extent = type(live.entries[3].extent)(live.index.capacity_nbytes, 256)


def lose_the_key(live: Live) -> None:
    del live.index._entries[live.entries[3].key]


def lose_the_writer(live: Live) -> None:
    entry = live.index.reserve(b"w", 1, 1, KV)
    assert entry is not None
    entry.pins = 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (share_bytes, "share bytes"),
        (leave_the_memory, "outside of the memory"),
        (lose_the_key, "not the one that its key finds"),
        (lose_the_writer, "written by nobody"),
    ],
)
def test_check_names_the_entry_that_is_damaged(damage: Callable[[Live], None], words: str) -> None:
    live = Live(8)
    assert live.problems() == []
    damage(live)
    (problem,) = live.problems()
    assert words in problem
    assert (key_of(3).hex()[:16] in problem) or damage is lose_the_writer


def test_bytes_that_changed_hands_during_the_check_are_no_problem() -> None:
    live = Live(9, num_free=0)
    problems = views.HostView(live.index, live.lock).problems(deep=False)
    assert [next(problems) for _ in range(3)] == [None] * 3
    for entry in (live.entries[0], live.entries[8]):
        live.index.forget(entry)
    new = insert(live.index, 9)  # where the first was, and in the listing where the last was
    assert (new.extent, new.place) == (live.entries[0].extent, 8)
    assert list(problems) == [None] * 6


def test_an_entry_that_has_gone_hides_no_problem_of_its_neighbours() -> None:
    live = Live(9)
    live.entries[0].extent = Extent(0, 3 * ENTRY_NBYTES)
    live.entries[5].extent = Extent(2 * ENTRY_NBYTES, ENTRY_NBYTES)
    problems = views.HostView(live.index, live.lock).problems(deep=False)
    assert [next(problems) for _ in range(3)] == [None] * 3
    for entry in live.entries[1:3]:
        live.index.forget(entry)
    (problem,) = filter(None, problems)
    assert key_of(0).hex()[:16] in problem and key_of(5).hex()[:16] in problem


def test_a_deep_check_adds_what_only_the_index_as_a_whole_shows() -> None:
    live = Live(8)
    live.index._extents._free.pop()
    assert live.problems() == []
    assert live.problems(deep=True) == ["host: bytes leaked"]


def test_check_reports_progress_and_what_it_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcache_connector.store.commands._PROGRESS_EVERY_S", 0)
    *progress, last = Live(9).commands.check(False)
    assert [message["progress"]["done"] for message in progress] == list(range(1, 10))
    assert {message["progress"]["total"] for message in progress} == {9}
    assert last == {"result": {"problems": [], "entries": 9, "nbytes": 9 * ENTRY_NBYTES}}


# -- clear ------------------------------------------------------------------------------------------------------------


def test_clear_removes_everything_but_the_bytes_that_are_in_use() -> None:
    live = Live(9)
    live.index.pin(live.entries[4])
    writing = live.index.reserve(b"w", ENTRY_NBYTES, 1, KV)
    assert writing is not None
    assert live.commands.clear(["host", "host"]) == {"host": 10}
    assert len(live.index) == 0
    assert live.index.used_nbytes == 2 * ENTRY_NBYTES
    live.index.unpin(live.entries[4])
    live.index.commit(writing)
    assert live.index.used_nbytes == 0
    live.index.check()


def test_an_unknown_tier_is_refused_before_anything_is_removed() -> None:
    live = Live(2)
    with pytest.raises(ControlError, match="no tier 'disc' here; there are host"):
        live.commands.clear(["host", "disc"])
    assert len(live.index) == 2


def test_commands_agree_with_an_index_that_another_thread_changes() -> None:
    live = Live(40, num_free=0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def change() -> None:
        number = 40
        try:
            while not stop.is_set():
                with live.lock:
                    insert(live.index, number)
                number += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(5):
        entries, result = live.listed()
        assert len({entry["key"] for entry in entries}) == len(entries) == result["shown"]
        assert live.problems() == live.problems(deep=True) == []
        live.commands.clear(["host"])
    stop.set()
    thread.join()
    assert failures == []
    live.index.check()
