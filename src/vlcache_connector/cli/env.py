"""`vlcache env`: what is installed here, and what is missing."""

import argparse
import json
import logging

from vlcache_connector.cli.options import Subparsers


def add(commands: Subparsers) -> None:
    parser = commands.add_parser("env", help="show versions, devices and native libraries, and what is missing")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The status is 1 when the connector cannot run in this environment."""
    from vlcache_connector.environment import facts

    was_disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what would be logged is shown below
    found = list(facts())
    logging.disable(was_disabled)
    is_broken = any(fact.problem and fact.is_fatal for fact in found)
    if options.json:
        shown = {fact.key: {"value": fact.value, "problem": fact.problem or None} for fact in found}
        print(json.dumps({"works": not is_broken, **shown}, indent=2))
        return int(is_broken)
    width = max(len(fact.label) for fact in found)
    for fact in found:
        print(f"{fact.label:{width}}  {fact.value or fact.absent}")
        if fact.problem:
            print(f"{'':{width}}  ! {fact.problem}")
    return int(is_broken)
