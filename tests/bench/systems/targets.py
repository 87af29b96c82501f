"""What only the targets ask for: what a new picture costs, how a hit grows under a fixed budget, what a look-up takes.

The others are in the results of `sizes`; `verdicts` puts all of them together.
"""

from __future__ import annotations

from typing import Any

from bench.engine import VariantError
from bench.results import say
from bench.systems import cold, growth, lookups
from bench.systems.records import Budget

# The last one takes what time the others leave.
MEASURED = {"lookups": lookups.measure, "growth": growth.measure, "cold": cold.measure}


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """What was measured before or after a failure stays."""
    found: dict[str, Any] = {"failures": []}
    for name, one in MEASURED.items():
        try:
            found[name] = one(is_quick, budget)
        except (VariantError, RuntimeError, TimeoutError, AssertionError) as error:
            found["failures"].append(f"{name}: {error}")
            say(f"  FAILED, {found['failures'][-1]}")
    return found
