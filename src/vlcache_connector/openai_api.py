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


class ServerError(VLCacheError):
    """The server cannot be reached, or refuses the prompt."""


def report_of(
    url: str, model: str, parts: Sequence[str | Path], options: Mapping[str, Any], cache_salt: str | None = None
) -> dict[str, Any]:
    """What the connector reports of a chat with these texts and image files, in order; one token is generated.

    `options` are those of one request. Raises `ServerError`, and `OSError` when a file cannot be read.
    """
    content = [_image_part(part) if isinstance(part, Path) else {"type": "text", "text": part} for part in parts]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "kv_transfer_params": {"vlcache": dict(options)},
    }
    answer = _request(f"{url}/v1/chat/completions", body | ({} if cache_salt is None else {"cache_salt": cache_salt}))
    report = (answer.get("kv_transfer_params") or {}).get("vlcache")
    if not isinstance(report, dict):
        raise ServerError(f"the server at {url} does not use VLCacheConnector, or the prompt has no image")
    return report


def first_model(url: str) -> str:
    """The name of the first model that the server offers."""
    name: str = _request(f"{url}/v1/models")["data"][0]["id"]
    return name


def _image_part(path: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


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
