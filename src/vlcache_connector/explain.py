"""What `vlcache explain` does: asks a running server about one prompt, and shows the plan that its response carries.

The prompt is really answered, with one token, so the images and videos in it are known afterwards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlcache_connector.openai_api import first_model, report_of

_MAX_RUNS = 6


def ask(url: str, model: str | None, parts: Sequence[str | Path], ratio: float | None) -> dict[str, Any]:
    """The report of a chat request with these texts, image and video files, in order. Raises `ServerError`."""
    options: dict[str, Any] = {"explain": True} | ({} if ratio is None else {"recompute_ratio": ratio})
    return report_of(url, model or first_model(url), parts, options)


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
        name = f"{span['modality']} {number}"
        if not span["is_known"]:
            yield f"{name}    {place}: not in the store"
        elif not span["reused"] and not span["recomputed"]:
            yield f"{name}    {place}: known, left to the engine"
        else:
            reused, recomputed = (_shown(span[kind]) or "none" for kind in ("reused", "recomputed"))
            deeper = "".join(f", {one['count']} of them from layer {one['layer']} on" for one in span["deeper"])
            yield f"{name}    {place}: recomputed {recomputed}{deeper}; reused {reused}"
    if plan["recomputed"]:
        where = "the first layers" if any(span["deeper"] for span in plan["spans"]) else "every layer"
        yield f"recomputed {_shown(plan['recomputed'])}, in {where}"
    if "expected_s" in plan:
        seconds = plan["expected_s"]
        yield f"expected   {seconds['reuse']:.3f} s with reuse, {seconds['compute']:.3f} s without"


def _shown(runs: Sequence[Sequence[int]]) -> str:
    """The first few runs, and how much there is in all."""
    shown = ", ".join(str(start) if end == start + 1 else f"{start}-{end - 1}" for start, end in runs[:_MAX_RUNS])
    if len(runs) <= _MAX_RUNS:
        return shown
    return f"{sum(end - start for start, end in runs)} tokens in {len(runs)} runs ({shown}, ...)"
