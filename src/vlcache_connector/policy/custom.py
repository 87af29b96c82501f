"""Policies from outside of this package: the option `policy` names them as `module:Class`.

The module must be importable wherever the engine runs: installed, or in a folder of PYTHONPATH.
"""

from importlib import import_module
from itertools import pairwise

from vlcache_connector.errors import OptionError
from vlcache_connector.policy.base import Policy

_TRIED_LENGTHS, _TRIED_RATIOS = (1, 2, 64, 1000), (0.0, 0.05, 0.5, 1.0)


def load(path: str) -> Policy:
    """An instance of the class at `path`, made without arguments. Raises `OptionError` when there is none, or when what
    it chooses is not what `Policy.recompute` promises.
    """
    module, _, name = path.partition(":")
    try:
        policy: Policy = getattr(import_module(module), name)()
        problem = _problem_of(policy)
    except Exception as error:  # whatever a module of the user's raises
        raise OptionError(
            f"option 'policy' is {path!r}, which does not load: {type(error).__name__}: {error}"
        ) from error
    if problem is not None:
        raise OptionError(f"option 'policy' is {path!r}: {problem}")
    return policy


def _problem_of(policy: Policy) -> str | None:
    """What is wrong with the policy, or with its choices for a few spans."""
    if not isinstance(policy, Policy):
        return "it does not inherit from vlcache_connector.policy.Policy"
    if not isinstance(policy.name, str):
        return "its name is not a string"
    if not isinstance(policy.shifts, bool):
        return f"shifts is {policy.shifts!r}, expected true or false"
    for length in _TRIED_LENGTHS:
        for ratio in _TRIED_RATIOS:
            runs = policy.recompute(length, ratio, range(min(length, 2)))
            edges = [edge for run in runs for edge in (run.start, run.end)]
            is_sorted = all(a.end <= b.start for a, b in pairwise(runs))
            if not is_sorted or not all(len(run) for run in runs) or not all(0 <= edge <= length for edge in edges):
                return f"recompute({length}, {ratio}) gives {runs}: not sorted, disjoint, non-empty runs in the span"
    return None
