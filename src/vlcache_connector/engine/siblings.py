"""Other KV connectors in the same engine: vLLM's `MultiConnector` makes several, and hands each a copy of the
configuration that does not tell of the others.

A sibling sees the pages that a reuse plan fills, and keeps them under keys of its own. Only where these are the block
hashes that the request has when the block is kept do approximate blocks stay in their namespace (see `namespace`).
Everywhere else reuse of KV is declined. So is saving: what a sibling loads counts as computed, and one that keys by
token ids alone gives an image the KV of another of the same size. Encoder outputs are exact in any case.

Of vLLM's own, `SimpleCPUOffloadConnector` takes the hash of the block itself. `OffloadingConnector` copies a request's
hashes when it is first asked, which may be before they change. LMCache's `LMCacheMPConnector` keys by token ids, with
the image's hash in place of the image's tokens (lmcache 0.5.5 on; 16 bits of the hash in 0.5.4). All others key by
token ids, by request, or are unknown.
"""

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from vlcache_connector.engine.live import callers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEYED_BY_BLOCK = ("SimpleCPUOffloadConnector", "VLCacheConnector")


def register(name: str, module: str) -> None:
    """Make a connector's class known by name: where numbers of its children arrive in the API server, `MultiConnector`
    of vLLM 0.32 looks there alone, and the server ends when it finds nothing.
    """
    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, module, name)


def outer_config(vllm_config: "VllmConfig") -> "VllmConfig":
    """The engine's own configuration, to be asked for while a connector is being made: of the outermost
    `MultiConnector` that is making it, or else the one given.
    """
    config = vllm_config
    for caller in callers():
        if isinstance(caller, MultiConnector):
            config = caller._vllm_config
    return config


def sibling_reason(outer: "VllmConfig") -> str | None:
    """Why KV is not reused beside the connectors of this engine, as a sentence for the log; None when it is."""
    transfer = outer.kv_transfer_config
    children = transfer.kv_connector_extra_config.get("connectors", []) if transfer is not None else []
    others = sorted({str(child.get("kv_connector")) for child in children} - set(KEYED_BY_BLOCK))
    if not others:
        return None
    return f"{', '.join(others)} in the same engine may keep approximate blocks as exact ones"
