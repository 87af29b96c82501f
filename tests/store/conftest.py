"""A control server and remote tiers that end with their test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from store.control_scene import Scene


@pytest.fixture
def scene(runtime: Path) -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.go_on.set()
    scene.server.close()


@pytest.fixture
def closing() -> Iterator[None]:
    from store.remote_tiers import close_all  # imports lmcache: a second

    yield
    close_all()
