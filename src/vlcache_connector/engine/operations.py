"""What people do with a running cache: the control socket behind `vlcache`, snapshots, and their restoration.

Scheduler process, threads of its own. Nothing here can fail an engine: what cannot be had is a warning.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vlcache_connector import __version__
from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import Message, commands_of
from vlcache_connector.store.control.server import ControlServer
from vlcache_connector.store.host_bytes import HostBytes
from vlcache_connector.store.snapshot.restore import open_snapshot
from vlcache_connector.store.snapshot.wire import SharedSlab
from vlcache_connector.store.snapshot.writer import SnapshotProgress, SnapshotWriter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vlcache_connector.engine.session import SchedulerSession
    from vlcache_connector.store.slab import SlabBytes

logger = init_logger(f"vllm.{__name__}")

_MIB = 1 << 20


class Operations:
    """One per engine."""

    def __init__(self, vllm_config: "VllmConfig", session: "SchedulerSession", slabs: "list[SlabBytes]") -> None:
        self._session = session
        self._snapshots: Snapshots | None = None
        if session.host_bytes is not None:
            shared = [SharedSlab(slab.file, slab.view) for slab in slabs]
            self._snapshots = Snapshots(session, session.host_bytes, shared)
        self._model = vllm_config.model_config.model
        self._started_s = time.time()
        self._is_closed = threading.Event()
        tiers = session.lower.tiers if session.lower is not None else ()
        commands = LiveCommands(session.index, session.lock, tiers, self._about, self._snapshots)
        rank = vllm_config.parallel_config.data_parallel_rank
        self._server = ControlServer(commands_of(commands), f"{vllm_config.instance_id}-{rank}")
        if self._snapshots is not None and session.options.snapshot_path is not None:
            self._snapshots.prepare()  # before requests come
            threading.Thread(target=self._keep_snapshots, name="vlcache-snapshots", daemon=True).start()

    def close(self) -> None:
        self._is_closed.set()
        self._server.close()
        if self._snapshots is not None:
            self._snapshots.close()

    def _about(self) -> Message:
        return {"pid": os.getpid(), "model": self._model, "version": __version__, "started_s": self._started_s}

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def _keep_snapshots(self) -> None:
        """Restore the last one, then write one from time to time."""
        options = self._session.options
        assert options.snapshot_path is not None and self._snapshots is not None
        path = Path(options.snapshot_path)
        try:
            self._restore(path)
        except Exception as error:
            is_known = isinstance(error, VLCacheError)
            logger.warning("VLCache starts without the snapshot %s: %s", path, error, exc_info=not is_known)
        while options.snapshot_interval_s is not None and not self._is_closed.wait(options.snapshot_interval_s):
            try:
                self._snapshots.start(path, options.snapshot_mib_s * _MIB)
            except VLCacheError as error:
                logger.warning("VLCache writes no snapshot this time: %s", error)

    def _restore(self, path: Path) -> None:
        """Bring up what fits without pushing anything out, the most recently used first."""
        session, lower = self._session, self._session.lower
        if lower is None or session.host_bytes is None or not path.exists():
            return
        saved = open_snapshot(path, session.host_bytes.num_ranks, session.keys.facts)
        start, num_entries = time.monotonic(), 0
        for meta in saved.entries():
            kind, num_tokens = meta.entry_class.kind, meta.num_tokens
            nbytes = session.layout.nbytes(kind, num_tokens)
            with session.lock:
                if session.index.holds(meta.key) or session.index.free_nbytes < nbytes or self._is_closed.is_set():
                    continue
                seconds = session.prices.saved_by(kind, num_tokens)
                lower.fetch(saved.tier, meta.key, nbytes, num_tokens, meta.entry_class, seconds)
            num_entries += 1
            lower.wait_for_room()
        lower.drain(None)
        saved.tier.close()
        logger.info("VLCache restored %d entries from %s in %.1f s", num_entries, path, time.monotonic() - start)


class Snapshots:
    """The engine's snapshot writer, which is a process of its own: started when it is needed for the first time."""

    def __init__(self, session: "SchedulerSession", host_bytes: HostBytes, slabs: Sequence[SharedSlab]) -> None:
        self._session, self._bytes, self._slabs = session, host_bytes, slabs
        self._lock = threading.Lock()
        self._writer: SnapshotWriter | None = None

    @property
    def progress(self) -> SnapshotProgress:
        return self._writer.progress if self._writer is not None else SnapshotProgress()

    def prepare(self) -> SnapshotWriter:
        """Starting a process stops Python for milliseconds."""
        with self._lock:
            if self._writer is None:
                index, lock = self._session.index, self._session.lock
                self._writer = SnapshotWriter(index, lock, self._bytes.kept, self._slabs)
            return self._writer

    def start(self, target: Path, bytes_per_s: float | None = None) -> None:
        self.prepare().start(target, bytes_per_s, self._session.keys.facts)

    def wait(self, timeout_s: float | None = None) -> SnapshotProgress:
        return self._writer.wait(timeout_s) if self._writer is not None else SnapshotProgress()

    def cancel(self) -> None:
        if self._writer is not None:
            self._writer.cancel()

    def close(self) -> None:
        with self._lock:
            if self._writer is not None:
                self._writer.close()
