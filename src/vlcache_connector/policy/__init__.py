"""Policies: how much of a span is recomputed, and which of its tokens. Pure functions of plain data.

A new policy is one module with a subclass of `Policy`, and one row here. One of your own stays outside of this package:
the option names it as `module:Class`, see `custom`.
"""

from collections.abc import Mapping
from functools import cache

from vlcache_connector.errors import OptionError
from vlcache_connector.policy.base import Choice, Policy
from vlcache_connector.policy.custom import load
from vlcache_connector.policy.deviation import Deviation
from vlcache_connector.policy.full import Full
from vlcache_connector.policy.layered import Layered
from vlcache_connector.policy.leading import Leading
from vlcache_connector.policy.none import NoRecompute
from vlcache_connector.policy.profile import read
from vlcache_connector.policy.scored import Scored
from vlcache_connector.policy.shifted import Shifted

POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (Deviation(), Full(), Leading(), NoRecompute(), Scored(), Shifted())
}
"""Those that need no option of their own."""
NAMES = (*POLICIES, Layered.name)

__all__ = ["NAMES", "POLICIES", "Choice", "Policy", "policies_of"]


@cache
def policies_of(policy: str, profile: str | None) -> Mapping[str, Policy]:
    """What an engine's requests may name: the policies of the package, `layered` where the option `profile` names one,
    and the engine's own `policy`. Raises `OptionError` for what cannot be loaded.
    """
    found = dict(POLICIES)
    if profile is not None:
        found[Layered.name] = Layered(read(profile))
    elif policy == Layered.name:
        raise OptionError("option 'policy' is 'layered', which needs option 'profile': `vlcache calibrate` makes one")
    return found if policy in found else {**found, policy: load(policy)}
