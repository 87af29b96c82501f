"""`vlcache eval`: what reuse does to the answers of a model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlcache_connector.cli.options import Subparsers, at_least_one, check_connector, json_object
from vlcache_connector.cli.shown import Progress, number, table
from vlcache_connector.errors import OptionError

_EXAMPLES = """a line of TASKS is a question, in a short form or as a chat; answer, task, id and warm may be left out:
  {"images": ["cat.png", "dog.png"], "prompt": "Which is the dog?", "answer": "the second", "task": "animals"}
  {"messages": [{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "What is this?"}]}],
   "answer": ["cat", "a cat"], "warm": []}
(each on one line). Pictures are paths relative to TASKS, or data URLs. "answer" may be a list of all that are right;
"task" groups the report; "warm" is a list of chats that are shown first, by default each picture alone: what is
reused was computed in them.

  vlcache eval Qwen/Qwen3-VL-8B-Instruct tasks.jsonl --limit 50 --resume results.jsonl --plot accuracy.png
  vlcache eval MODEL tasks.jsonl --engine '{"max_model_len": 8192, "tensor_parallel_size": 2}'"""


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure what reuse does to the answers of a model",
        description="Asks a model the questions of a file, in vLLM itself: plain, with everything recomputed, and with "
        "each policy at each ratio. One question at a time, so that times mean something; greedy, seeds fixed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="path or name, as vLLM takes it")
    parser.add_argument("tasks", type=Path, metavar="TASKS", help="JSON lines, see below")
    parser.add_argument("--policies", metavar="LIST", help="such as leading,none (default: none,leading,shifted)")
    parser.add_argument(
        "--ratios", metavar="LIST", help="of recomputed tokens, such as 0.02,0.05 (default: 0.02 to 0.5)"
    )
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="at most so many questions of each task")
    parser.add_argument("--max-tokens", type=at_least_one, default=32, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument(
        "--match", choices=("exact", "contains"), default="exact", help="what a right answer is (%(default)s)"
    )
    parser.add_argument(
        "--logprobs", type=at_least_one, default=1024, metavar="N", help="tokens that KL is taken over (%(default)s)"
    )
    parser.add_argument("--engine", type=json_object, default={}, metavar="JSON", help="keyword arguments of vllm.LLM")
    parser.add_argument("--connector", type=json_object, default={}, metavar="JSON", help="options of the connector")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep results here as they come, and go on from it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (PNG, SVG, PDF)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlcache_connector.evaluate import report, tasks
    from vlcache_connector.evaluate.journal import Journal
    from vlcache_connector.evaluate.runs import run as ask_all
    from vlcache_connector.plotting import require_matplotlib

    try:
        settings = _settings(options)
        check_connector(options.connector, {"policy": "use --policies", "recompute_ratio": "use --ratios"})
    except OptionError as error:
        print(f"vlcache eval: {error}", file=sys.stderr)
        return 2
    if options.plot is not None:
        require_matplotlib()
    questions = tasks.read(options.tasks, options.limit)
    journal = Journal(options.resume, _about(options))
    progress = Progress("eval", "answer", len(questions) * len(settings))
    try:
        ask_all(questions, settings, journal, lambda: _start(options, questions), progress.show)
    finally:
        progress.close()
        journal.close()
    rows = report.rows_of(questions, settings, journal, options.match)
    print(f"{options.model}: {number(len(questions), 'question', 'questions')} of {options.tasks}\n")
    for line in (*table(report.TITLES, list(report.table(rows)), report.NUMBERS), "", *report.notes(rows)):
        print(line)
    if options.json is not None:
        document = {**_about(options), "tasks": str(options.tasks), "match": options.match, "rows": report.data(rows)}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if options.plot is not None:
        report.plot(rows, options.plot)
    return 0


def _settings(options: argparse.Namespace) -> Any:
    from vlcache_connector.evaluate.settings import DEFAULT_POLICIES, DEFAULT_RATIOS, ratios_of, settings_of

    policies = DEFAULT_POLICIES if options.policies is None else [name.strip() for name in options.policies.split(",")]
    ratios = DEFAULT_RATIOS if options.ratios is None else ratios_of(options.ratios)
    return settings_of(policies, ratios, options.connector.get("profile") is not None)


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """What results depend on, beside the questions."""
    return {name: getattr(options, name) for name in ("model", "max_tokens", "logprobs", "engine", "connector")}


def _start(options: argparse.Namespace, questions: Any) -> Any:
    from vlcache_connector.evaluate.asking import VLLMAsker

    num_images = max(question.num_images for question in questions)
    return VLLMAsker(options.model, options.engine, options.connector, num_images, options.max_tokens, options.logprobs)
