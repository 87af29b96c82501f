"""Counters: what was added since the last `take`, by name and label."""

import re

import pytest

from vlcache_connector.metrics import METRICS, Counters, Measured, merge


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


def test_gauges_keep_the_latest_value_and_histograms_every_observation() -> None:
    counters = Counters()
    for value in (0.05, 0.1):
        counters.set("recompute_ratio", value)
        counters.observe("drift_kl", value)
    assert counters.take() == {"recompute_ratio": 0.1, "drift_kl": [0.05, 0.1]}


def test_intervals_are_merged_each_kind_in_its_own_way() -> None:
    total: Measured = {"hits": 1, "recompute_ratio": 0.1, "drift_kl": [0.5]}
    merge(total, {"hits": 2, "recompute_ratio": 0.05, "drift_kl": [0.25], "drift_kv:3": 1.5})
    assert total == {"hits": 3, "recompute_ratio": 0.05, "drift_kl": [0.5, 0.25], "drift_kv:3": 1.5}


def test_a_merge_leaves_what_it_was_given_as_it_is() -> None:
    later: Measured = {"drift_kl": [0.25]}
    total: Measured = {}
    merge(total, later)
    merge(total, {"drift_kl": [1.0]})
    assert later == {"drift_kl": [0.25]}


def test_a_metric_of_another_kind_is_refused() -> None:
    for use in (Counters().set, Counters().observe):
        with pytest.raises(AssertionError, match="is a counter"):
            use("hits", 1)
    with pytest.raises(AssertionError, match="is a histogram"):
        Counters().add("drift_kl")


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
    assert metric.kind in ("counter", "gauge", "histogram")
    assert list(metric.buckets) == sorted(metric.buckets) and bool(metric.buckets) == (metric.kind == "histogram")
