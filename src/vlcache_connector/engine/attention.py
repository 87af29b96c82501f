"""Lets the engine's attention layers see a virtual batch: the metadata that the model runner would build for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vlcache_connector.exec.batch import VirtualBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


class AttentionContexts:
    """Opens forward contexts for recompute passes. Works with every backend that does paged prefill of varied
    lengths.
    """

    def __init__(
        self, vllm_config: "VllmConfig", spec: "KVCacheSpec", layer_names: Sequence[str], device: torch.device
    ) -> None:
        self._vllm_config = vllm_config
        self._layer_names = tuple(layer_names)
        self._device = device
        first: Any = vllm_config.compilation_config.static_forward_context[self._layer_names[0]]
        builder_class = first.get_attn_backend().get_builder_cls()
        self._builder = builder_class(spec, list(self._layer_names), vllm_config, device)

    @contextmanager
    def __call__(self, batch: VirtualBatch) -> Iterator[None]:
        """The context of one pass. Layers run eagerly in it, also when the engine compiles its model."""
        start = batch.query_start_loc.to(self._device)
        common = CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=batch.query_start_loc,
            seq_lens=batch.seq_lens.to(self._device),
            seq_lens_cpu_upper_bound=batch.seq_lens,
            num_reqs=len(batch.rows),
            num_actual_tokens=batch.num_tokens,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slots,
            causal=True,
        )
        metadata = self._builder.build(0, common)
        with set_forward_context(
            dict.fromkeys(self._layer_names, metadata),
            self._vllm_config,
            num_tokens=batch.num_tokens,
            slot_mapping=dict.fromkeys(self._layer_names, batch.slots),
            skip_compiled=True,
        ):
            yield
