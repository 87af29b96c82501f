"""Profiles: how the layers of a model share what the policy `layered` may recompute. Made by `vlcache calibrate`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlcache_connector.errors import OptionError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """`shares`: tokens that each layer recomputes, in proportion; none is above the one before, the first is above 0.
    `model`: hex digits that stand for the weights and their configuration.
    """

    model: str
    shares: tuple[float, ...]

    def ratios(self, ratio: float) -> tuple[float, ...]:
        """For each layer; their mean is `ratio`, as far as layers with a share above 0 can take it."""
        wanted = ratio * len(self.shares)
        for num_full in range(len(self.shares)):
            rest = sum(self.shares[num_full:])
            if not rest:
                break
            scale = max(0.0, wanted - num_full) / rest
            if scale * self.shares[num_full] <= 1:
                return (1.0,) * num_full + tuple(scale * share for share in self.shares[num_full:])
        return tuple(float(share > 0) for share in self.shares)


def write(path: Path, profile: Profile, measured: Mapping[str, Any]) -> None:
    """Write a profile; `measured` says how it was found, for people. Raises `OSError`."""
    content = {"version": VERSION, "model": profile.model, "shares": list(profile.shares), "measured": dict(measured)}
    path.write_text(json.dumps(content, indent=2) + "\n")


def read(path: str) -> Profile:
    """Raises `OptionError` when there is no profile at `path`, or a damaged one."""
    try:
        content = json.loads(Path(path).read_text())
        problem = _problem_of(content)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"it cannot be read: {error}"
    if problem is not None:
        raise OptionError(f"option 'profile' is {path!r}: {problem}. `vlcache calibrate` makes one.")
    return Profile(content["model"], tuple(map(float, content["shares"])))


def _problem_of(content: Any) -> str | None:
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return f"it is no profile of version {VERSION}"
    if not isinstance(content.get("model"), str):
        return "it does not say of which model it is"
    shares = content.get("shares")
    if not isinstance(shares, Sequence) or not shares or not all(map(_is_share, shares)):
        return "its shares are not a list of numbers from 0"
    if shares[0] <= 0 or any(b > a for a, b in pairwise(shares)):
        return "its shares do not go down from one above 0: a token that one layer leaves out has nothing for the next"
    return None


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
