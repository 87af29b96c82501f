"""How does the connector compare with what else there is, side by side, and are its targets met?

    make bench-systems      (or: python tests/bench/bench_systems.py [--quick] [--only PART ...])

    sizes   time to first token against the size of a picture: plain vLLM, exact prefix hit, ours from host memory and
            from disk, vLLM's own connectors for KV and for encoder outputs
    mixed   several known pictures in a prompt, in changing order; chats whose turns bring known pictures
    zipf    requests with popular and less popular pictures, several at a time: throughput and time to first token
    parts   where the time of a hit goes
    text    LMCache with its server, on text
    targets what the connector costs a new picture, growth of a hit under a fixed budget, look-ups among a million
            entries; verdicts on these targets, and on those that `sizes` has measured

Each part runs engines of its own, and its results replace those of an earlier run in the result file: what is not
chosen stays. Times are the engine's own, from its queue to the first token; those of `text` and `zipf` are what a
client sees. Ratios are taken within a repeat, of one engine where nothing else is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.engine import VariantError
from bench.results import OUT, circumstances, say, shown, warn_when_busy, write_json
from bench.systems import mixed, parts, plots, report, sizes, targets, targets_report, text, zipf
from bench.systems.records import Budget

RESULTS = OUT / "bench_systems.json"
Measure = Callable[[bool, Budget], dict[str, Any]]
# part -> (what measures it, what prints it, seconds it may take)
PARTS: dict[str, tuple[Measure, Callable[[dict[str, Any]], None], float]] = {
    "sizes": (sizes.measure, report.sizes, 780),
    "mixed": (mixed.measure, report.mixed, 185),
    "zipf": (zipf.measure, report.zipf, 265),
    "parts": (parts.measure, report.parts, 105),
    "text": (text.measure, report.text, 125),
    "targets": (targets.measure, targets_report.targets, 335),
}


def run(name: str, is_quick: bool) -> bool:
    """Measure a part and keep its results; False when something was not what it should be."""
    measure, show, seconds = PARTS[name]
    say(f"part {name!r}")
    facts = circumstances() | {"is_quick": is_quick}
    budget, start = Budget(seconds), time.monotonic()
    try:
        found = measure(is_quick, budget)
    except (VariantError, RuntimeError) as error:
        print(f"FAILED, part {name!r}: {error}")
        return False
    content = results()
    took_s = time.monotonic() - start
    content[name] = {"circumstances": facts, "left_out": budget.left_out, "took_s": took_s, **found}
    write_json(RESULTS, content)
    show(content)
    say(f"part {name!r} took {took_s:.0f} s")
    return not found.get("failures")


def results() -> dict[str, Any]:
    """Of all parts, this run's or an earlier one's."""
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the connector beside its alternatives.")
    parser.add_argument("--quick", action="store_true", help="small cases, one repeat")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    warn_when_busy()
    is_fine = [run(name, options.quick) for name in PARTS if name in options.only]
    plots.draw(results(), OUT)
    say(f"results: {shown(RESULTS)}, plots beside it")
    return 0 if all(is_fine) else 1


if __name__ == "__main__":
    sys.exit(main())
