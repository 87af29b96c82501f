"""Counters: what was added since the last `take`, by name and label."""

import re

import pytest

from vlcache_connector.metrics import METRICS, Counters


def test_counts_add_up_by_name_and_by_label() -> None:
    counters = Counters()
    counters.add("hits")
    counters.add("hits")
    counters.add("reused_tokens", 40)
    counters.add("reused_tokens", 2)
    counters.add("declines", label="miss")
    counters.add("declines", 3, label="mode")
    counters.add("declines", label="miss")
    assert counters.take() == {"hits": 2, "reused_tokens": 42, "declines:miss": 2, "declines:mode": 3}


def test_taking_starts_again_from_zero() -> None:
    counters = Counters()
    counters.add("passes", 7)
    taken = counters.take()
    assert counters.take() == {}
    counters.add("passes")
    assert counters.take() == {"passes": 1}
    assert taken == {"passes": 7}, "what was taken changed afterwards"


def test_two_counters_share_nothing() -> None:
    one, other = Counters(), Counters()
    one.add("hits")
    assert other.take() == {}
    assert one.take() == {"hits": 1}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        Counters().add("hit")


@pytest.mark.parametrize(("name", "label"), [("hits", "miss"), ("declines", "")])
def test_a_label_is_given_exactly_where_the_metric_has_one(name: str, label: str) -> None:
    with pytest.raises(AssertionError, match=name):
        Counters().add(name, label=label)


@pytest.mark.parametrize("name", METRICS)
def test_names_are_valid_for_prometheus_and_free_of_the_label_separator(name: str) -> None:
    metric = METRICS[name]
    assert re.fullmatch(r"[a-z][a-z_]*", name)
    assert metric.label is None or re.fullmatch(r"[a-z][a-z_]*", metric.label)
    assert re.fullmatch(r"[A-Z][^\n]*\.", metric.help), "help is one sentence"
