"""`kv_connector_module_path` of the soak: the real connector, with planted faults and auditors around it.

Imported in each process of the engine. Faults go innermost, so that an auditor sees what a fault left behind.
"""

import os
import random
from typing import Any

from soak import audits, faults, journal, notes, state
from vlcache_connector.engine import kv_scheduler
from vlcache_connector.engine.kv_connector import VLCacheConnector
from vlcache_connector.plan import costs

__all__ = ["VLCacheConnector"]

_seed = int(os.environ[journal.SEED])


def _rarely_too_dear(seed: int) -> None:
    """On a tiny model computing is often cheaper than reuse, which would then be declined, and this wants to see it."""
    estimate, dice = costs.estimate, random.Random(f"{seed} estimates")

    def estimating(plan: Any, prices: Any) -> Any:
        return estimate(plan, prices) if dice.random() < 0.05 else None

    setattr(kv_scheduler, "estimate", estimating)  # noqa: B010


faults.plant(_seed, float(os.environ[journal.FAULT_RATE]))
_rarely_too_dear(_seed)
notes.attach()
_auditor = audits.Auditor(_seed, float(os.environ[journal.AUDIT_SHARE]), os.environ[journal.HAS_DISK] == "1")
audits.attach(_auditor)
state.attach(VLCacheConnector, _auditor.spoil)
