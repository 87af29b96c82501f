"""Scenes and questions as chat messages, for transformers and for servers."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from grid_model.pictures import draw
from grid_model.scenes import Question, Scene


def chat_of(scene: Scene, question: Question) -> list[dict[str, Any]]:
    """One user message; its pictures, in order, are those of `pictures_of`."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": " ".join(scene.opening())}] if scene.opening() else []
    for index in range(len(scene.pictures)):
        if words := scene.before_picture(index):
            parts.append({"type": "text", "text": " ".join(words)})
        parts.append({"type": "image"})
    parts.append({"type": "text", "text": " ".join(question.words)})
    return [{"role": "user", "content": parts}]


def pictures_of(scene: Scene) -> list[Image.Image]:
    return [draw(contents) for contents in scene.pictures]


def with_urls(chat: list[dict[str, Any]], pictures: list[Image.Image]) -> list[dict[str, Any]]:
    """The same chat as the OpenAI interface takes it: each picture in place, as a data URL."""
    left = iter(pictures)
    return [
        message | {"content": [url_of(next(left)) if p["type"] == "image" else p for p in message["content"]]}
        for message in chat
    ]


def url_of(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
