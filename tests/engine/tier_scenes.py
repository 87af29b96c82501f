"""What tests of the tiers below the host tier share: images that were written, calls that wait, damaged files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine.fake_engine import FakeEngine
from engine.scenes import show


def show_and_write(engine: FakeEngine, **kwargs: Any) -> None:
    """Let the engine learn images, and all tiers have them."""
    show(engine, **kwargs)
    assert engine.session.lower.drain(20)


@contextmanager
def held_back(tier: type, method: str) -> Iterator[threading.Event]:
    """Calls of a tier's method wait until the event is set."""
    event, move = threading.Event(), getattr(tier, method)

    def slow(*arguments: Any) -> None:
        assert event.wait(30)
        move(*arguments)

    with patch.object(tier, method, slow):
        yield event
        event.set()


def damage(path: Path, how: str) -> None:
    """A file that is "removed", "cut" or "flipped"."""
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
