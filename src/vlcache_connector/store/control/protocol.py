"""What goes over the control socket, and what a cache can be asked. Both sides import this.

A client connects, sends one line of JSON, {"command": NAME, ...arguments}, and reads lines of JSON: any number of
{"progress": ...} and {"entry": ...}, then one {"result": ...} or {"error": "a sentence that says what to do"}. The
server closes the connection after that; a connection that ends without it was cut.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from vlcache_connector.errors import VLCacheError

Message = dict[str, Any]
Command = Callable[[Message], Iterator[Message]]

MAX_REQUEST_NBYTES = 64 << 10
# order -> fields of an entry; the first that is known counts
SORTS = {"new": ("created_s", "used_s"), "size": ("nbytes",), "used": ("used_s",), "tokens": ("num_tokens",)}
MAX_SORTED = 10_000  # entries that a cache puts in order by itself


class ControlError(VLCacheError):
    """A cache cannot do what was asked. The message goes to the user as it is."""


class NoCacheError(ControlError):
    """There is no cache to ask, or it is not clear which."""


class CacheCommands(Protocol):
    """What a cache can be asked, running or stopped. All calls may block and may raise `ControlError` or `OSError`.

    The iterators end with {"result": ...}; closing one early ends the work, except a snapshot, which goes on.
    """

    def about(self) -> Message:
        """What this cache is: `pid`, `model`, `version`, `started_s` (Unix time), and `tiers`: a list of {`name`,
        `capacity_nbytes`, `used_nbytes`, `entries`}.
        """
        ...

    def list_entries(self, limit: int, sort: str) -> Iterator[Message]:
        """{"entry": ...} for the first `limit` in the order `sort`, one of `SORTS`, largest or latest first. With 0, or
        more than `MAX_SORTED`, all entries, in no order: an engine should not hold so much for whoever asks.

        An entry: `tier`, `key` (hex), `kind`, `modality`, `tenant`, `num_tokens`, `nbytes`, `uses`, `created_s` and
        `used_s` (Unix time), `is_pinned`; None is what a tier does not know. The result: `shown`, and `totals`: a list
        of {`tier`, `kind`, `entries`, `num_tokens`, `nbytes`} over all entries.
        """
        ...

    def check(self, deep: bool) -> Iterator[Message]:
        """{"progress": {`done`, `total`, `unit`}} and the result: `problems`, a list of sentences; `entries`; `nbytes`.

        `deep` reads and verifies all bytes that lie on disk.
        """
        ...

    def clear(self, tiers: list[str]) -> Message:
        """Remove all entries of these tiers; the answer maps each to how many those were."""
        ...

    def snapshot(self, path: Path, bandwidth: int | None) -> Iterator[Message]:
        """Write an image of the host tier to `path`, at no more than `bandwidth` bytes per second.

        {"progress": ...} from the moment it has begun; the result: `path`, `entries`, `nbytes`, `seconds`.
        """
        ...

    def cancel_snapshot(self) -> bool:
        """Stop the snapshot that is being written; False when there is none."""
        ...


def commands_of(cache: CacheCommands) -> Mapping[str, Command]:
    """The commands as a server takes them: arguments come from outside and are checked here."""
    return {
        "about": lambda _: iter([{"result": cache.about()}]),
        "ls": lambda request: cache.list_entries(_limit(request), _sort(request)),
        "check": lambda request: cache.check(_flag(request, "deep")),
        "clear": lambda request: iter([{"result": cache.clear(_tiers(request))}]),
        "snapshot": lambda request: cache.snapshot(_path(request), _bandwidth(request)),
        "cancel_snapshot": lambda _: iter([{"result": cache.cancel_snapshot()}]),
    }


def result_of(messages: Iterator[Message]) -> Any:
    """The result of a command whose progress nobody watches."""
    for message in messages:
        if "result" in message:
            return message["result"]
    raise ControlError("the command ended without a result")


def _limit(request: Message) -> int:
    value = request.get("limit", 0)
    if type(value) is not int or value < 0:
        raise ControlError(f"limit is {value!r}; give a whole number, 0 for all")
    return value


def _sort(request: Message) -> str:
    value = request.get("sort", "new")
    if not isinstance(value, str) or value not in SORTS:
        raise ControlError(f"sort is {value!r}; give one of {', '.join(SORTS)}")
    return str(value)


def _flag(request: Message, name: str) -> bool:
    value = request.get(name, False)
    if not isinstance(value, bool):
        raise ControlError(f"{name} is {value!r}; give true or false")
    return value


def _tiers(request: Message) -> list[str]:
    value = request.get("tiers")
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ControlError(f"tiers is {value!r}; give a list of names of tiers")
    return value


def _path(request: Message) -> Path:
    value = request.get("path")
    if not isinstance(value, str) or not Path(value).is_absolute() or "\0" in value:
        raise ControlError(f"path is {value!r}; give an absolute path")
    return Path(value)


def _bandwidth(request: Message) -> int | None:
    value = request.get("bandwidth")
    if value is not None and (type(value) is not int or value < 1):
        raise ControlError(f"bandwidth is {value!r}; give bytes per second, a whole number from 1")
    return value
