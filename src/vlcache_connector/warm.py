"""What `vlcache warm` does: shows images and videos to a running server, each alone, so that they are known before
somebody asks about them.

Each is sent behind nothing but what the chat template writes, so that no text about it gets into its entry: see
`examples/grid_model/REUSE.md` for what that does to later answers.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_connector.openai_api import ServerError, first_model, report_of


@dataclass(frozen=True, slots=True)
class Cache:
    """Where images and videos are to be known."""

    url: str
    model: str
    cache_salt: str | None


def cache_at(url: str, model: str | None, cache_salt: str | None) -> Cache:
    """With the server's first model when none is named. Raises `ServerError` when there is no server."""
    return Cache(url, model or first_model(url), cache_salt)


def warm(cache: Cache, files: Sequence[Path], parallel: int, check: bool) -> Iterator[dict[str, Any]]:
    """Messages {"progress": ...}, then one {"result": ...} with what became of each file.

    Outcomes: `known` before, `computed` now, `failed` with an `error`. With `check` all files are asked about again,
    and those that are not known after all have failed.
    """
    total = len(files) * (2 if check else 1)
    outcomes = []
    for outcome in _each(cache, files, parallel):
        outcomes.append(outcome)
        yield _progress(len(outcomes), total)
    if check:
        for number, again in enumerate(_each(cache, files, parallel)):
            if outcomes[number]["outcome"] != "failed" and again["outcome"] != "known":
                outcomes[number] |= {"outcome": "failed", "error": _NOT_KEPT}
            yield _progress(len(files) + number + 1, total)
    counts = {kind: sum(o["outcome"] == kind for o in outcomes) for kind in ("computed", "known", "failed")}
    yield {"result": {"files": outcomes, **counts}}


_NOT_KEPT = (
    "it was not kept; give the cache more room (host_gib, disk_path), or warm fewer files. With entry_context = "
    "'alone' it may come when the engine is idle: ask again later"
)
_ADVICE = {
    "in_prefix_cache": "vLLM's own prefix cache has it, so nothing was computed; it serves this prompt, but no other. "
    "Reset that cache (/reset_prefix_cache, or a restart) and warm again",
    "engine": "this engine is not supported; its log says why",
    "no_media": "the server found neither an image nor a video in it",
}


def _each(cache: Cache, files: Sequence[Path], parallel: int) -> Iterator[dict[str, Any]]:
    """In the order of the files; an iteration that is left early asks nothing more."""
    pool = ThreadPoolExecutor(parallel)
    try:
        yield from pool.map(lambda path: _shown(cache, path), files)
    finally:
        pool.shutdown(cancel_futures=True)


def _shown(cache: Cache, path: Path) -> dict[str, Any]:
    try:
        report = report_of(cache.url, cache.model, [path], {"explain": True}, cache.cache_salt)
    except (ServerError, OSError) as error:
        return {"path": str(path), "outcome": "failed", "error": str(error)}
    spans, reason = report["plan"]["spans"], report.get("reason")
    outcome: dict[str, Any] = {"path": str(path), "tokens": sum(span["length"] for span in spans)}
    if spans and all(span["is_known"] for span in spans):
        return outcome | {"outcome": "known"}
    if spans and reason == "miss":
        return outcome | {"outcome": "computed"}
    why = report.get("error") or _ADVICE.get(reason or "", "the README says what this reason means")
    return outcome | {"outcome": "failed", "error": f"{reason}: {why}"}


def _progress(done: int, total: int) -> dict[str, Any]:
    return {"progress": {"done": done, "total": total, "unit": " files"}}
