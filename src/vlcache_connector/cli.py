"""The command `vlcache`. Its subcommands import what they need when they run."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        "vlcache", description="vlcache-connector: reuse of KV cache and encoder output in vLLM"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    env = commands.add_parser("env", help="show versions, devices and native libraries, and what is missing")
    env.add_argument("--json", action="store_true", help="for programs")
    env.set_defaults(run=show_environment)
    explain = commands.add_parser(
        "explain",
        help="show what a running server would reuse of a prompt",
        description="Asks a running server a prompt (one token is generated) and shows the plan for it.",
    )
    explain.add_argument("parts", nargs="+", metavar="TEXT|FILE", help="texts and image files, in the prompt's order")
    explain.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    explain.add_argument("--model", help="name of the model (default: the server's first)")
    explain.add_argument("--recompute-ratio", type=float, help="instead of the server's own")
    explain.add_argument("--json", action="store_true", help="for programs")
    explain.set_defaults(run=explain_prompt)
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


def explain_prompt(options: argparse.Namespace) -> int:
    """`vlcache explain`. The status is 1 when the server gives no answer."""
    from vlcache_connector.explain import ServerError, ask, lines

    parts = [Path(part) if Path(part).is_file() else part for part in options.parts]
    try:
        report = ask(options.url.rstrip("/"), options.model, parts, options.recompute_ratio)
    except ServerError as error:
        print(f"vlcache explain: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else "\n".join(lines(report)))
    return 0
