"""Counters on their way to /metrics: intervals of several ranks add up, and so do those of several API servers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, multiprocess

from vlcache_connector.engine.stats import VLCacheStats

SERVER = """
import sys
from types import SimpleNamespace
from prometheus_client import Counter, Gauge, Histogram
from vlcache_connector.engine.stats import VLCachePromMetrics

config, kinds = SimpleNamespace(kv_transfer_config=None), {kind: kind for kind in (Counter, Gauge, Histogram)}
metrics = VLCachePromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
for engine, count in enumerate(map(int, sys.argv[1:])):
    metrics.observe({"hits": count, "declines:miss": 10 * count}, engine)
    metrics.observe({"drift_kl": [0.02, float(count)], "recompute_ratio": 0.05 * count}, engine)
"""


def test_intervals_of_several_ranks_add_up() -> None:
    first, second = VLCacheStats({"hits": 1, "declines:miss": 2}), VLCacheStats({"hits": 3, "passes": 4})
    total = first.aggregate(second)
    assert total.reduce() == {"vlcache declines:miss": 2, "vlcache hits": 4, "vlcache passes": 4}
    total = total.aggregate(VLCacheStats({"drift_kl": [0.1, 0.3], "recompute_ratio": 0.2}))
    assert total.reduce()["vlcache drift_kl"] == pytest.approx(0.2) and total.reduce()["vlcache recompute_ratio"] == 0.2
    total.reset()
    assert total.is_empty()


def test_counts_of_several_api_servers_and_engines_add_up(tmp_path: Path) -> None:
    """As with `--api-server-count`: each process has its own counters, whichever answers /metrics shows all."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER, *arguments], env=environment)
        for arguments in (("1", "2"), ("30", "40"))
    ]
    assert [server.wait() for server in servers] == [0, 0]
    registry = CollectorRegistry()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        for engine, counts in (("0", (1, 30)), ("1", (2, 40))):
            total = sum(counts)
            labels = {"model_name": "m", "engine": engine}
            assert registry.get_sample_value("vllm:vlcache_hits_total", labels) == total
            declines = registry.get_sample_value("vllm:vlcache_declines_total", labels | {"reason": "miss"})
            assert declines == 10 * total
            assert registry.get_sample_value("vllm:vlcache_recomputed_tokens_total", labels) == 0, (
                "shown before it counts"
            )
            small = registry.get_sample_value("vllm:vlcache_drift_kl_bucket", labels | {"le": "0.03"})
            assert (small, registry.get_sample_value("vllm:vlcache_drift_kl_count", labels)) == (2, 4)
            ratio = registry.get_sample_value("vllm:vlcache_recompute_ratio", labels)
            assert ratio in [0.05 * count for count in counts], "that of one of them, not their sum"
