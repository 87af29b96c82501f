"""Names of everything that is measured, in one place, and the measurements that the two sides of the connector make.

Only `engine/stats.py` talks to Prometheus; there each name gets the prefix `vllm:vlcache_`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    help: str
    label: str | None = None
    kind: str = "counter"  # or "gauge", of which the latest value counts, or "histogram"
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram


Measured = dict[str, float | list[float]]
"""By `name` or `name:label`: what a counter has counted, what a gauge says, or all observations for a histogram."""

_NATS = (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


METRICS: dict[str, Metric] = {
    "hits": Metric("Requests that reused stored KV."),
    "declines": Metric("Requests with media that were left to the engine.", "reason"),
    "reused_tokens": Metric("Prompt tokens whose KV came from an entry."),
    "recomputed_tokens": Metric("Prompt tokens run through the layers by the recompute pass."),
    "passes": Metric("Recompute passes."),
    "loaded_bytes": Metric("Bytes of KV copied from the host tier into pages."),
    "saved_bytes": Metric("Bytes copied from the device into the host tier.", "part"),
    "saved_entries": Metric("Entries written to the host tier.", "part"),
    "compiled_entries": Metric("Entries computed while the engine was idle."),
    "dropped_saves": Metric("Entries that were not written.", "reason"),
    "loaded_embeddings": Metric("Encoder outputs taken from the host tier instead of running the encoder."),
    "read_entries": Metric("Entries brought up into the host tier.", "tier"),
    "read_bytes": Metric("Bytes brought up into the host tier, verified.", "tier"),
    "read_seconds": Metric("Seconds that this took, all threads together.", "tier"),
    "dropped_reads": Metric("Entries that could not be brought up, because the host tier had no room."),
    "lost_entries": Metric("Entries that a tier below could not give back: gone, damaged or foreign.", "tier"),
    "written_entries": Metric("Entries written to a tier below.", "tier"),
    "written_bytes": Metric("Bytes written to a tier below.", "tier"),
    "written_seconds": Metric("Seconds that this took.", "tier"),
    "dropped_writes": Metric("Entries that were not written to the tiers below.", "reason"),
    "asked_entries": Metric("Entries that a shared tier was asked for, and whether it had them.", "answer"),
    "asked_seconds": Metric("Seconds that asking took.", "tier"),
    "tier_failures": Metric("Operations that a shared tier failed at, by tier and kind.", "failure"),
    "tier_retries": Metric("Operations of a shared tier that were tried once more.", "tier"),
    "tier_breaker": Metric("How often a shared tier was given up (opened) and came back (closed).", "change"),
    "evictions": Metric("Entries evicted from the host tier.", "reason"),
    "audits": Metric("Reused requests that were computed in full as well, to compare."),
    "audit_disagreements": Metric("Audits in which the likeliest first token was another one."),
    "dropped_audits": Metric("Audits that were not carried out.", "reason"),
    "drift_kl": Metric("KL divergence of the first token from full computation, in nats.", None, "histogram", _NATS),
    "drift_kv": Metric("Relative L2 distance of reused KV from full computation, sum over audits.", "layer"),
    "recompute_ratio": Metric("Default share of tokens recomputed; 1 while drift keeps reuse off.", None, "gauge"),
    "failures": Metric("Errors inside the connector; each ended as ordinary computation.", "stage"),
}


class Counters:
    """Measurements since the last `take`, from any thread."""

    def __init__(self) -> None:
        self._values: Measured = {}
        self._lock = Lock()

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Count."""
        self._merge("counter", name, value, label)

    def set(self, name: str, value: float) -> None:
        """Say what a gauge shows from now on."""
        self._merge("gauge", name, value, "")

    def observe(self, name: str, value: float) -> None:
        """One observation for a histogram."""
        self._merge("histogram", name, [value], "")

    def take(self) -> Measured:
        """All measurements; start again with none."""
        with self._lock:
            values, self._values = self._values, {}
        return values

    def _merge(self, kind: str, name: str, value: float | list[float], label: str) -> None:
        metric = METRICS[name]
        assert metric.kind == kind, f"metric {name!r} is a {metric.kind}"
        assert (metric.label is None) == (label == ""), f"metric {name!r} with label {label!r}"
        with self._lock:
            merge(self._values, {f"{name}:{label}" if label else name: value})


def merge(into: Measured, later: Mapping[str, Any]) -> None:
    """Add the measurements of a later interval, or of another rank in the same one."""
    for key, value in later.items():
        kind = METRICS[key.partition(":")[0]].kind
        before: Any = into.get(key)
        into[key] = value if kind == "gauge" or before is None else before + value
