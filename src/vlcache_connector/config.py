"""Options of the connector (`kv_connector_extra_config`) and of one request (`kv_transfer_params["vlcache"]`)."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from vlcache_connector.errors import OptionError
from vlcache_connector.policy import NAMES, policies_of
from vlcache_connector.types import KINDS, MODALITIES, Mode, Ratio

ATTENTION = ("auto", "engine", "vlcache", "xformers")
EVICTION = ("lru", "cost")
CONTEXTS = ("first", "alone")
DEFAULT_POLICY, DEFAULT_RATIO = "shifted", 0.02
CLASSES = (*KINDS, *MODALITIES, "tenant")
"""Classes of entries that limits are for; besides these, "tenant:NAME" is the tenant with this cache_salt."""


@dataclass(frozen=True, slots=True)
class Options:
    """All options of the connector. An empty dictionary is a valid configuration."""

    mode: Mode = Mode.REUSE
    """The most that a request may ask for: "reuse"; "exact"; "off" switches everything off, whatever requests say."""
    policy: str = DEFAULT_POLICY
    """Which tokens of a reused span are recomputed: one of `NAMES`, or "module:Class" of your own."""
    recompute_ratio: float = DEFAULT_RATIO
    """Share of a span's tokens to recompute, in [0, 1]; at least one token is recomputed when it is above 0."""
    recompute_tokens: int | None = None
    """Most tokens of one span to recompute, whatever the ratio; None: no limit. The policy `full` knows none either,
    and `shifted` takes twelve at least."""
    profile: str | None = None
    """File that says how the layers of this model share what is recomputed, for the policy "layered"; made by
    `vlcache calibrate`."""
    host_gib: float = 4.0
    """GiB of host memory for entries, in each worker process."""
    disk_path: str | None = None
    """Folder in which entries are kept as well, also across restarts; several engines can share it. None: no disk."""
    disk_gib: float = 64.0
    """GiB of files in that folder, of all engines that use it together."""
    remote: Mapping[str, Any] | None = None
    """Description of an lmcache L2 adapter, such as {"type": "resp", "host": "cache", "port": 6379}: a store in which
    entries are kept as well, and which engines share. `timeout_s` (2) may stand in it: seconds for one operation."""
    snapshot_path: str | None = None
    """Folder of a snapshot of the host tier: restored at start-up, replaced every `snapshot_interval_s`."""
    snapshot_interval_s: float | None = None
    """Seconds between two snapshots. None: only `vlcache snapshot` writes any."""
    snapshot_mib_s: float = 200.0
    """MiB per second that a snapshot writes at most."""
    min_reuse_tokens: int = 64
    """Smallest number of tokens of known media, reused or recomputed, for which a request is worth touching."""
    entry_context: str = "first"
    """What stands before an image or video when its KV is computed to be kept: "first", what the first request has
    there; "alone", nothing but the token that opens it. That is done when the engine is idle; until then it is not
    known."""
    audit_fraction: float = 0.0
    """Share of reused requests, in [0, 1], that are computed in full as well once the engine is idle, to see how far
    reuse is off."""
    audit_kl: float = 0.1
    """Mean KL divergence (nats) of the first token from full computation above which the default recompute ratio is
    raised and, when that does not help, reuse is switched off."""
    attention: str = "auto"
    """Attention of recompute passes: "engine" for its own; "vlcache" for ours, to which scattered tokens are one
    tile and not sequences each; "auto" for ours where a span's tokens are scattered and that is known to be faster, and
    the engine's otherwise; "xformers" where that package runs."""
    trust_client_uuids: bool = False
    """Accept identifiers of media that vLLM did not make by hashing their content. Only for clients that never give two
    different media the same UUID."""
    eviction: str = "lru"
    """Which entries leave when room is needed: "lru", the least recently used; "cost", those that save the least engine
    time per byte and use."""
    quotas: Mapping[str, float] = field(default_factory=dict)
    """Class -> largest share of a tier's capacity that its entries may fill, above 0 and at most 1."""
    ttl_s: float | Mapping[str, float] | None = None
    """Seconds after which an entry is not found any more; one number, or class -> number."""
    trace_path: str | None = None
    """File in which look-ups, inserts and evictions are recorded, for `vlcache simulate`."""

    def __post_init__(self) -> None:
        _check("mode", self.mode, lambda v: v in list(Mode), f"one of {[str(m) for m in Mode]}")
        object.__setattr__(self, "mode", Mode(self.mode))
        policies = f"one of {sorted(NAMES)} or 'module:Class'"
        _check("policy", self.policy, lambda v: isinstance(v, str) and (v in NAMES or ":" in v), policies)
        _check("profile", self.profile, _is_path, "a file's path")
        policies_of(self.policy, self.profile)
        _check("recompute_ratio", self.recompute_ratio, _is_ratio, "a number from 0 to 1")
        _check("recompute_tokens", self.recompute_tokens, lambda v: v is None or _is_count(v), "a whole number from 1")
        _check("host_gib", self.host_gib, lambda v: _is_number(v) and 0 < v < math.inf, "a number above 0 (GiB)")
        _check("disk_path", self.disk_path, _is_path, "a folder")
        _check("disk_gib", self.disk_gib, lambda v: _is_number(v) and 0 < v < math.inf, "a number above 0 (GiB)")
        _check(
            "remote", self.remote, _is_adapter, 'an object with the "type" of an lmcache adapter, "timeout_s" above 0'
        )
        _check("snapshot_path", self.snapshot_path, _is_path, "a folder")
        _check("snapshot_interval_s", self.snapshot_interval_s, lambda v: v is None or _is_time(v), "seconds above 0")
        _check("snapshot_mib_s", self.snapshot_mib_s, _is_time, "a number above 0 (MiB per second)")
        _check("min_reuse_tokens", self.min_reuse_tokens, _is_count, "a whole number from 1")
        _check("entry_context", self.entry_context, lambda v: v in CONTEXTS, f"one of {list(CONTEXTS)}")
        _check("audit_fraction", self.audit_fraction, _is_ratio, "a number from 0 to 1")
        _check("audit_kl", self.audit_kl, lambda v: _is_number(v) and 0 < v < math.inf, "a number above 0 (nats)")
        _check("attention", self.attention, lambda v: v in ATTENTION, f"one of {list(ATTENTION)}")
        _check("trust_client_uuids", self.trust_client_uuids, lambda v: isinstance(v, bool), "true or false")
        _check("eviction", self.eviction, lambda v: v in EVICTION, f"one of {list(EVICTION)}")
        shares = "an object of classes and shares, above 0 and at most 1"
        _check("quotas", self.quotas, lambda v: _has_values(v, lambda s: _is_ratio(s) and s > 0), shares)
        seconds = "seconds above 0, or an object of classes and seconds"
        _check("ttl_s", self.ttl_s, lambda v: v is None or _is_time(v) or _has_values(v, _is_time), seconds)
        for name, limits in (("quotas", self.quotas), ("ttl_s", self.ttl_s)):
            if isinstance(limits, Mapping):
                plain = [key for key in limits if not str(key).startswith("tenant:")]
                _check_keys(f"option {name!r}", plain, [*CLASSES, "tenant:NAME"], "class")
        _check("trace_path", self.trace_path, _is_path, "a file's path")

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Options":
        """Options from vLLM's extra config. Raises `OptionError` for an unknown key or a bad value."""
        _check_keys("kv_connector_extra_config", raw, [f.name for f in fields(cls)])
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request asked for."""

    mode: Mode = Mode.REUSE
    policy: str = DEFAULT_POLICY
    recompute_ratio: Ratio = DEFAULT_RATIO
    """A number, or a list with one for each layer, none above the one before."""
    explain: bool = False
    """Whether the response carries the plan as well."""
    at_any_cost: bool = False
    """Whether to reuse also what would be cheaper to compute, by the engine's prices."""

    @classmethod
    def parse(cls, raw: Any, engine: Options) -> "RequestOptions":
        """From the value of `kv_transfer_params["vlcache"]`, None when absent. The engine's options are the defaults,
        and its mode is the most that a request gets. Raises `OptionError`.
        """
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping):
            raise OptionError(f'kv_transfer_params["vlcache"] is {raw!r}; expected an object with "mode"')
        _check_keys('kv_transfer_params["vlcache"]', raw, [f.name for f in fields(cls)])
        mode = raw.get("mode", Mode.REUSE)
        policy = raw.get("policy", engine.policy)
        ratio = raw.get("recompute_ratio", engine.recompute_ratio)
        explain, at_any_cost = raw.get("explain", False), raw.get("at_any_cost", False)
        _check("mode", mode, lambda v: v in list(Mode), f"one of {[str(m) for m in Mode]}")
        policies = policies_of(engine.policy, engine.profile)  # a client must not name modules to import
        known = sorted(policies)
        _check("policy", policy, lambda v: isinstance(v, str) and v in known, f"one of {known}")
        _check("explain", explain, lambda v: isinstance(v, bool), "true or false")
        _check("at_any_cost", at_any_cost, lambda v: isinstance(v, bool), "true or false")
        ratio = _ratio(ratio, takes_list=policies[policy].measure is None)
        return cls(max(Mode(mode), engine.mode, key=list(Mode).index), policy, ratio, explain, at_any_cost)


def _check_keys(where: str, keys: Iterable[Any], known: list[str], noun: str = "option") -> None:
    plural = "classes" if noun == "class" else f"{noun}s"
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known {plural} are {', '.join(known)}"
            raise OptionError(f"{where} has no {noun} {key!r}; {hint}")


def _check(name: str, value: Any, is_valid: Callable[[Any], bool], allowed: str) -> None:
    if not is_valid(value):
        raise OptionError(f"option {name!r} is {value!r}; allowed: {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_ratio(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value <= 1.0


def _ratio(value: Any, takes_list: bool) -> Ratio:
    """Of a request."""
    if takes_list and isinstance(value, list) and value and all(map(_is_ratio, value)) and _goes_down(value):
        return tuple(map(float, value))
    lists = ", or a list with one for each layer, none above the one before" if takes_list else ""
    _check("recompute_ratio", value, _is_ratio, f"a number from 0 to 1{lists}")
    return float(value)


def _goes_down(values: Sequence[float]) -> bool:
    return all(b <= a for a, b in pairwise(values))


def _is_path(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_adapter(value: Any) -> bool:
    if value is None:
        return True
    is_object = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return is_object and isinstance(value.get("type"), str) and _is_time(value.get("timeout_s", 1))


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0.0 < value < math.inf


def _has_values(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(is_valid(each) for each in value.values())
