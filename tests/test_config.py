"""Options: defaults, every bad value by name, and unknown keys."""

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from vlcache_connector.config import CLASSES, EVICTION, Options, RequestOptions
from vlcache_connector.errors import OptionError
from vlcache_connector.policy import NAMES, POLICIES
from vlcache_connector.policy.profile import Profile, write
from vlcache_connector.types import Mode

NAN, INF = math.nan, math.inf
ENGINE = Options(policy="full", recompute_ratio=0.2)

# option -> good values, bad values, what the message must say is allowed
OPTIONS: dict[str, tuple[list[Any], list[Any], str]] = {
    "mode": (["reuse", "exact", "off"], ["Reuse", "", None, 0, True, ["off"]], "off"),
    "policy": (sorted(POLICIES), ["Leading", "", None, 1, True, ["leading"], {"a": 1}], "leading"),
    "recompute_ratio": (
        [0, 1, 0.0, 1.0, 0.05, 1e-300],
        [-0.01, 1.01, -1, 2, NAN, INF, -INF, True, False, "0.05", None, [0.1]],
        "from 0 to 1",
    ),
    "profile": ([None], ["", 1, True, ["a"]], "path"),
    "recompute_tokens": ([None, 1, 64, 10**6], [0, -1, 64.0, NAN, INF, True, "64", [1]], "from 1"),
    "host_gib": (
        [1, 0.25, 512],
        [0, 0.0, -1, -0.5, NAN, INF, -INF, True, False, "4", None, [4]],
        "above 0",
    ),
    "disk_path": ([None, "/cache", "relative/folder"], ["", 1, True, ["/cache"]], "a folder"),
    "disk_gib": (
        [1, 0.25, 5000],
        [0, 0.0, -1, -0.5, NAN, INF, -INF, True, False, "4", None, [4]],
        "above 0",
    ),
    "remote": (
        [None, {"type": "resp", "host": "cache", "port": 6379}, {"type": "fs_native", "timeout_s": 0.5}],
        ["redis://cache", 1, True, [], {}, {"host": "cache"}, {"type": 1}, {1: 2, "type": "resp"}]
        + [{"type": "resp", "timeout_s": value} for value in (0, -1, INF, NAN, True, None, "2")],
        "lmcache adapter",
    ),
    "snapshot_path": ([None, "/cache/snapshot"], ["", 1, True], "a folder"),
    "snapshot_interval_s": ([None, 60, 0.5], [0, -1, NAN, INF, True, "60"], "seconds above 0"),
    "snapshot_mib_s": ([1, 200.0], [0, -1, NAN, INF, True, None, "60"], "above 0"),
    "audit_fraction": ([0, 1, 0.01], [-0.01, 1.01, NAN, INF, True, "0.1", None], "from 0 to 1"),
    "audit_kl": ([0.1, 1, 1e-6], [0, -1, NAN, INF, True, None, "0.1"], "above 0"),
    "attention": (["auto", "engine", "vlcache", "xformers"], ["", "flash", None, 1, ["engine"]], "one of"),
    "entry_context": (["first", "alone"], ["", "template", None, True, ["first"]], "alone"),
    "min_reuse_tokens": ([1, 64, 10**6], [0, -1, 1.0, 64.5, NAN, INF, True, False, "64", None, [1]], "from 1"),
    "trust_client_uuids": ([True, False], [0, 1, "true", None, [], 1.0], "true or false"),
    "eviction": (list(EVICTION), ["LRU", "", None, 1, True, ["lru"]], "lru"),
    "quotas": (
        [{}, {"kv": 1}, {"kv": 0.5, "embedding": 0.25, "image": 1.0, "tenant": 0.1, "tenant:a b": 0.2, "tenant:": 0.1}],
        [None, 0.5, ["kv"], "kv", {"kv": 0}, {"kv": 1.01}, {"kv": -0.1}, {"kv": NAN}, {"kv": True}, {"kv": "0.5"}],
        "at most 1",
    ),
    "ttl_s": (
        [None, 1, 0.5, 1e9, {}, {"kv": 60, "tenant:a": 0.5}],
        [0, -1, 0.0, NAN, INF, True, "60", ["kv"], {"kv": 0}, {"kv": None}, {"kv": INF}, {"kv": "1"}],
        "seconds above 0",
    ),
    "trace_path": ([None, "trace.jsonl", "/var/log/trace"], ["", 1, True, ["a"]], "path"),
}
BAD = [(name, value, allowed) for name, (_, bad, allowed) in OPTIONS.items() for value in bad]
GOOD = [(name, value) for name, (good, _, _) in OPTIONS.items() for value in good]


def message_of(parse: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        parse()
    return str(caught.value)


# -- options of the connector -----------------------------------------------------------------------------------------


def test_the_tables_of_this_file_know_every_option() -> None:
    assert set(OPTIONS) == {field.name for field in fields(Options)}


def test_an_empty_configuration_gives_the_documented_defaults() -> None:
    assert asdict(Options.parse({})) == {
        "mode": "reuse",
        "policy": "shifted",
        "recompute_ratio": 0.02,
        "recompute_tokens": None,
        "profile": None,
        "host_gib": 4.0,
        "disk_path": None,
        "disk_gib": 64.0,
        "remote": None,
        "snapshot_path": None,
        "snapshot_interval_s": None,
        "snapshot_mib_s": 200.0,
        "min_reuse_tokens": 64,
        "entry_context": "first",
        "audit_fraction": 0.0,
        "audit_kl": 0.1,
        "attention": "auto",
        "trust_client_uuids": False,
        "eviction": "lru",
        "quotas": {},
        "ttl_s": None,
        "trace_path": None,
    }


@pytest.mark.parametrize(("name", "value"), GOOD, ids=repr)
def test_a_valid_value_is_taken_and_changes_nothing_else(name: str, value: Any) -> None:
    assert asdict(Options.parse({name: value})) == {**asdict(Options()), name: value}


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=repr)
def test_a_bad_value_is_an_error_that_names_option_value_and_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    message = message_of(lambda: Options.parse({name: value}))
    assert repr(name) in message
    assert repr(value) in message
    assert allowed in message.partition("allowed:")[2]


def test_the_error_of_a_bad_policy_lists_all_policies() -> None:
    message = message_of(lambda: Options.parse({"policy": "lru"}))
    assert all(repr(name) in message for name in NAMES)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("host_gb", "host_gib"),
        ("recompute_ration", "recompute_ratio"),
        ("Policy", "policy"),
        ("min_reuse_token", "min_reuse_tokens"),
        ("trust_client_uuid", "trust_client_uuids"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_option(key: str, nearest: str) -> None:
    message = message_of(lambda: Options.parse({key: 1}))
    assert repr(key) in message
    assert f"did you mean {nearest!r}?" in message
    assert "kv_connector_extra_config" in message


@pytest.mark.parametrize("option", ["quotas", "ttl_s"])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [("kvs", "kv"), ("embeddings", "embedding"), ("Image", "image"), ("tenants", "tenant"), ("tenant=a", "tenant")],
)
def test_an_unknown_class_is_an_error_that_names_the_nearest(option: str, name: str, nearest: str) -> None:
    message = message_of(lambda: Options.parse({option: {name: 0.5}}))
    assert f"option {option!r} has no class {name!r}; did you mean {nearest!r}?" in message


def test_a_class_that_resembles_nothing_lists_all_classes() -> None:
    message = message_of(lambda: Options.parse({"quotas": {"zzz": 0.5, 1: 0.5}}))
    assert all(name in message for name in (*CLASSES, "tenant:NAME"))


def test_a_key_that_resembles_nothing_lists_all_options() -> None:
    message = message_of(lambda: Options.parse({"zzz": 1}))
    assert all(name in message for name in OPTIONS)


def test_options_cannot_change() -> None:
    with pytest.raises(AttributeError):
        Options().policy = "full"  # type: ignore[misc]


# -- options of one request -------------------------------------------------------------------------------------------


def test_a_request_that_says_nothing_gets_reuse_at_the_engines_ratio() -> None:
    assert RequestOptions.parse(None, ENGINE) == RequestOptions(Mode.REUSE, "full", 0.2)
    assert RequestOptions.parse({}, ENGINE) == RequestOptions(Mode.REUSE, "full", 0.2)


@pytest.mark.parametrize("mode", list(Mode))
def test_each_mode_is_read(mode: Mode) -> None:
    parsed = RequestOptions.parse({"mode": str(mode)}, ENGINE)
    assert parsed == RequestOptions(mode, "full", 0.2)
    assert type(parsed.mode) is Mode


@pytest.mark.parametrize("most", list(Mode))
@pytest.mark.parametrize("asked", [None, *Mode])
def test_no_request_gets_more_than_the_engine_allows(asked: Mode | None, most: Mode) -> None:
    raw = {} if asked is None else {"mode": str(asked)}
    order = ["off", "exact", "reuse"]
    got = RequestOptions.parse(raw, Options(mode=most)).mode
    assert order.index(got) == min(order.index(asked or "reuse"), order.index(most))
    assert type(got) is Mode


@pytest.mark.parametrize("ratio", OPTIONS["recompute_ratio"][0])
def test_a_request_sets_its_own_ratio(ratio: float) -> None:
    parsed = RequestOptions.parse({"recompute_ratio": ratio}, ENGINE)
    assert parsed == RequestOptions(Mode.REUSE, "full", ratio)
    assert type(parsed.recompute_ratio) is float


@pytest.mark.parametrize("mode", ["Reuse", "on", "", None, True, 1, ["reuse"], {"mode": "off"}], ids=repr)
def test_a_bad_mode_is_an_error_that_lists_the_modes(mode: Any) -> None:
    message = message_of(lambda: RequestOptions.parse({"mode": mode}, ENGINE))
    assert "'mode'" in message
    assert repr(mode) in message
    assert all(repr(str(each)) in message.partition("allowed:")[2] for each in Mode)


def test_a_profile_is_read_when_the_options_are(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    message = message_of(lambda: Options.parse({"profile": str(path)}))
    assert repr(str(path)) in message and "vlcache calibrate" in message
    write(path, Profile("ab12", (1.0, 0.5)), {})
    options = Options.parse({"policy": "layered", "profile": str(path)})
    assert RequestOptions.parse({}, options).policy == "layered"
    assert RequestOptions.parse({"policy": "layered"}, Options.parse({"profile": str(path)})).policy == "layered"


def test_layered_needs_a_profile() -> None:
    assert "'profile'" in message_of(lambda: Options.parse({"policy": "layered"}))
    message = message_of(lambda: RequestOptions.parse({"policy": "layered"}, Options()))
    assert "'policy'" in message and "'leading'" in message


def test_a_request_names_a_policy_of_the_package_or_the_engines_own() -> None:
    for name in POLICIES:
        assert RequestOptions.parse({"policy": name}, ENGINE).policy == name


@pytest.mark.parametrize("policy", ["leadin", "os:getcwd", "", None, 1, ["full"]], ids=repr)
def test_a_request_cannot_name_any_other_policy_least_of_all_a_module(policy: Any) -> None:
    message = message_of(lambda: RequestOptions.parse({"policy": policy}, ENGINE))
    assert "'policy'" in message and repr(policy) in message and "'shifted'" in message


LISTS: list[Any] = [[0.1, 0.2], [0.5, -0.1], [], [0.1, True], [0.1, "0"], [NAN], [[0.1]]]


def test_a_request_sets_a_ratio_for_each_layer() -> None:
    parsed = RequestOptions.parse({"policy": "leading", "recompute_ratio": [1, 0.5, 0.5, 0]}, ENGINE)
    assert parsed.recompute_ratio == (1.0, 0.5, 0.5, 0.0)


@pytest.mark.parametrize("ratio", LISTS, ids=repr)
def test_a_list_of_ratios_that_rises_or_holds_anything_else_is_an_error(ratio: Any) -> None:
    message = message_of(lambda: RequestOptions.parse({"policy": "leading", "recompute_ratio": ratio}, ENGINE))
    assert "'recompute_ratio'" in message and repr(ratio) in message and "none above the one before" in message


@pytest.mark.parametrize("policy", ["deviation", "scored"])
def test_policies_that_choose_in_the_pass_take_one_ratio(policy: str) -> None:
    message = message_of(lambda: RequestOptions.parse({"policy": policy, "recompute_ratio": [0.1]}, ENGINE))
    assert "'recompute_ratio'" in message and "list" not in message


@pytest.mark.parametrize("ratio", [bad for bad in OPTIONS["recompute_ratio"][1] if bad != [0.1]], ids=repr)
def test_a_bad_ratio_of_a_request_is_an_error(ratio: Any) -> None:
    message = message_of(lambda: RequestOptions.parse({"recompute_ratio": ratio}, ENGINE))
    assert "'recompute_ratio'" in message
    assert repr(ratio) in message
    assert "from 0 to 1" in message


@pytest.mark.parametrize("name", ["explain", "at_any_cost"])
def test_what_a_request_switches_on_is_off_unless_it_says_so(name: str) -> None:
    assert getattr(RequestOptions.parse({}, ENGINE), name) is False
    assert getattr(RequestOptions.parse({name: True}, ENGINE), name) is True
    for bad in (1, "true", None):
        message = message_of(lambda bad=bad: RequestOptions.parse({name: bad}, ENGINE))  # type: ignore[misc]
        assert repr(name) in message and repr(bad) in message


@pytest.mark.parametrize("raw", ["reuse", 1, True, [], ["mode"], 0.5], ids=repr)
def test_anything_but_an_object_is_an_error(raw: Any) -> None:
    message = message_of(lambda: RequestOptions.parse(raw, ENGINE))
    assert repr(raw) in message
    assert 'kv_transfer_params["vlcache"]' in message


def test_an_unknown_key_of_a_request_is_an_error_that_names_the_nearest() -> None:
    message = message_of(lambda: RequestOptions.parse({"modes": "off"}, ENGINE))
    assert "'modes'" in message
    assert "did you mean 'mode'?" in message
    assert 'kv_transfer_params["vlcache"]' in message


def test_option_errors_are_value_errors() -> None:
    assert issubclass(OptionError, ValueError)
