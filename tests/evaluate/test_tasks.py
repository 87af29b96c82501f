"""Task files: what a user may write, and what is refused with its line and with advice."""

import base64
from pathlib import Path
from typing import Any

import pytest

from evaluate.task_files import data_url, image, png, user, write
from vlcache_connector.evaluate.pictures import data_url as data_url_of
from vlcache_connector.evaluate.tasks import TaskError, images_of, read

SHORT: dict[str, Any] = {"images": ["a.png"], "prompt": "what is it?", "answer": "red"}
TEXT = {"type": "text", "text": "what is it?"}


def test_a_short_line_is_a_chat_with_the_pictures_before_the_text(tmp_path: Path) -> None:
    (question,) = read(write(tmp_path, {"images": ["a.png", data_url()], "prompt": "which?", "answer": "both"}))
    assert question.messages == [
        user(image(str(tmp_path / "a.png")), image(data_url()), {"type": "text", "text": "which?"})
    ]
    assert (question.task, question.id, question.answers) == ("all", "line-1", ("both",))


def test_a_long_line_is_taken_as_it_is(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, user(TEXT, image("a.png"), TEXT)]
    line = {"messages": messages, "answer": ["red", "a red one"], "task": "colours", "id": "7", "warm": []}
    (question,) = read(write(tmp_path, line))
    assert question.messages == [messages[0], user(TEXT, image(str(tmp_path / "a.png")), TEXT)]
    assert (question.task, question.id, question.answers) == ("colours", "7", ("red", "a red one"))
    assert question.warm == () and not question.is_all_warm


def test_each_picture_is_shown_alone_once_unless_the_line_has_warm_up_chats(tmp_path: Path) -> None:
    two = {"images": ["a.png", "b.png", "a.png"], "prompt": "?"}
    own = {**two, "warm": [[user(image("b.png"), TEXT)]]}
    alone, given = read(write(tmp_path, two, own))
    a, b = (str(tmp_path / name) for name in ("a.png", "b.png"))
    assert alone.warm == ([user(image(a))], [user(image(b))]) and alone.is_all_warm
    assert given.warm == ([user(image(b), TEXT)],) and not given.is_all_warm
    assert (alone.num_images, images_of(alone.messages)) == (3, [a, b, a])


def test_empty_lines_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    questions = read(write(tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "a"}', "", "  ", '{"prompt": "b"}'))
    assert [question.id for question in questions] == ["line-1", "line-4"]


def test_a_limit_counts_for_each_task(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": "?", "task": task, "id": str(i)} for i, task in enumerate("xxyxyz")))
    assert [question.id for question in read(path, limit=1)] == ["0", "2", "5"]


def test_a_fingerprint_stands_for_words_and_for_the_bytes_of_pictures(tmp_path: Path) -> None:
    lines = [SHORT, SHORT | {"id": "other", "answer": "blue", "task": "t"}, SHORT | {"prompt": "and?"}]
    lines += [SHORT | {"images": ["b.png"]}, SHORT | {"images": [data_url("red")]}, SHORT | {"warm": []}]
    first, same, words, picture, moved, cold = (q.fingerprint for q in read(write(tmp_path, *lines)))
    assert first == same == moved
    assert len({first, words, picture, cold}) == 4
    (tmp_path / "a.png").write_bytes(png("green"))
    assert read(tmp_path / "tasks.jsonl")[0].fingerprint != first


def test_the_engine_is_given_files_as_data(tmp_path: Path) -> None:
    (question,) = read(write(tmp_path, SHORT))
    (reference,) = images_of(question.messages)
    header, _, data = data_url_of(reference).partition(",")
    assert header == "data:image;base64" and base64.b64decode(data) == png("red")
    assert data_url_of(data_url()) == data_url()


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{'prompt': 'a'}", "not JSON"),
    "cut off": ('{"prompt": "a"', "not JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "nested": ("[" * 100_000, "not JSON"),
    "a list": ([1], "is not an object"),
    "a number of many digits": ("1" * 5000, "not JSON"),
    "nothing asked": ({"images": ["a.png"]}, "give messages, or images and prompt"),
    "both forms": ({"messages": [user(TEXT)], "prompt": "a"}, "give either messages, or images and prompt"),
    "a misspelt key": (SHORT | {"anwser": "red"}, "did you mean 'answer'?"),
    "an unknown key": (SHORT | {"zzz": 1}, "known keys are messages, images"),
    "a long key": (SHORT | {"z" * 9999: 1}, "..."),
    "an empty prompt": (SHORT | {"prompt": " "}, "write a text that is not empty"),
    "an answer that is a number": (SHORT | {"answer": 2}, "answer is 2; write a text"),
    "no answer in the list": (SHORT | {"answer": []}, "write a text, or a list"),
    "an empty answer": (SHORT | {"answer": ["red", ""]}, "write a text, or a list"),
    "a task that is no text": (SHORT | {"task": ["x"]}, "task is ['x']"),
    "an id that is no text": (SHORT | {"id": 5}, "id is 5"),
    "images as one text": (SHORT | {"images": "a.png"}, "write a list of paths"),
    "no messages": ({"messages": []}, "write a list of messages"),
    "a message of text": ({"messages": ["a"]}, "a message has role and content"),
    "a message with more": ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "and nothing else"),
    "an unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, "allowed: system, user, assistant"),
    "a role that is a list": ({"messages": [{"role": [], "content": "a"}]}, "has the role []"),
    "no content": ({"messages": [{"role": "user", "content": []}]}, "write a text, or a list of parts"),
    "a video": ({"messages": [user({"type": "video_url", "video_url": {"url": "a"}})]}, "has the part"),
    "a part of text": ({"messages": [{"role": "user", "content": ["a"]}]}, "has the part 'a'"),
    "an image that is a path": ({"messages": [user({"type": "image_url", "image_url": "a.png"})]}, "a picture is None"),
    "warm that is a chat": (SHORT | {"warm": [user(TEXT)]}, "warm[0] is"),
    "warm that is a text": (SHORT | {"warm": "a.png"}, "write a list of chats"),
    "a picture in warm that is missing": (SHORT | {"warm": [[user(image("c.png"))]]}, "'c.png' cannot be read"),
    "a missing picture": (SHORT | {"images": ["c.png"]}, "paths are relative to the task file"),
    "a folder": (SHORT | {"images": ["."]}, "cannot be read"),
    "a name with a zero": (SHORT | {"images": ["a\0.png"]}, "give a path relative to the task file"),
    "a name that is too long": (SHORT | {"images": ["a" * 9999]}, "cannot be read"),
    "a picture on the network": (SHORT | {"images": ["https://a.b/c.png"]}, "download it and give its path"),
    "a file address": (SHORT | {"images": ["file:///etc/passwd"]}, "give its path"),
    "a file that is no picture": (SHORT | {"images": ["tasks.jsonl"]}, "is no picture that can be decoded"),
    "data that is no picture": (SHORT | {"images": ["data:image/png;base64,AAAA"]}, "can be decoded"),
    "data that is no base64": (SHORT | {"images": ["data:image/png;base64,*"]}, "with base64 data"),
    "data that is text": (SHORT | {"images": ["data:text/plain,hello"]}, "write data:image/png;base64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_line_is_refused_with_its_place_and_what_to_do(name: str, tmp_path: Path) -> None:
    line, advice = REFUSED[name]
    path = write(tmp_path, {"prompt": "fine", "id": "fine"}, line)
    with pytest.raises(TaskError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and advice in message
    assert len(message) < 600 + len(str(path)) and "\n" not in message


def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT)
    (tmp_path / "a.png").write_bytes(png()[: len(png()) // 2])
    with pytest.raises(TaskError, match=r":1: 'a.png' is no picture that can be decoded"):
        read(path)


def test_two_lines_with_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r":3: the id 'x' is that of line 1 as well"):
        read(write(tmp_path, SHORT | {"id": "x"}, SHORT, SHORT | {"id": "x"}))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no questions"):
        read(write(tmp_path, ""))
