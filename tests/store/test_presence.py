"""What is known of a shared store ages, and is bounded."""

import pytest

from store.entries import key_of, meta_of
from vlcache_connector.store.remote import presence
from vlcache_connector.store.remote.presence import HELD_S, MISSING_S, Presence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_known_of_what_nobody_asked_for(clock: Clock) -> None:
    known = Presence(clock)
    assert known.find(key_of(1)) is None and not known.is_known(key_of(1))


def test_what_was_seen_is_there_for_a_while(clock: Clock) -> None:
    known = Presence(clock)
    known.held(meta_of(1))
    clock.now += HELD_S - 0.1
    assert known.find(key_of(1)) == meta_of(1) and known.is_known(key_of(1)) and list(known.entries()) == [meta_of(1)]
    clock.now += 0.2
    assert known.find(key_of(1)) is None and not known.is_known(key_of(1)) and list(known.entries()) == []


def test_what_was_missing_is_missing_for_a_shorter_while(clock: Clock) -> None:
    known = Presence(clock)
    known.missing(key_of(1))
    assert known.find(key_of(1)) is None and known.is_known(key_of(1)) and list(known.entries()) == []
    clock.now += MISSING_S + 0.1
    assert not known.is_known(key_of(1))


def test_the_latest_news_count(clock: Clock) -> None:
    known = Presence(clock)
    known.missing(key_of(1))
    known.held(meta_of(1))
    assert known.find(key_of(1)) == meta_of(1)
    known.missing(key_of(1))
    assert known.find(key_of(1)) is None


def test_old_news_are_dropped_and_then_the_first_ones(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_KEYS", 3)
    known = Presence(clock)
    known.missing(key_of(0))
    for seed in range(1, 4):
        known.held(meta_of(seed))
    known.prune()
    assert [known.is_known(key_of(seed)) for seed in range(4)] == [False, True, True, True]
    known.held(meta_of(1))
    known.held(meta_of(4))
    known.prune()
    assert [known.is_known(key_of(seed)) for seed in range(5)] == [False, True, False, True, True]
    clock.now += HELD_S + 1
    known.prune()
    assert known._known == {}
