"""The command `vlcache`. Its subcommands import what they need when they run."""

import argparse
import json
import logging
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        "vlcache", description="vlcache-connector: reuse of KV cache and encoder output in vLLM"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    env = commands.add_parser("env", help="show versions, devices and native libraries, and what is missing")
    env.add_argument("--json", action="store_true", help="for programs")
    env.set_defaults(run=show_environment)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def show_environment(options: argparse.Namespace) -> int:
    """`vlcache env`. The status is 1 when the connector cannot run in this environment."""
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
