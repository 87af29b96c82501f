"""How a soak is run: its size, and the server that it needs."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soak import journal

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    requests: int = 10_000
    scenes: int = 300
    pictures: int = 48
    seed: int = 0
    host_mib: float = 12.0
    disk_mib: float = 0.0  # 0: no disk tier
    blocks: int = 60
    fault_rate: float = 0.01
    audit_share: float = 1.0
    family: str = "qwen2_5_vl"
    folder: str = "out/soak"

    @property
    def is_long(self) -> bool:
        """Whether what is rare must have happened."""
        return self.requests >= 1000

    @property
    def hits_every_site(self) -> bool:
        """Whether a fault must have been planted at each site; the rarest is reached once in five requests."""
        return self.requests * self.fault_rate >= 50

    def arguments(self) -> list[str]:
        """Of `vllm serve`. Few blocks, so that requests push each other out; small steps, so that reuse is cut."""
        tiers: dict[str, object] = {"host_gib": self.host_mib / 1024}
        if self.disk_mib:
            tiers |= {"disk_path": str(Path(self.folder).absolute() / "disk"), "disk_gib": self.disk_mib / 1024}
        transfer = {
            "kv_connector": "VLCacheConnector",
            "kv_connector_module_path": "soak.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": tiers | {"min_reuse_tokens": 16},
        }
        limits = {
            "--max-model-len": 1536,
            "--block-size": 32,
            "--num-gpu-blocks-override": self.blocks,
            "--max-num-seqs": 8,
            "--max-num-batched-tokens": 256,
            "--limit-mm-per-prompt": json.dumps({"image": 6, "video": 0}),
            "--mm-processor-cache-gb": 0.05,
            "--dtype": "float32",
            "--kv-transfer-config": json.dumps(transfer),
        }
        return [
            "--enforce-eager",
            "--disable-uvicorn-access-log",
            "--no-scheduler-reserve-full-isl",  # so that running requests are pushed out in mid-prefill
            *(str(word) for pair in limits.items() for word in pair),
        ]

    def environment(self) -> dict[str, str]:
        return {
            journal.FOLDER: str(Path(self.folder).absolute()),
            journal.SEED: str(self.seed),
            journal.FAULT_RATE: str(self.fault_rate),
            journal.AUDIT_SHARE: str(self.audit_share),
            journal.HAS_DISK: "1" if self.disk_mib else "0",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", "")))),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
            # One thread, free to move: threads that wait for each other spin, and beside other work they wait long.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[None]:
        before = os.environ.copy()
        os.environ.update(self.environment())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
