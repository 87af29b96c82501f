"""How the questions are asked: plain, with everything recomputed, and with each policy at each ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlcache_connector.errors import OptionError
from vlcache_connector.policy import NAMES
from vlcache_connector.policy.layered import Layered
from vlcache_connector.types import Ratio

_WITHOUT_RATIO = ("none", "full")
DEFAULT_POLICIES = ("none", "leading", "shifted")
DEFAULT_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to ask. Without a policy it is plain vLLM; some policies know no ratio."""

    policy: str | None = None
    ratio: float | None = None

    @property
    def name(self) -> str:
        if self.policy is None:
            return "plain"
        return self.policy if self.ratio is None else f"{self.policy} {100 * self.ratio:g} %"

    @property
    def options(self) -> dict[str, Any]:
        """The request's `kv_transfer_params["vlcache"]`."""
        if self.policy is None:
            return {"mode": "off"}
        return reuse(self.policy, {"none": 0.0, "full": 1.0}.get(self.policy, self.ratio))


PLAIN = Setting()
FULL = Setting("full")
"""The yardstick: what the other settings are compared with."""


def reuse(policy: str, ratio: Ratio | None) -> dict[str, Any]:
    """A request's `kv_transfer_params["vlcache"]` that has its pictures reused, also where that does not pay, and says
    what became of them.
    """
    value = list(ratio) if isinstance(ratio, tuple) else ratio
    own = {"mode": "reuse", "policy": policy, "recompute_ratio": value}
    return own | {"explain": True, "at_any_cost": True}


def settings_of(policies: Sequence[str], ratios: Sequence[float], has_profile: bool = False) -> list[Setting]:
    """Plain, the yardstick, then each policy at each ratio. Raises `OptionError`; one policy needs a profile."""
    for name in policies:
        if name not in NAMES:
            raise OptionError(f"there is no policy {name!r}; there are {', '.join(NAMES)}")
        if name == Layered.name and not has_profile:
            raise OptionError(
                f'the policy {name!r} needs a profile: --connector \'{{"profile": "profile.json"}}\'; '
                "`vlcache calibrate` makes one"
            )
    found = [PLAIN, FULL]
    for name in policies:
        found += [Setting(name)] if name in _WITHOUT_RATIO else [Setting(name, ratio) for ratio in sorted(ratios)]
    return list(dict.fromkeys(found))


def ratios_of(text: str) -> list[float]:
    """From a list such as "0,0.02,0.05". Raises `OptionError`."""
    ratios = []
    for part in text.split(","):
        try:
            ratio = float(part)
        except ValueError:
            ratio = -1.0
        if not 0.0 <= ratio <= 1.0:
            raise OptionError(f"{part.strip()!r} is no ratio; write numbers from 0 to 1, such as 0.02,0.05")
        ratios.append(ratio)
    return ratios
