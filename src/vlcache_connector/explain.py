"""What `vlcache explain` does: asks a running server about one prompt, and shows the plan that its response carries.

The prompt is really answered, with one token, so the images in it are known afterwards.
"""

import base64
import json
import mimetypes
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError

_TIMEOUT_S = 600


class ServerError(VLCacheError):
    """The server cannot be reached, or refuses the prompt."""


def ask(url: str, model: str | None, parts: Sequence[str | Path], ratio: float | None) -> dict[str, Any]:
    """The report of a chat request with these texts and image files, in order. Raises `ServerError`."""
    content = [_image_part(part) if isinstance(part, Path) else {"type": "text", "text": part} for part in parts]
    vlcache: dict[str, Any] = {"explain": True} | ({} if ratio is None else {"recompute_ratio": ratio})
    body = {
        "model": model or _only_model(url),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "kv_transfer_params": {"vlcache": vlcache},
    }
    answer = _request(f"{url}/v1/chat/completions", body)
    report = (answer.get("kv_transfer_params") or {}).get("vlcache")
    if not isinstance(report, dict):
        raise ServerError(f"the server at {url} does not use VLCacheConnector, or the prompt has no image")
    return report


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    counts = ("prefix_cached", "reused", "recomputed", "computed")
    yield "tokens     " + ", ".join(f"{report[f'{name}_tokens']} {name.replace('_', ' ')}" for name in counts)
    if "reason" in report:
        yield f"declined   {report['reason']}" + (f": {report['error']}" if "error" in report else "")
    plan = report["plan"]
    if plan["covered"]:
        yield f"covered    tokens {_shown([plan['covered']])}, {'approximate' if report['approximate'] else 'exact'}"
    for number, span in enumerate(plan["spans"]):
        place = f"tokens {_shown([[span['offset'], span['offset'] + span['length']]])}"
        if not span["is_known"]:
            yield f"image {number}    {place}: not in the store"
        elif not span["reused"] and not span["recomputed"]:
            yield f"image {number}    {place}: known, left to the engine"
        else:
            reused, recomputed = (_shown(span[kind]) or "none" for kind in ("reused", "recomputed"))
            yield f"image {number}    {place}: recomputed {recomputed}; reused {reused}"
    if plan["recomputed"]:
        yield f"recomputed {_shown(plan['recomputed'])}, in every layer"
    if "expected_s" in plan:
        seconds = plan["expected_s"]
        yield f"expected   {seconds['reuse']:.3f} s with reuse, {seconds['compute']:.3f} s without"


def _shown(runs: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{start}-{end - 1}" for start, end in runs)


def _image_part(path: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _only_model(url: str) -> str:
    name: str = _request(f"{url}/v1/models")["data"][0]["id"]
    return name


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
