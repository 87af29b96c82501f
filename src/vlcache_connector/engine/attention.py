"""Lets the engine's attention layers see a virtual batch: the metadata that the model runner would build for it, or an
attention of our own for some or all of its tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vlcache_connector.engine.pass_impl import KVWritten, PassImpl, Share, Shares, replaced
from vlcache_connector.errors import OptionError
from vlcache_connector.exec.attention import PASS_ATTENTION, PassAttention, SparseQueryAttention
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
        attention: str,
    ) -> None:
        self._vllm_config = vllm_config
        self._layer_names = tuple(layer_names)
        self._device = pages.device
        layers = vllm_config.compilation_config.static_forward_context
        self._layers: list[Any] = [layers[name] for name in self._layer_names]
        self.max_rows = max(vllm_config.scheduler_config.max_num_seqs, _MIN_ROWS)
        backend = self._layers[0].get_attn_backend()
        self._can_end_early = not backend.forward_includes_kv_cache_update
        sized = _with_rows(vllm_config, self.max_rows)
        self._builder = backend.get_builder_cls()(spec, list(self._layer_names), sized, pages.device)
        fuses = bool(vllm_config.compilation_config.pass_config.fuse_attn_quant)
        self._own, self._owns_all = _own_attention(attention, self._layers[0], pages, fuses), attention != "auto"

    @contextmanager
    def __call__(
        self,
        batch: VirtualBatch,
        fresh_kv: FreshKV | None = None,
        queries: Queries | None = None,
        kv_only: int | None = None,
    ) -> Iterator[None]:
        """The context of one pass."""
        shares = self._shares_of(batch)
        metadata = self._engine_metadata(shares.engine.batch) if shares.engine is not None else batch
        last = kv_only if self._can_end_early else None
        with ExitStack() as opened:
            opened.enter_context(
                set_forward_context(
                    dict.fromkeys(self._layer_names, metadata),
                    self._vllm_config,
                    num_tokens=batch.num_tokens,
                    slot_mapping=dict.fromkeys(self._layer_names, batch.slots),
                )
            )
            for number, layer in enumerate(self._layers):
                if shares.own is not None or fresh_kv is not None or queries is not None or number == last:
                    impl = PassImpl(layer.impl, number, shares, self._own, fresh_kv, queries, number == last)
                    opened.enter_context(replaced(layer, impl))
            opened.enter_context(suppress(KVWritten))
            yield

    def _shares_of(self, batch: VirtualBatch) -> Shares:
        everything = Share(batch, None)
        if self._own is None:
            return Shares(everything, None)
        scattered = batch.scattered
        if self._owns_all or bool(scattered.all()):
            return Shares(None, everything)
        if not scattered.any():
            return Shares(everything, None)
        engine, own = (
            Share(batch.narrowed(keep), keep.nonzero()[:, 0].to(self._device)) for keep in (~scattered, scattered)
        )
        return Shares(engine, own)

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


def _with_rows(vllm_config: "VllmConfig", max_rows: int) -> "VllmConfig":
    """A copy by which a backend makes its buffers large enough for passes of so many rows."""
    sized, scheduler = copy(vllm_config), copy(vllm_config.scheduler_config)
    scheduler.max_num_seqs, sized.scheduler_config = max_rows, scheduler
    return sized


def _own_attention(attention: str, layer: Any, pages: Pages, quantises_output: bool) -> PassAttention | None:
    """What computes attention besides the engine, by the value of the option. All of them know the scaled dot product
    with a causal mask and a soft cap, nothing else.
    """
    if attention == "engine" or (attention == "auto" and not SparseQueryAttention.is_faster(pages)):
        return None
    impl = layer.impl
    unknown = {
        "updates the KV cache inside attention": layer.get_attn_backend().forward_includes_kv_cache_update,
        "uses ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "uses attention sinks": getattr(impl, "sinks", None) is not None,
        "quantises queries": layer.query_quant is not None,
        "quantises what attention gives": quantises_output,
    }
    found = next((what for what, applies in unknown.items() if applies), None)
    if attention == "auto":
        return SparseQueryAttention(pages) if found is None else None
    if found is not None:
        raise OptionError(f"option 'attention' is {attention!r}, but this engine {found}; choose 'engine'")
    return PASS_ATTENTION[attention](pages)
