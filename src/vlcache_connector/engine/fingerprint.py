"""What must match before stored bytes may stand in for computed ones: model, processor, dtype, KV layout, rank count.

The weights are identified by the headers of their files and by samples of their data, not by reading all of them.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_connector.plan.keys import digest
from vlcache_connector.store.slab import EntryLayout
from vlcache_connector.types import MAX_ORDERED

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SAMPLES = 64
_SAMPLE_NBYTES = 4096


def kv_facts(vllm_config: "VllmConfig", layout: EntryLayout) -> bytes:
    """Canonical description of everything the KV of a media item depends on."""
    parallel = vllm_config.parallel_config
    facts = {
        "layout": repr(layout),
        "ordered": MAX_ORDERED,
        "tensor_parallel": parallel.tensor_parallel_size,
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
    }
    return digest(embedding_facts(vllm_config), _json(facts))


def embedding_facts(vllm_config: "VllmConfig") -> bytes:
    """Canonical description of everything the encoder embedding of a media item depends on."""
    model = vllm_config.model_config
    facts = {
        "model": model.model,
        "revision": model.revision,
        "commit": _commit(model),
        "quantization": model.quantization,
        "dtype": str(model.dtype),
        "config": model.hf_config.to_dict(),
        "mm_processor_kwargs": getattr(model.multimodal_config, "mm_processor_kwargs", None),
    }
    return digest(_json(facts), weights_fingerprint(Path(model.model)))


def model_id(vllm_config: "VllmConfig") -> str:
    """Hex digits that stand for weights and configuration, wherever a checkpoint lies: what a profile is of."""
    model = vllm_config.model_config
    folder, config = Path(model.model), model.hf_config.to_dict()
    where = weights_fingerprint(folder) if folder.is_dir() else _json({"model": model.model, "commit": _commit(model)})
    return digest(_json({key: value for key, value in config.items() if key != "_name_or_path"}), where)[:16].hex()


def are_weights_known(model: Any) -> bool:
    """Whether the facts above tell these weights from any others, also in another process on another day."""
    return Path(model.model).is_dir() or _commit(model) is not None


def _commit(model: Any) -> str | None:
    """Of the hub's repository, when the configuration was loaded from one."""
    commit: str | None = getattr(model.hf_config, "_commit_hash", None)
    return commit


def weights_fingerprint(folder: Path) -> bytes:
    """Digest over the files of a local checkpoint: small ones whole, large ones by size, head and samples.

    A name that is not a folder (a hub id) has no local files; its name and revision identify it.
    """
    h = hashlib.sha256()
    names = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "preprocessor_config.json", "video_preprocessor_config.json")
    for path in sorted(p for pattern in names for p in folder.glob(pattern)):
        size = path.stat().st_size
        h.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            step = max(_SAMPLE_NBYTES, size // _SAMPLES)
            for offset in range(0, size, step):
                file.seek(offset)
                h.update(file.read(_SAMPLE_NBYTES))
    return h.digest()


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, default=str).encode()
