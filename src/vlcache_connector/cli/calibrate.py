"""`vlcache calibrate`: how the layers of a model should share what is recomputed."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from vlcache_connector.cli.options import Subparsers, at_least_one, check_connector, json_object
from vlcache_connector.cli.shown import Progress, number, table
from vlcache_connector.errors import OptionError

_TAKEN = dict.fromkeys(("policy", "recompute_ratio", "recompute_tokens", "profile"), "leave it out")
_NUM_LOGPROBS = 1024
_EPILOG = """TASKS is a file as `vlcache eval` takes it (see its --help); answers are not needed. A few dozen questions
about pictures like those you serve, in prompts like those you serve, are enough.

  vlcache calibrate Qwen/Qwen3-VL-8B-Instruct tasks.jsonl --output profile.json --limit 20
  vlcache eval Qwen/Qwen3-VL-8B-Instruct others.jsonl --policies shifted,layered \\
      --connector '{"profile": "profile.json"}'"""


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="find out how the layers of a model should share what is recomputed",
        description="Makes a profile for the policy layered. Asks a model the questions of a file, in vLLM itself, "
        "with more tokens recomputed in the first layers than in deeper ones, and looks for the shares that keep the "
        f"first token's distribution (its {_NUM_LOGPROBS} likeliest tokens) closest to full recompute, at the cost of "
        "the same ratio everywhere.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="path or name, as vLLM takes it")
    parser.add_argument("tasks", type=Path, metavar="TASKS", help="JSON lines, see below")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the profile; is replaced")
    parser.add_argument(
        "--ratio", type=_ratio, default=0.05, metavar="R", help="of recomputed tokens, on average (%(default)s)"
    )
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="at most so many questions of each task")
    parser.add_argument("--engine", type=json_object, default={}, metavar="JSON", help="keyword arguments of vllm.LLM")
    parser.add_argument("--connector", type=json_object, default={}, metavar="JSON", help="options of the connector")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlcache_connector.evaluate import calibration_report as report
    from vlcache_connector.evaluate import tasks
    from vlcache_connector.evaluate.calibration import about_asked, calibrate

    try:
        check_connector(options.connector, _TAKEN)
    except OptionError as error:
        print(f"vlcache calibrate: {error}", file=sys.stderr)
        return 2
    _check_output(options.output)
    questions = tasks.read(options.tasks, options.limit)
    asker = _start(options, questions)
    progress = Progress("calibrate", "question", about_asked(len(questions), asker.num_layers, options.ratio))
    try:
        found = calibrate(asker, questions, asker.num_layers, options.ratio, progress.show, partial(_warn, progress))
        report.write(options.output, asker.model_id, found)
    finally:
        progress.close()
        asker.close()
    print(f"{options.model}: {number(found.num_questions, 'question', 'questions')} of {options.tasks}\n")
    for line in (
        *table(report.TITLES, list(report.table(found)), report.NUMBERS),
        "",
        *report.lines(found, options.output),
    ):
        print(line)
    return 0


def _warn(progress: Progress, warning: str) -> None:
    progress.say(f"vlcache calibrate: {warning}")


def _check_output(path: Path) -> None:
    """Raises `OSError` now and not after all questions."""
    if path.is_dir():
        raise IsADirectoryError(f"--output is {path}, which is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output is {path}, whose folder is not there")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--output is {path}, which cannot be written")


def _start(options: argparse.Namespace, questions: Any) -> Any:
    from vlcache_connector.evaluate.asking import VLLMAsker

    num_images = max(question.num_images for question in questions)
    return VLLMAsker(options.model, options.engine, options.connector, num_images, 1, _NUM_LOGPROBS)


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0.0 < ratio <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio; write a number above 0, at most 1, such as 0.05")
    return ratio
