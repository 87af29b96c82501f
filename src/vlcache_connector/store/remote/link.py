"""The way to a shared store: it connects again when that helps, and gives the store up while it does not answer.

States: in use, or given up. A time-out, or a new connection that does not work, gives the store up; from then on every
operation fails at once, so a dead store costs one time-out. `probe`, which nobody waits for, tries to come back.
An operation that fails while the store answers (a value is gone, no room for one) is that operation's failure alone.
"""

import time
from collections.abc import Callable
from logging import getLogger
from threading import Lock
from typing import TypeVar

from vlcache_connector.store.base import Count
from vlcache_connector.store.remote.adapter import Adapter, AdapterError, AdapterTimeoutError

logger = getLogger(f"vllm.{__name__}")  # below vLLM's own, so its handlers and level apply

_CLOSE_S = 2.0  # an interpreter that ends while lmcache closes an adapter may abort
_PAUSE_S = 0.2  # before an operation is tried once more, times the number of trials

T = TypeVar("T")


class LinkError(OSError):
    """The store did not do what it was asked for."""


class NotConnectedError(LinkError):
    """It was not even asked."""


class Link:
    """Threads may share it. `connect` raises `AdapterError` unless the store answers."""

    def __init__(self, name: str, connect: Callable[[], Adapter], count: Count) -> None:
        self._name, self._connect, self._count = name, connect, count
        self._lock = Lock()  # held while connecting: who needs a connection waits for the same one
        self._adapter: Adapter | None = None
        self._leaving: list[Adapter] = []  # that are being closed
        self._is_closed = False
        self.is_given_up = False
        self.reason = ""  # why it was given up

    def run(self, operation: Callable[[Adapter], T], num_trials: int = 2) -> T:
        """Raises `LinkError`. An operation that fails at once is tried again on a new connection: the old one may have
        been cut, or out of step.
        """
        for trial in range(1, num_trials + 1):
            adapter = self._connected()
            try:
                return operation(adapter)
            except AdapterTimeoutError as error:
                self._count("tier_failures", 1, f"{self._name}_timeout")
                self._give_up(adapter, error)
                raise LinkError(f"the {self._name} store gave no answer: {error}") from error
            except AdapterError as error:
                self._discard(adapter)
                if trial == num_trials:
                    self._count("tier_failures", 1, f"{self._name}_error")
                    raise LinkError(f"the {self._name} store: {error}") from error
                self._count("tier_retries", 1, self._name)
                if trial > 1:
                    time.sleep(_PAUSE_S * trial)
        raise AssertionError("at least one trial")

    def probe(self) -> None:
        """If the store was given up, see whether it answers again."""
        if not self.is_given_up:
            return
        with self._lock:
            if self._is_closed:
                return
            try:
                self._adapter = self._connect()
            except AdapterError as error:
                self.reason = str(error)
                return
            self.is_given_up = False
        self._count("tier_breaker", 1, f"{self._name}_closed")
        logger.warning("VLCache: the %s store answers again", self._name)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            adapters, self._adapter = [self._adapter, *self._leaving], None
        deadline = time.monotonic() + _CLOSE_S
        for adapter in adapters:
            if adapter is not None:
                adapter.close(max(0.0, deadline - time.monotonic()))

    def _connected(self) -> Adapter:
        with self._lock:
            if self.is_given_up or self._is_closed:
                raise NotConnectedError(f"the {self._name} store is not asked until it answers again: {self.reason}")
            if self._adapter is not None:
                return self._adapter
            try:
                self._adapter = self._connect()
            except AdapterError as error:
                self._count("tier_failures", 1, f"{self._name}_connect")
                self._open(error)
                raise NotConnectedError(f"the {self._name} store cannot be reached: {error}") from error
            return self._adapter

    def _discard(self, adapter: Adapter) -> None:
        with self._lock:
            if self._adapter is adapter:
                self._adapter = None
            self._leave(adapter)

    def _give_up(self, adapter: Adapter, error: AdapterError) -> None:
        with self._lock:
            if self._adapter is adapter:
                self._adapter = None
                self._open(error)
            self._leave(adapter)

    def _leave(self, adapter: Adapter) -> None:
        """Close it, in time. Under the lock."""
        adapter.close()
        self._leaving = [left for left in (*self._leaving, adapter) if not left.is_closed]

    def _open(self, error: AdapterError) -> None:
        """Under the lock."""
        self.is_given_up, self.reason = True, str(error)
        self._count("tier_breaker", 1, f"{self._name}_opened")
        logger.warning("VLCache goes on without the %s store until it answers again: %s", self._name, error)
