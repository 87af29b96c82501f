"""One L2 adapter of lmcache, as calls that block with a time-out. With `interface`, all that knows lmcache.

What is not obvious of lmcache 0.5 (`tests/store/test_lmcache_contract.py`), and handled here or in `link`:

- it never connects again, and after a value of unexpected length a connection is out of step: an adapter that failed
  once is given up;
- a lookup or a load that failed looks like a miss: each lookup asks for a blob as well that must be there;
- a load of what is not there may never end: only what was just seen is loaded;
- after a time-out it may still write into a buffer, so buffers live as long as the adapter, and none is the slab's.
"""

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from vlcache_connector.store.remote.blob import BlobKey

NAMESPACE = "vlcache-1"  # lmcache's name of the model; part of the format

_POLL_S = 0.05
_WITNESS = BlobKey(bytes(32), 0, 0, 0, "")  # a blob that is always there, so that a failed lookup is told from a miss
_WITNESS_VALUE = b"vlcache\n"


class AdapterError(Exception):
    """An operation failed, and at once. The adapter is of no more use."""


class AdapterTimeoutError(AdapterError):
    """An operation did not end in time."""


class Adapter:
    """Threads may share it. Operations of one kind take turns, so that each can wait on the kind's event."""

    def __init__(self, config: Any, timeout_s: float) -> None:
        """Connects. Raises `AdapterError` unless the store answers."""
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter

        self._timeout_s = timeout_s
        self._is_broken = self._is_closing = False
        self._users = 0
        self._lock = threading.Lock()  # of the three above
        self._closed = threading.Event()
        self._turns = {kind: threading.Lock() for kind in ("store", "lookup", "load")}
        self._kept: dict[int, list[Any]] = {}  # what lmcache may still write to or read from
        try:
            self._adapter = create_l2_adapter(config)
        except Exception as error:  # whatever a backend raises: it is not there
            raise AdapterError(f"lmcache cannot make it: {error}") from error
        with self._used():
            if not self._look([])[-1]:
                self._store([_WITNESS], [memoryview(bytearray(_WITNESS_VALUE))])
                self._check(self._look([])[-1], "it does not give back what was written")

    def present(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Whether each is there. Raises `AdapterError`, as all methods here do."""
        with self._used():
            *found, is_fine = self._look(keys)
            self._check(is_fine, "a lookup failed")
            return found

    def load(self, keys: Sequence[BlobKey], buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, which are as long as the values must be. Only for what is there: it may wait for others."""
        with self._used(), self._turns["load"]:
            adapter, objects = self._adapter, self._objects(buffers)
            # One task for each: values of one task must all have the same length.
            tasks = [
                adapter.submit_load_task([_object_key(key)], [value]) for key, value in zip(keys, objects, strict=True)
            ]
            loaded: dict[int, bool] = {}

            def answer() -> bool:
                for task in tasks:
                    if task not in loaded and (bits := adapter.query_load_result(task)) is not None:
                        loaded[task] = bool(bits.test(0))
                return len(loaded) == len(tasks)

            self._wait(adapter.get_load_event_fd(), answer)
            self._check(all(loaded.values()), "a value is gone or has another length")
            del self._kept[id(objects)]

    def store(self, keys: Sequence[BlobKey], buffers: Sequence[memoryview]) -> None:
        with self._used():
            self._store(keys, buffers)

    def delete(self, keys: Sequence[BlobKey]) -> None:
        """As far as the store can delete."""
        with self._used():
            done = threading.Event()

            def delete() -> None:  # lmcache waits 30 s
                self._adapter.delete([_object_key(key) for key in keys])
                done.set()

            threading.Thread(target=delete, name="vlcache-delete", daemon=True).start()
            if not done.wait(self._timeout_s):
                self._fail(AdapterTimeoutError(f"a deletion took more than {self._timeout_s:g} s"))

    def close(self, timeout_s: float = 0.0) -> None:
        """Give it up. It is closed when its last operation has ended; wait so long for that."""
        self._is_broken = True
        self._close_if_idle()
        self._closed.wait(timeout_s)

    @property
    def is_closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._closed.is_set()

    def _close_if_idle(self) -> None:
        with self._lock:
            if self._is_closing or self._users > 0:
                return
            self._is_closing = True

        def close() -> None:
            with contextlib.suppress(Exception):
                self._adapter.close()
            self._kept.clear()
            self._closed.set()

        threading.Thread(target=close, name="vlcache-close", daemon=True).start()  # it may wait

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        with self._lock:
            if self._is_broken:
                raise AdapterError("it has failed before")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
            if self._is_broken:
                self._close_if_idle()

    def _look(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Whether each is there, and last of all the witness."""
        wanted = [_object_key(key) for key in (*keys, _WITNESS)]
        with self._turns["lookup"]:
            task = self._adapter.submit_lookup_and_lock_task(wanted, {})
            found: list[Any] = []

            def answer() -> bool:
                bits = self._adapter.query_lookup_and_lock_result(task)
                found.extend([bits] if bits is not None else [])
                return bool(found)

            self._wait(self._adapter.get_lookup_and_lock_event_fd(), answer)
        is_there = [bool(found[0].test(i)) for i in range(len(wanted))]
        self._adapter.submit_unlock([key for key, there in zip(wanted, is_there, strict=True) if there])
        return is_there

    def _store(self, keys: Sequence[BlobKey], buffers: Sequence[memoryview]) -> None:
        with self._turns["store"]:
            adapter, objects = self._adapter, self._objects(buffers)
            tasks = {
                adapter.submit_store_task([_object_key(key)], [value]) for key, value in zip(keys, objects, strict=True)
            }
            stored: dict[int, bool] = {}

            def answer() -> bool:
                results = adapter.pop_completed_store_tasks()
                stored.update((task, bool(result.is_successful())) for task, result in results.items())
                return tasks <= stored.keys()

            self._wait(adapter.get_store_event_fd(), answer)
            self._check(all(stored.values()), "a value was not taken")
            del self._kept[id(objects)]

    def _objects(self, buffers: Sequence[memoryview]) -> list[Any]:
        """The buffers as lmcache wants them, without a copy."""
        import torch
        from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj

        objects = []
        for buffer in buffers:
            rows = torch.frombuffer(buffer, dtype=torch.uint8)
            shape, dtype = rows.shape, rows.dtype
            facts = MemoryObjMetadata(shape, dtype, rows.data_ptr(), len(rows), 1, shapes=[shape], dtypes=[dtype])
            objects.append(TensorMemoryObj(rows, facts, None))
        self._kept[id(objects)] = objects
        return objects

    def _wait(self, fd: int, is_done: Callable[[], bool]) -> None:
        """Until `is_done`, which is asked whenever lmcache has signalled something."""
        from lmcache.v1.platform import consume_fd

        deadline = time.monotonic() + self._timeout_s
        event = select.poll()
        event.register(fd, select.POLLIN)
        while not is_done():
            if self._is_broken:
                raise AdapterError("it has failed meanwhile")
            if time.monotonic() > deadline:
                self._fail(AdapterTimeoutError(f"no answer in {self._timeout_s:g} s"))
            if event.poll(_POLL_S * 1000):
                consume_fd(fd)

    def _check(self, is_fine: bool, reason: str) -> None:
        if not is_fine:
            self._fail(AdapterError(reason))

    def _fail(self, error: AdapterError) -> NoReturn:
        self._is_broken = True
        raise error


def _object_key(key: BlobKey) -> Any:
    from lmcache.v1.distributed.api import ObjectKey

    return ObjectKey(key.key, NAMESPACE, key.world_size << 16 | key.rank, key.number, key.tenant)
