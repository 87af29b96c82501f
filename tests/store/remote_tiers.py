"""Remote tiers for tests, over the real lmcache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from vlcache_connector.store.remote.adapter import Adapter
from vlcache_connector.store.remote.interface import missing_interface, parse, require_lmcache
from vlcache_connector.store.remote.link import Link
from vlcache_connector.store.remote.tier import RemoteTier

needs_lmcache = pytest.mark.skipif(
    bool(missing_interface()), reason="lmcache is missing; pip install --no-deps lmcache==0.5.6 sortedcontainers"
)
TIMEOUT_S = 20.0  # long enough for a busy machine, where nothing is to time out


_made: list[RemoteTier] = []


class Counts(Counter[str]):
    def add(self, name: str, value: float, label: str) -> None:
        self[f"{name}:{label}"] += int(value)


def remote_tier(description: Mapping[str, Any], counts: Counts | None = None, world_size: int = 1) -> RemoteTier:
    require_lmcache()
    config, timeout_s = parse({"timeout_s": TIMEOUT_S, **description})
    count = (counts if counts is not None else Counts()).add
    tier = RemoteTier(Link("remote", lambda: Adapter(config, timeout_s), count), world_size, count)
    _made.append(tier)
    return tier


def close_all() -> None:
    while _made:
        _made.pop().close()


def resp(port: int, **settings: Any) -> dict[str, Any]:
    return {"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2, **settings}
