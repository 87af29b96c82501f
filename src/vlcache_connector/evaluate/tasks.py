"""Task files: JSON lines, each a question about pictures. Everything is checked before an engine starts.

The short form and the long one of a question (every other key is optional in both):

    {"images": ["cat.png", "dog.png"], "prompt": "Which is the dog?", "answer": "the second"}
    {"messages": [...], "answer": ["2", "two"], "task": "count", "id": "q7", "warm": [[...], [...]]}

`messages` is a chat as the OpenAI interface takes it. A picture is a path, relative to the task file, or a data URL.
`answer` is what is right, or a list of such; `task` groups the report. `warm` are chats that are shown before the
question is asked: what is reused was computed in them. Without it each picture is shown alone.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError
from vlcache_connector.evaluate.pictures import PictureError, Pictures

Chat = list[dict[str, Any]]

_KEYS = ("messages", "images", "prompt", "answer", "task", "id", "warm")
_ROLES = ("system", "user", "assistant")
DEFAULT_TASK = "all"


class TaskError(VLCacheError):
    """A task file, or a line of it, cannot be used."""


@dataclass(frozen=True, slots=True)
class Question:
    """`fingerprint` stands for all that an engine is told: messages, warm-up chats, and the bytes of the pictures."""

    id: str
    task: str
    messages: Chat
    answers: tuple[str, ...]  # all that are right; empty when none is known
    warm: tuple[Chat, ...]
    fingerprint: str

    @property
    def num_images(self) -> int:
        """The most pictures in one of its chats."""
        return max(len(images_of(chat)) for chat in (self.messages, *self.warm))

    @property
    def is_all_warm(self) -> bool:
        """Whether a warm-up chat shows each of its pictures; then asking leaves nothing new in the store."""
        return set(images_of(self.messages)) <= {image for chat in self.warm for image in images_of(chat)}


def read(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, at most `limit` of each task. Raises `TaskError` that names file and line."""
    pictures = Pictures(path.parent)
    questions: list[Question] = []
    lines_of_ids: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                question = _question(_fields(line), f"line-{number}", pictures)
                first = lines_of_ids.setdefault(question.id, number)
                if first != number:
                    raise TaskError(f"the id {question.id!r} is that of line {first} as well; give each line its own")
            except (TaskError, PictureError) as error:
                raise TaskError(f"{path}:{number}: {error}") from None
            questions.append(question)
    if not questions:
        raise TaskError(f"{path} has no questions; each line is a JSON object, see `vlcache eval --help`")
    return list(_at_most(limit, questions))


def images_of(chat: Chat) -> list[str]:
    """Its pictures in order, as absolute paths and data URLs."""
    return [
        part["image_url"]["url"]
        for message in chat
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


def _at_most(limit: int | None, questions: Sequence[Question]) -> Iterator[Question]:
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.task] = counts.get(question.task, 0) + 1
        if limit is None or counts[question.task] <= limit:
            yield question


def _fields(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TaskError(f"not UTF-8 ({error}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"not JSON ({error}); write one object on each line") from None
    if not isinstance(found, dict):
        raise TaskError(f"{_short(found)} is not an object; write {{...}} with messages, or with images and prompt")
    for key in found:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(_KEYS)}"
            raise TaskError(f"there is no key {_short(key)}; {hint}")
    return found


def _question(fields: dict[str, Any], default_id: str, pictures: Pictures) -> Question:
    if "messages" in fields and ("images" in fields or "prompt" in fields):
        raise TaskError("messages stand beside images or prompt; give either messages, or images and prompt")
    if "messages" in fields:
        messages = _chat(fields["messages"], "messages", pictures)
    elif "prompt" in fields:
        messages = _chat_of_prompt(fields, pictures)
    else:
        raise TaskError("there is no question; give messages, or images and prompt")
    warm = _warm(fields["warm"], pictures) if "warm" in fields else _each_alone(messages)
    return Question(
        id=_text(fields.get("id", default_id), "id"),
        task=_text(fields.get("task", DEFAULT_TASK), "task"),
        messages=messages,
        answers=_answers(fields["answer"]) if "answer" in fields else (),
        warm=warm,
        fingerprint=pictures.fingerprint([messages, *warm]),
    )


def _chat_of_prompt(fields: dict[str, Any], pictures: Pictures) -> Chat:
    images = fields.get("images", [])
    if not isinstance(images, list):
        raise TaskError(f"images is {_short(images)}; write a list of paths or data URLs")
    parts = [_image(pictures.reference(image)) for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": _text(fields["prompt"], "prompt")}]}]


def _each_alone(messages: Chat) -> tuple[Chat, ...]:
    return tuple([{"role": "user", "content": [_image(url)]}] for url in dict.fromkeys(images_of(messages)))


def _warm(value: Any, pictures: Pictures) -> tuple[Chat, ...]:
    if not isinstance(value, list):
        raise TaskError(f"warm is {_short(value)}; write a list of chats, each a list of messages")
    return tuple(_chat(chat, f"warm[{index}]", pictures) for index, chat in enumerate(value))


def _chat(value: Any, name: str, pictures: Pictures) -> Chat:
    if not isinstance(value, list) or not value:
        raise TaskError(f"{name} is {_short(value)}; write a list of messages with role and content")
    return [_message(message, f"{name}[{index}]", pictures) for index, message in enumerate(value)]


def _message(value: Any, name: str, pictures: Pictures) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise TaskError(f"{name} is {_short(value)}; a message has role and content, and nothing else")
    role, content = value["role"], value["content"]
    if role not in _ROLES:
        raise TaskError(f"{name} has the role {_short(role)}; allowed: {', '.join(_ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise TaskError(f"the content of {name} is {_short(content)}; write a text, or a list of parts")
    return {"role": role, "content": [_part(part, name, pictures) for part in content]}


def _part(value: Any, name: str, pictures: Pictures) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {"type": "text", "text": _text(value.get("text"), f"the text of a part of {name}")}
    if kind == "image_url":
        url = value.get("image_url")
        return _image(pictures.reference(url.get("url") if isinstance(url, dict) else None))
    raise TaskError(
        f'{name} has the part {_short(value)}; write {{"type": "text", "text": ...}} or '
        f'{{"type": "image_url", "image_url": {{"url": ...}}}}'
    )


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _answers(value: Any) -> tuple[str, ...]:
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise TaskError(f"answer is {_short(value)}; write a text, or a list of all that are right")
    return tuple(answers)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{name} is {_short(value)}; write a text that is not empty")
    return value


def _short(value: Any) -> str:
    """A value of a hostile size, for a message."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
