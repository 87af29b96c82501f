"""Policies: how much of a span is recomputed, and which of its tokens. Pure functions of plain data.

A new policy is one module with a class that has the shape of `base.Policy`, and one row here.
"""

from vlcache_connector.policy.base import Policy
from vlcache_connector.policy.full import Full
from vlcache_connector.policy.leading import Leading
from vlcache_connector.policy.none import NoRecompute
from vlcache_connector.policy.shifted import Shifted

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Full(), Leading(), NoRecompute(), Shifted())}

__all__ = ["POLICIES", "Policy"]
