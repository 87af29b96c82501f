"""Takes the measurements of both sides to vLLM's own log line and /metrics."""

from statistics import fmean
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vlcache_connector.metrics import METRICS, Metric, merge

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:vlcache_"


class VLCacheStats(KVConnectorStats):
    """What was measured in one interval, see `metrics.Measured`."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Of a histogram, the mean."""
        return {
            f"vlcache {key}": fmean(value) if isinstance(value, list) else value
            for key, value in sorted(self.data.items())
        }

    def is_empty(self) -> bool:
        return not self.data


class VLCachePromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter, gauge or histogram per name in `METRICS`."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {name: _make(name, metric, metric_types, labelnames) for name, metric in METRICS.items()}
        for name, metric in METRICS.items():
            if metric.label is None:  # what has no label of its own shows up as 0 from the start
                for values in per_engine_labelvalues.values():
                    self._metrics[name].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition(":")
            labels = self.per_engine_labelvalues[engine_idx] + ([label] if label else [])
            child = self._metrics[name].labels(*labels)
            if METRICS[name].kind == "counter":
                child.inc(value)
            elif METRICS[name].kind == "gauge":
                child.set(value)
            else:
                for each in value:
                    child.observe(each)


def _make(name: str, metric: Metric, metric_types: dict[Any, Any], labelnames: list[str]) -> Any:
    labels = labelnames + ([metric.label] if metric.label else [])
    common = {"name": PREFIX + name, "documentation": metric.help, "labelnames": labels}
    if metric.kind == "gauge":
        return metric_types[Gauge](multiprocess_mode="mostrecent", **common)
    if metric.kind == "histogram":
        return metric_types[Histogram](buckets=metric.buckets, **common)
    return metric_types[Counter](**common)
