"""Results as they come: in memory and, if one is named, in a file, so that a run that was cut off goes on.

The file has a line for what was evaluated and a line for each question, with the results that were new to it. A last
line that was cut off is dropped; any other damage is an error.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from vlcache_connector.errors import VLCacheError
from vlcache_connector.evaluate.tasks import Question

_FORMAT = 1


class JournalError(VLCacheError):
    """The file cannot be gone on with."""


@dataclass(frozen=True, slots=True)
class Result:
    """One answer, compared with that of full recompute to the same question."""

    text: str
    first_token: int
    is_top1: bool  # whether its first token is that of full recompute
    kl: float  # of its first token from that of full recompute, in nats
    kl_rest: float  # see `Divergence.rest`
    prompt_tokens: int
    image_tokens: int  # in spans of the prompt; 0 under plain vLLM, which has no spans
    reused_tokens: int
    recomputed_tokens: int
    reason: str | None  # why nothing was reused
    ttft_s: float


class Journal:
    """Results by question and name of setting. With a file: locked until `close`."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """`about` is what results depend on. Raises `JournalError` when the file is about something else."""
        self._results: dict[str, dict[str, Result]] = {}
        self._file: BinaryIO | None = None
        if path is not None:
            self._file = path.open("ab+")
            try:
                self._go_on(path, {"vlcache_eval": _FORMAT, **about})
            except BaseException:
                self.close()
                raise

    def results(self, question: Question) -> dict[str, Result]:
        return self._results.get(question.fingerprint, {})

    def add(self, question: Question, results: Mapping[str, Result]) -> None:
        self._results.setdefault(question.fingerprint, {}).update(results)
        named = {name: asdict(result) for name, result in results.items()}
        self._write({"question": question.fingerprint, "id": question.id, "results": named})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def _go_on(self, path: Path, header: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(f"{path} is in use by another vlcache eval") from None
        self._file.seek(0)
        *lines, cut_off = self._file.read().split(b"\n")
        if not lines and not json.dumps(header).encode().startswith(cut_off):
            raise _foreign(path, 1)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    _compare(path, record, header)
                else:
                    self._take(record)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise _foreign(path, number) from None
        os.truncate(path, self._file.tell() - len(cut_off))
        if not lines:
            self._write(header)

    def _take(self, record: dict[str, Any]) -> None:
        taken = {name: _result(values) for name, values in record["results"].items()}
        self._results.setdefault(str(record["question"]), {}).update(taken)


def _foreign(path: Path, number: int) -> JournalError:
    return JournalError(f"{path}:{number}: not a line that vlcache eval writes; name another file with --resume")


def _compare(path: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    known = json.loads(json.dumps(header))
    if "vlcache_eval" not in found:
        raise ValueError
    for name in {**known, **found}:
        if found.get(name) != known.get(name):
            raise JournalError(
                f"{path} is about {name} {found.get(name)!r}, this run about {known.get(name)!r}; "
                "name another file with --resume"
            )


def _result(values: dict[str, Any]) -> Result:
    for field in fields(Result):
        kind: Any = float | int if field.type is float else field.type
        if not isinstance(values[field.name], kind):
            raise TypeError(field.name)
    return Result(**values)
