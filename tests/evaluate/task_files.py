"""Task files for tests: pictures of one colour, and lines about them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def data_url(colour: str = "red") -> str:
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def write(folder: Path, *lines: Any) -> Path:
    """A task file beside a.png and b.png; a line is an object, or text or bytes as they are."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (folder / name).write_bytes(png(colour))
    path = folder / "tasks.jsonl"
    raw = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def _text(line: Any) -> str:
    return line if isinstance(line, str) else json.dumps(line)
