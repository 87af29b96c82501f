"""Asks every question in every setting, each from the same state of the caches.

For each question: everything is forgotten, its warm-up chats are shown, then it is asked in one setting after the
other, with vLLM's own caches emptied in between. So a result depends on no other question, and not on where a run was
cut off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from vlcache_connector.errors import VLCacheError
from vlcache_connector.evaluate.journal import Journal, Result
from vlcache_connector.evaluate.settings import FULL, Setting
from vlcache_connector.evaluate.statistics import divergence
from vlcache_connector.evaluate.tasks import Chat, Question


class NoReuseError(VLCacheError):
    """This engine never reuses, so there is nothing to evaluate."""


class RefusedError(VLCacheError):
    """The engine does not take a question, for example because it is too long."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an engine answers. `logprobs`: of the first token, by token, the likeliest ones."""

    text: str
    first_token: int
    logprobs: Mapping[int, float]
    prompt_tokens: int
    report: Mapping[str, Any]  # the response's `kv_transfer_params["vlcache"]`
    ttft_s: float


class Asker(Protocol):
    """An engine; see `asking.VLLMAsker`. `show` and `ask` raise `RefusedError`."""

    def forget(self, entries: bool) -> None: ...

    def show(self, chat: Chat) -> None: ...

    def ask(self, chat: Chat, options: Mapping[str, Any]) -> Reply: ...

    def close(self) -> None: ...


def run(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    journal: Journal,
    start: Callable[[], Asker],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Ask what the journal does not know yet. The engine is started when there is such a question.

    `progress` is told how many results there are, out of questions times settings.
    """
    asker: Asker | None = None
    try:
        for index, question in enumerate(questions):
            missing = [setting for setting in settings if setting.name not in journal.results(question)]
            if missing:
                with named(question):
                    asker = asker or _started(start(), question)
                    known = (index + 1) * len(settings) - len(missing)
                    journal.add(question, _ask_all(asker, question, missing, partial(_add_to, progress, known)))
            progress((index + 1) * len(settings))
    finally:
        if asker is not None:
            asker.close()


@contextmanager
def named(question: Question) -> Iterator[None]:
    """A `RefusedError` says which question it is about."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"question {question.id!r}: {error}") from error


def replies(asker: Asker, question: Question, ways: Sequence[Mapping[str, Any]]) -> Iterator[Reply]:
    """To a question that is asked with one request's options after the other, each from the same state of the caches.
    Raises `RefusedError`, and `NoReuseError` when the engine, or the connector, would say no to every question.
    """
    for number, options in enumerate(ways):
        if number == 0 or not question.is_all_warm:  # asking may have left a new picture in the store
            asker.forget(entries=True)
            for chat in question.warm:
                asker.show(chat)
        asker.forget(entries=False)
        reply = asker.ask(question.messages, options)
        if reply.report.get("reason") == "engine":
            raise NoReuseError("this engine declines all reuse; its log says why (see the README for what is declined)")
        if reply.report.get("error"):
            raise NoReuseError(f"the connector refuses the request: {reply.report['error']}")
        yield reply


def _started(asker: Asker, question: Question) -> Asker:
    """What an engine does once, at its first request, is in no time of ours."""
    asker.show(question.messages)
    return asker


def _add_to(progress: Callable[[int], None], known: int, count: int) -> None:
    progress(known + count)


def _ask_all(
    asker: Asker, question: Question, missing: Sequence[Setting], progress: Callable[[int], None]
) -> dict[str, Result]:
    """The yardstick is asked again whenever something is compared with it: its distribution is in no file."""
    settings = list(dict.fromkeys([FULL, *missing]))
    found: dict[str, Reply] = {}
    for setting, reply in zip(settings, replies(asker, question, [each.options for each in settings]), strict=True):
        found[setting.name] = reply
        progress(sum(each.name in found for each in missing))
    yardstick = found[FULL.name]
    return {setting.name: _result(found[setting.name], yardstick) for setting in missing}


def _result(reply: Reply, yardstick: Reply) -> Result:
    report = reply.report
    distance = divergence(yardstick.logprobs, reply.logprobs)
    spans = report.get("plan", {}).get("spans", ())
    return Result(
        text=reply.text,
        first_token=reply.first_token,
        is_top1=reply.first_token == yardstick.first_token,
        kl=distance.kl,
        kl_rest=distance.rest,
        prompt_tokens=reply.prompt_tokens,
        image_tokens=sum(span["length"] for span in spans),
        reused_tokens=report.get("reused_tokens", 0),
        recomputed_tokens=report.get("recomputed_tokens", 0),
        reason=report.get("reason"),
        ttft_s=reply.ttft_s,
    )
