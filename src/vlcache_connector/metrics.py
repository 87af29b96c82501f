"""Names of everything that is counted, in one place, and the counters that the two sides of the connector fill.

Only `engine/stats.py` talks to Prometheus; there each name gets the prefix `vllm:vlcache_`.
"""

from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, slots=True)
class Metric:
    help: str
    label: str | None = None


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
    "failures": Metric("Errors inside the connector; each ended as ordinary computation.", "stage"),
}


class Counters:
    """Counts since the last `take`, from any thread."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._lock = Lock()

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        assert (METRICS[name].label is None) == (label == ""), f"metric {name!r} with label {label!r}"
        key = f"{name}:{label}" if label else name
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value

    def take(self) -> dict[str, float]:
        """All counts as `name` or `name:label`, and start again from zero."""
        with self._lock:
            values, self._values = self._values, {}
        return values
