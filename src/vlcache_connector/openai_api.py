"""Chats with a running server through its OpenAI interface, and what it reports about them."""

import base64
import json
import mimetypes
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError

_TIMEOUT_S = 600
_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}  # suffixes; other files are images


class ServerError(VLCacheError):
    """The server cannot be reached, or refuses the prompt."""


def report_of(
    url: str, model: str, parts: Sequence[str | Path], options: Mapping[str, Any], cache_salt: str | None = None
) -> dict[str, Any]:
    """What the connector reports of a chat with these texts, image and video files, in order; one token is generated.

    `options` are those of one request. Raises `ServerError`, and `OSError` when a file cannot be read.
    """
    content = [_media_part(part) if isinstance(part, Path) else {"type": "text", "text": part} for part in parts]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "kv_transfer_params": {"vlcache": dict(options)},
    }
    answer = _request(f"{url}/v1/chat/completions", body | ({} if cache_salt is None else {"cache_salt": cache_salt}))
    report = (answer.get("kv_transfer_params") or {}).get("vlcache")
    if not isinstance(report, dict):
        raise ServerError(f"the server at {url} does not use VLCacheConnector, or the prompt has no image or video")
    return report


def first_model(url: str) -> str:
    """The name of the first model that the server offers."""
    name: str = _request(f"{url}/v1/models")["data"][0]["id"]
    return name


def _media_part(path: Path) -> dict[str, Any]:
    is_video = path.suffix.lower() in _VIDEOS
    kind = mimetypes.guess_type(path.name)[0] or ("video/mp4" if is_video else "image/png")
    url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    name = "video_url" if is_video else "image_url"
    return {"type": name, name: {"url": url}}


def _request(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} does not answer: {error}") from error
