"""The stand-in for the implementation of an attention layer during a recompute pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_connector.exec.attention import PassAttention
from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.recompute import FreshKV, Queries


class KVWritten(Exception):  # noqa: N818, it is no error
    """Nothing more is needed of the last layer."""


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of a pass whose attention one implementation computes."""

    batch: VirtualBatch
    at: torch.Tensor | None  # [tokens] int64: where in the pass they are; None: it is all of it

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[: self.batch.num_tokens] if self.at is None else rows[self.at]

    def put(self, rows: torch.Tensor, found: torch.Tensor) -> None:
        if self.at is not None:
            rows[self.at] = found


@dataclass(frozen=True, slots=True)
class Shares:
    """Who computes what of a pass; at least one of them is there."""

    engine: Share | None
    own: Share | None


class PassImpl:
    """Stands in for the implementation of an attention layer during a pass: the engine's KV update, which `fresh_kv`
    hears of, and the attention of the engine and of `own`, before which `queries` hears. Where `is_last`, the pass ends
    there.
    """

    def __init__(
        self,
        engine: Any,
        layer: int,
        shares: Shares,
        own: PassAttention | None,
        fresh_kv: FreshKV | None,
        queries: Queries | None,
        is_last: bool,
    ) -> None:
        self._engine = engine
        self._layer = layer
        self._shares = shares
        self._own = own
        self._fresh_kv = fresh_kv
        self._queries = queries
        self._is_last = is_last

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
        if self._is_last:
            raise KVWritten
        engine, own = self._shares.engine, self._shares.own
        if engine is not None:
            rows, out = (engine.of(each) for each in (query, key, value)), engine.of(output)
            self._engine.forward(layer, *rows, kv_cache, attn_metadata, out, *others, **named)
            engine.put(output, out)
        if own is not None:
            assert self._own is not None
            out = own.of(output)
            soft_cap = self._engine.logits_soft_cap or 0.0
            self._own(own.of(query), kv_cache, own.batch, self._engine.scale, soft_cap, out)
            own.put(output, out)
        return output


@contextmanager
def replaced(layer: Any, impl: PassImpl) -> Iterator[None]:
    engine = layer.impl
    layer.impl = impl
    try:
        yield
    finally:
        layer.impl = engine
