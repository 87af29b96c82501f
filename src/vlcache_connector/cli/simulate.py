"""`vlcache simulate`: what other eviction policies and capacities would have done with recorded traffic."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlcache_connector.cli.options import Subparsers


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "simulate",
        help="replay a trace against eviction policies and capacities",
        description="Replays what the option trace_path recorded; see the README for how to read the table.",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file that trace_path named")
    parser.add_argument("--capacity", metavar="SIZES", help="such as 1G,4G (default: around the recorded one)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw hit ratios over capacity (PNG, SVG, PDF)")
    parser.add_argument("--json", action="store_true", help="for programs: one document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlcache_connector.plotting import require_matplotlib
    from vlcache_connector.simulate import recording, report

    try:
        capacities = report.capacities_of(options.capacity) if options.capacity is not None else None
    except ValueError as error:
        print(f"vlcache simulate: --capacity: {error}", file=sys.stderr)
        return 2
    if options.plot is not None:
        require_matplotlib()
    progress = _Progress()
    try:
        trace = recording.read(options.trace, lambda share: progress.show("reading", share))
        outcomes = report.simulate(trace, capacities or report.default_capacities(trace), progress.show)
    finally:
        progress.close()
    if options.plot is not None:
        report.plot(outcomes, options.plot)
    shown = report.data(trace, outcomes)
    print(json.dumps(shown, indent=2) if options.json else "\n".join(report.lines(trace, outcomes)))
    return 0


class _Progress:
    """A bar where somebody sits before it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, what: str, share: float) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm  # comes with vLLM

            self._bar = tqdm(total=100, leave=False, bar_format="{desc:24} {bar} {n:.0f} %")
        self._bar.set_description_str(what, refresh=False)
        self._bar.n = 100 * share
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
