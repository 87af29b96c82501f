"""What came out, by task and setting: rows for a table, data for programs, a plot."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vlcache_connector.evaluate.journal import Journal, Result
from vlcache_connector.evaluate.settings import FULL, Setting
from vlcache_connector.evaluate.statistics import wilson
from vlcache_connector.evaluate.tasks import Question
from vlcache_connector.plotting import require_matplotlib, save

MATCHES = ("exact", "contains")
TOTAL = "total"
TITLES = (
    *("TASK", "SETTING", "ASKED", "RIGHT", "95 %", "AGREES", "TOP-1", "KL", "KL MAX"),
    *("REUSED", "RECOMPUTED", "TTFT", "DECLINED"),
)
NUMBERS = frozenset(TITLES) - {"TASK", "SETTING", "DECLINED"}
_SMALLEST_KL = 1e-6  # what a logarithmic axis can show of 0


@dataclass(frozen=True, slots=True)
class Row:
    """One task under one setting. Shares are from 0 to 1; `right` and `interval` are None without known answers."""

    task: str
    setting: str
    policy: str | None
    ratio: float | None
    asked: int
    right: float | None
    interval: tuple[float, float] | None  # 95 %, of `right`
    agrees: float  # share of answers that are those of full recompute
    top1: float  # the same of first tokens
    kl: float  # mean over questions, in nats, of the first token's distribution from that of full recompute
    kl_max: float
    kl_rest: float  # the most probability that a KL knows only as one bucket
    reused: float  # share of prompt tokens
    recomputed: float  # share of prompt tokens, in recompute passes; the others were computed by the engine
    not_reused: float  # share of the pictures' tokens
    ttft_s: float  # median
    declined: dict[str, int]  # reason -> requests that reused nothing


def rows_of(questions: Sequence[Question], settings: Sequence[Setting], journal: Journal, match: str) -> list[Row]:
    """Each task in the order of the questions, then all together, in every setting."""
    tasks = list(dict.fromkeys(question.task for question in questions))
    groups = [(task, [question for question in questions if question.task == task]) for task in tasks]
    if len(groups) > 1:
        groups.append((TOTAL, list(questions)))
    return [_row(task, group, setting, journal, match) for task, group in groups for setting in settings]


def is_right(text: str, answers: Sequence[str], match: str) -> bool:
    """Whether one of the answers is the text, or in it, whatever the case, white space and a full stop behind it."""
    found, known = _plain(text), [_plain(answer) for answer in answers]
    return found in known if match == "exact" else any(f" {answer} " in f" {found} " for answer in known)


def table(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Cells under `TITLES`."""
    task = None
    for row in rows:
        interval = "-" if row.interval is None else "-".join(f"{end:.3f}" for end in row.interval)
        yield [
            row.task if row.task != task else "",
            row.setting,
            f"{row.asked:,}",
            "-" if row.right is None else f"{row.right:.3f}",
            interval,
            f"{row.agrees:.3f}",
            f"{row.top1:.3f}",
            f"{row.kl:.2g}",
            f"{row.kl_max:.2g}",
            f"{100 * row.reused:.1f} %",
            f"{100 * row.recomputed:.1f} %",
            f"{1000 * row.ttft_s:.0f} ms",
            ", ".join(f"{count} {reason}" for reason, count in sorted(row.declined.items())),
        ]
        task = row.task


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader of the table must know."""
    yield "AGREES, TOP-1, KL (first token, nats): against full recompute; REUSED, RECOMPUTED: shares of prompt tokens"
    if (rest := max(row.kl_rest for row in rows)) > 0:
        yield f"KL is a lower bound: up to {rest:.1g} of the probability is known as one bucket only (--logprobs)"
    if any(row.declined for row in rows):
        yield "DECLINED: requests that reused nothing and ran as plain vLLM, by reason; they are part of the row"
    if all(row.right is None for row in rows):
        yield "no question has an answer in the task file, so nothing is known of right and wrong"


def data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in rows]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Right answers and KL over the share of the pictures' tokens that was recomputed: a line for each policy, a row of
    two axes for each task. Raises `PlotError`.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(10, 2.4 * len(tasks) + 0.5), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharex=True)
    for (left, right), task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        _draw_right(left, of_task)
        _draw_kl(right, of_task)
        left.set(title=task, ylabel="right answers")
        right.set(title=task, ylabel="KL (nats)")
    for bottom in axes[-1]:
        bottom.set(xlabel="recomputed share of the pictures' tokens")
    axes[0][1].legend()
    save(figure, path)


def _draw_right(axes: Any, rows: Sequence[Row]) -> None:
    for policy, points in _lines(rows).items():
        known = [(row.not_reused, row.right, *row.interval) for row in points if row.right is not None and row.interval]
        if known:
            x, y, low, high = zip(*known, strict=True)
            below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
            axes.errorbar(x, y, (below, above), marker="o", capsize=3, elinewidth=0.8, label=policy)
    plain = next((row.right for row in rows if row.policy is None), None)
    if plain is not None:
        axes.axhline(plain, color="grey", ls=":", label="plain")
    axes.set_ylim(-0.02, 1.02)


def _draw_kl(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_yscale("log")
    for policy, points in _lines(rows).items():
        axes.plot([p.not_reused for p in points], [max(p.kl, _SMALLEST_KL) for p in points], marker="o", label=policy)
    plain = next((row.kl for row in rows if row.policy is None), None)
    if plain is not None:
        axes.axhline(max(plain, _SMALLEST_KL), color="grey", ls=":", label="plain")
    largest = max(row.kl for row in rows)
    axes.set_ylim(_SMALLEST_KL / 2, max(2 * largest, 1000 * _SMALLEST_KL))


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each policy but the yardstick, whose KL from itself is 0."""
    policies = dict.fromkeys(row.policy for row in rows if row.policy not in (None, FULL.policy))
    return {
        str(policy): sorted((row for row in rows if row.policy == policy), key=lambda row: row.not_reused)
        for policy in policies
    }


def _row(task: str, questions: Sequence[Question], setting: Setting, journal: Journal, match: str) -> Row:
    known = [(question, journal.results(question)) for question in questions]
    pairs = [(question, results[setting.name], results[FULL.name]) for question, results in known]
    results = [result for _, result, _ in pairs]
    graded = [is_right(result.text, question.answers, match) for question, result, _ in pairs if question.answers]
    prompt_tokens = sum(result.prompt_tokens for result in results)
    return Row(
        task=task,
        setting=setting.name,
        policy=setting.policy,
        ratio=setting.ratio,
        asked=len(pairs),
        right=fmean(graded) if graded else None,
        interval=wilson(sum(graded), len(graded)) if graded else None,
        agrees=fmean(result.text == full.text for _, result, full in pairs),
        top1=fmean(result.is_top1 for result in results),
        kl=math.fsum(result.kl for result in results) / len(results),
        kl_max=max(result.kl for result in results),
        kl_rest=max(result.kl_rest for result in results),
        reused=sum(result.reused_tokens for result in results) / prompt_tokens,
        recomputed=sum(result.recomputed_tokens for result in results) / prompt_tokens,
        not_reused=1 - _share_reused(results),
        ttft_s=median(result.ttft_s for result in results),
        declined=dict(Counter(r.reason for r in results if r.reason and setting.policy is not None)),
    )


def _share_reused(results: Sequence[Result]) -> float:
    images = sum(result.image_tokens for result in results)
    return sum(result.reused_tokens for result in results) / images if images else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()
