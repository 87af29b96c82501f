"""A control server that ends with its test."""

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
