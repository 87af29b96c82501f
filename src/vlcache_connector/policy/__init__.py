"""Policies: how much of a span is recomputed, and which of its tokens. Pure functions of plain data.

A new policy is one module with a class that has the shape of `base.Policy`, and one row here. One of your own stays
outside of this package: the option names it as `module:Class`, see `custom`.
"""

from vlcache_connector.policy.base import Policy
from vlcache_connector.policy.custom import load
from vlcache_connector.policy.full import Full
from vlcache_connector.policy.leading import Leading
from vlcache_connector.policy.none import NoRecompute
from vlcache_connector.policy.shifted import Shifted

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Full(), Leading(), NoRecompute(), Shifted())}

__all__ = ["POLICIES", "Policy", "policy_of"]


def policy_of(option: str) -> Policy:
    """The policy that the option `policy` names. Raises `OptionError` for one that cannot be loaded."""
    return POLICIES[option] if option in POLICIES else load(option)
