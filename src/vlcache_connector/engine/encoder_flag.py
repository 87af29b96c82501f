"""One flag for KV and encoder: the KV connector also configures the encoder connector.

The scheduler creates the KV connector before it looks at `ec_transfer_config`; the worker creates its encoder connector
long before the KV connector, so on that side it is created here. Both sides must agree, or the scheduler would promise
embeddings that no worker can deliver: where an encoder connector cannot take part, neither side is configured.
"""

from typing import TYPE_CHECKING

from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer import ensure_ec_transfer_initialized

from vlcache_connector.engine.live import give_encoder_connector

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

CONNECTOR = "VLCacheECConnector"
MODULE = "vlcache_connector"


def encoder_reason(vllm_config: "VllmConfig") -> str | None:
    """Why encoder outputs cannot be stored beside KV in this engine; None when they can."""
    config = vllm_config.ec_transfer_config
    if getattr(vllm_config.model_config.multimodal_config, "is_multimodal_pruning_enabled", bool)():
        return "tokens of videos are pruned; leave --video-pruning-rate out"
    if config is not None and config.ec_connector != CONNECTOR:
        return f"the encoder connector is {config.ec_connector}; remove --ec-transfer-config"
    return None


def share_encoder_connector(vllm_config: "VllmConfig", flag: "KVTransferConfig", is_worker: bool) -> None:
    """Set `ec_transfer_config` unless the user did, with the options of the `flag`; on the worker's side, create the
    connector. `vllm_config` is the engine's own: of a copy nothing would be seen.
    """
    if encoder_reason(vllm_config) is not None:
        return
    if vllm_config.ec_transfer_config is None:
        vllm_config.ec_transfer_config = ECTransferConfig(
            ec_connector=CONNECTOR,
            ec_connector_module_path=MODULE,
            ec_role="ec_both",
            ec_connector_extra_config=dict(flag.kv_connector_extra_config),
        )
    if is_worker:
        ensure_ec_transfer_initialized(vllm_config)
        give_encoder_connector(vllm_config)
