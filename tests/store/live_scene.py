"""The commands of a running cache over a real host index, without a socket between."""

import threading

from small_host import ENTRY_NBYTES, SlowSnapshots, insert
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import Message, result_of
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostIndex

ABOUT = {"pid": 7, "model": "m", "version": "0", "started_s": 1.0}


class Live:
    """An index with some entries, and the commands over it."""

    def __init__(self, num_entries: int, num_free: int = 4) -> None:
        self.index = HostIndex((num_entries + num_free) * ENTRY_NBYTES, LRU())
        self.lock = threading.RLock()
        self.entries = [insert(self.index, number) for number in range(num_entries)]
        self.snapshots = SlowSnapshots()
        self.commands = LiveCommands(self.index, self.lock, [], lambda: ABOUT, self.snapshots)

    def listed(self, limit: int = 1000, sort: str = "new") -> tuple[list[Message], Message]:
        *entries, last = self.commands.list_entries(limit, sort)
        return [message["entry"] for message in entries], last["result"]

    def problems(self, deep: bool = False) -> list[str]:
        problems: list[str] = result_of(self.commands.check(deep))["problems"]
        return problems
