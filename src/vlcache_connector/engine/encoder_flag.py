"""One flag for KV and encoder: the KV connector also configures the encoder connector.

The scheduler creates the KV connector before it looks at `ec_transfer_config`; the worker creates its encoder
connector long before the KV connector, so on that side it is created here. Both sides must agree, or the scheduler
would promise embeddings that no worker can deliver: where the worker side cannot take part (vLLM's V2 model runner
fixes its encoder connector when it is built), neither side is configured, and reuse needs `--ec-transfer-config` as
well.
"""

from typing import TYPE_CHECKING

from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer import ensure_ec_transfer_initialized
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

CONNECTOR = "VLCacheECConnector"
MODULE = "vlcache_connector"


def share_encoder_connector(vllm_config: "VllmConfig", is_worker: bool) -> None:
    """Set `ec_transfer_config` unless the user did."""
    if vllm_config.ec_transfer_config is None:
        if vllm_config.use_v2_model_runner:
            logger.warning(
                "VLCache: this engine uses vLLM's V2 model runner; add --ec-transfer-config "
                '\'{"ec_connector": "%s", "ec_connector_module_path": "%s", "ec_role": "ec_both"}\' to reuse images, '
                "or set VLLM_USE_V2_MODEL_RUNNER=0",
                CONNECTOR,
                MODULE,
            )
            return
        assert vllm_config.kv_transfer_config is not None
        vllm_config.ec_transfer_config = ECTransferConfig(
            ec_connector=CONNECTOR,
            ec_connector_module_path=MODULE,
            ec_role="ec_both",
            ec_connector_extra_config=dict(vllm_config.kv_transfer_config.kv_connector_extra_config),
        )
    elif vllm_config.ec_transfer_config.ec_connector != CONNECTOR:
        logger.warning(
            "VLCache reuses no KV of images: the encoder connector is %s, so encoder outputs are not stored; "
            "remove --ec-transfer-config",
            vllm_config.ec_transfer_config.ec_connector,
        )
    if is_worker:
        ensure_ec_transfer_initialized(vllm_config)
