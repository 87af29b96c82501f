"""Takes the counters of both sides to vLLM's own log line and /metrics."""

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vlcache_connector.metrics import METRICS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:vlcache_"


class VLCacheStats(KVConnectorStats):
    """Counts of one interval, as `name` or `name:label`."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"vlcache {key}": value for key, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class VLCachePromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter per name in `METRICS`."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._metrics = {
            name: make(
                name=PREFIX + name,
                documentation=metric.help,
                labelnames=labelnames + ([metric.label] if metric.label else []),
            )
            for name, metric in METRICS.items()
        }
        for name, metric in METRICS.items():
            if metric.label is None:  # counters without a label of their own show up as 0 from the start
                for values in per_engine_labelvalues.values():
                    self._metrics[name].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition(":")
            labels = self.per_engine_labelvalues[engine_idx] + ([label] if label else [])
            self._metrics[name].labels(*labels).inc(value)
