"""Policies from outside of this package, named by the option `policy`."""

from pathlib import Path

import pytest

from vlcache_connector.config import Options
from vlcache_connector.errors import OptionError
from vlcache_connector.policy import POLICIES, Policy, policies_of
from vlcache_connector.types import Run

MODULE = """
from vlcache_connector.policy import Policy
from vlcache_connector.types import Run

class Last(Policy):
    name = "last"
    def recompute(self, length, ratio, order=()):
        count = round(ratio * length)
        return (Run(length - count, length),) if count else ()

class Beyond(Last):
    def recompute(self, length, ratio, order=()):
        return (Run(0, length + 1),)

class Unsorted(Last):
    def recompute(self, length, ratio, order=()):
        return (Run(1, 2), Run(0, 1)) if length > 1 else ()

class Empty(Last):
    def recompute(self, length, ratio, order=()):
        return (Run(0, 0),)

class Nameless(Last):
    name = None

class Content(Last):
    def recompute(self, length, ratio, order=()):
        tokens = sorted(order[: round(ratio * length)])
        return tuple(Run(token, token + 1) for token in tokens)

class BeyondWithContent(Last):
    def recompute(self, length, ratio, order=()):
        return (Run(0, length + len(order)),)

class Stranger:
    name = "stranger"
    shifts = False
    measure = None
    def recompute(self, length, ratio, order=()):
        return ()

class Abstract(Policy):
    name = "abstract"

class WithoutContent(Last):
    def recompute(self, length, ratio):
        return ()

class Raising(Last):
    def recompute(self, length, ratio, order=()):
        raise ZeroDivisionError("no")
"""


def policy_of(option: str) -> Policy:
    return policies_of(option, None)[option]


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policies_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_policy_of_the_user_is_loaded_by_its_path() -> None:
    options = Options.parse({"policy": "policies_of_a_user:Last"})
    policy = policy_of(options.policy)
    assert policy.name == "last"
    assert policy.recompute(100, 0.05) == (Run(95, 100),)


def test_a_policy_of_the_user_is_told_of_the_content() -> None:
    policy = policy_of("policies_of_a_user:Content")
    assert policy.recompute(100, 0.02, [70, 30, 50]) == (Run(30, 31), Run(70, 71))
    assert policy.recompute(100, 0.02) == ()


def test_names_of_the_table_are_not_looked_for_elsewhere() -> None:
    assert all(policy_of(name) is policy for name, policy in POLICIES.items())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("policies_of_nobody:Last", "No module named 'policies_of_nobody'"),
        ("policies_of_a_user:First", "no attribute 'First'"),
        ("policies_of_a_user:Run", "missing 2 required positional arguments"),
        (":Last", "ValueError"),
        ("policies_of_a_user:Beyond", "recompute(1, 0.0) gives (Run(start=0, end=2),)"),
        ("policies_of_a_user:Unsorted", "not sorted"),
        ("policies_of_a_user:Empty", "non-empty"),
        ("policies_of_a_user:BeyondWithContent", "recompute(1, 0.0) gives (Run(start=0, end=2),)"),
        ("policies_of_a_user:WithoutContent", "takes 3 positional arguments but 4 were given"),
        ("policies_of_a_user:Stranger", "inherit from vlcache_connector.policy.Policy"),
        ("policies_of_a_user:Abstract", "abstract method"),
        ("policies_of_a_user:Nameless", "name is not a string"),
        ("policies_of_a_user:Raising", "ZeroDivisionError: no"),
    ],
)
def test_a_policy_that_cannot_serve_stops_the_engine_with_a_sentence(path: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({"policy": path})
    assert repr(path) in str(caught.value) and said in str(caught.value)
