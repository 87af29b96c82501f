"""Lets the engine's attention layers see a virtual batch: the metadata that the model runner would build for it, or an
attention of our own in place of the engine's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vlcache_connector.errors import OptionError
from vlcache_connector.exec.attention import PASS_ATTENTION, PassAttention
from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.recompute import FreshKV, Queries

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

_MIN_ROWS = 1024
"""Rows that passes may have, also in an engine that batches few requests: single tokens are a row each, and those of a
span should share a pass (`exec.shift`)."""


class AttentionContexts:
    """Opens forward contexts for recompute passes. Works with every backend that does paged prefill of varied
    lengths. Raises `OptionError` when `attention`, a value of the option of that name, cannot serve this engine.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        spec: "KVCacheSpec",
        layer_names: Sequence[str],
        pages: Pages,
        attention: str = "engine",
    ) -> None:
        self._vllm_config = vllm_config
        self._layer_names = tuple(layer_names)
        self._device = pages.device
        layers = vllm_config.compilation_config.static_forward_context
        self._layers: list[Any] = [layers[name] for name in self._layer_names]
        self.max_rows = max(vllm_config.scheduler_config.max_num_seqs, _MIN_ROWS)
        builder_class = self._layers[0].get_attn_backend().get_builder_cls()
        sized = _with_rows(vllm_config, self.max_rows)
        self._builder = builder_class(spec, list(self._layer_names), sized, pages.device)
        self._replacement: PassAttention | None = None
        if attention != "engine":
            _require_plain_attention(self._layers[0], attention)
            self._replacement = PASS_ATTENTION[attention](pages)

    @contextmanager
    def __call__(
        self, batch: VirtualBatch, fresh_kv: FreshKV | None = None, queries: Queries | None = None
    ) -> Iterator[None]:
        """The context of one pass. Layers run eagerly in it, also when the engine compiles its model."""
        metadata = self._engine_metadata(batch) if self._replacement is None else batch
        with ExitStack() as opened:
            opened.enter_context(
                set_forward_context(
                    dict.fromkeys(self._layer_names, metadata),
                    self._vllm_config,
                    num_tokens=batch.num_tokens,
                    slot_mapping=dict.fromkeys(self._layer_names, batch.slots),
                    skip_compiled=True,
                )
            )
            if any(each is not None for each in (self._replacement, fresh_kv, queries)):
                for number, layer in enumerate(self._layers):
                    impl = _PassImpl(layer.impl, number, batch, self._replacement, fresh_kv, queries)
                    opened.enter_context(_replaced(layer, impl))
            yield

    def _engine_metadata(self, batch: VirtualBatch) -> Any:
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
        return self._builder.build(0, common)


class _PassImpl:
    """Stands in for the implementation of an attention layer during a pass: the engine's KV update, which `fresh_kv`
    hears of, and the engine's attention or `attend` in its place, before which `queries` hears.
    """

    def __init__(
        self,
        engine: Any,
        layer: int,
        batch: VirtualBatch,
        attend: PassAttention | None,
        fresh_kv: FreshKV | None,
        queries: Queries | None,
    ) -> None:
        self._engine = engine
        self._layer = layer
        self._batch = batch
        self._attend = attend
        self._fresh_kv = fresh_kv
        self._queries = queries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        self._engine.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self._fresh_kv is not None:
            self._fresh_kv(self._layer, key, value)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> torch.Tensor:
        if self._queries is not None:
            self._queries(self._layer, query)
        if self._attend is None:
            attended: torch.Tensor = self._engine.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *others, **named
            )
            return attended
        num_tokens = self._batch.num_tokens
        soft_cap = self._engine.logits_soft_cap or 0.0
        scale = self._engine.scale
        self._attend(query[:num_tokens], kv_cache, self._batch, scale, soft_cap, output[:num_tokens])
        return output


def _with_rows(vllm_config: "VllmConfig", max_rows: int) -> "VllmConfig":
    """A copy by which a backend makes its buffers large enough for passes of so many rows."""
    sized, scheduler = copy(vllm_config), copy(vllm_config.scheduler_config)
    scheduler.max_num_seqs, sized.scheduler_config = max_rows, scheduler
    return sized


@contextmanager
def _replaced(layer: Any, impl: _PassImpl) -> Iterator[None]:
    engine = layer.impl
    layer.impl = impl
    try:
        yield
    finally:
        layer.impl = engine


def _require_plain_attention(layer: Any, attention: str) -> None:
    """The replacements know scaled dot products with a causal mask and a soft cap, nothing else."""
    impl = layer.impl
    unknown = {
        "updates the KV cache inside attention": layer.get_attn_backend().forward_includes_kv_cache_update,
        "uses ALiBi": impl.alibi_slopes is not None,
        "uses attention sinks": getattr(impl, "sinks", None) is not None,
        "quantises queries": layer.query_quant is not None,
    }
    for what, applies in unknown.items():
        if applies:
            raise OptionError(f"option 'attention' is {attention!r}, but this engine {what}; choose 'engine'")
