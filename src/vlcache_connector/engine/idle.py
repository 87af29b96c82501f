"""Media that could not be saved because something before them was reused: their KV is computed when the engine is
idle.

The embedding of such an item is exact and was stored when it was encoded. In an idle step the item is run through the
layers behind the text that opened its conversation, in scratch blocks of the engine's own block pool, and saved as an
exact entry. So a chat that begins with a known picture still learns the later ones.

With the option `entry_context = "alone"` all entries are made here, behind nothing but the token that opens an item:
what a request happened to have before it (a legend, say) is then not in the entry that others get.
"""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlcache_connector.engine.fetches import MAX_WAIT_S
from vlcache_connector.engine.metadata import CompileJob
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import EntryClass, Span

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

_MAX_QUEUED = 256  # prompts are kept in the queue; beyond this, new media are simply not learnt


@dataclass(frozen=True, slots=True)
class _Waiting:
    span: Span  # at its place in `prompt`
    prompt: Prompt
    entry_class: EntryClass
    deadline_s: float  # until then its embedding may be on its way into the store


class CompileQueue:
    """Entries to compute, oldest first. Scheduler side."""

    def __init__(self, session: SchedulerSession, alone: bool) -> None:
        self._session = session
        self._alone = alone
        self._queue: dict[bytes, _Waiting] = {}  # key of the KV entry -> what it is computed from
        self._pool: BlockPool | None = None
        self._block_size = 0

    def __len__(self) -> int:
        return len(self._queue)

    def bind(self, pool: "BlockPool", block_size: int) -> None:
        self._pool, self._block_size = pool, block_size

    def add(self, span: Span, prompt: Prompt, entry_class: EntryClass) -> None:
        """Queue the last item of `prompt`, behind the prompt's opening text, or its own start, and nothing else."""
        if span.kv_key in self._queue:
            return
        if len(self._queue) >= _MAX_QUEUED:
            self._session.counters.add("dropped_saves", label="queue_full")
            return
        before = self._context(prompt, span)
        moved = replace(span, offset=len(before))
        tokens = before + prompt.token_ids[span.offset : span.end]
        behind_opening = Prompt(tokens, (replace(prompt.media[-1], offset=len(before)),))
        self._queue[span.kv_key] = _Waiting(moved, behind_opening, entry_class, time.monotonic() + MAX_WAIT_S)

    def _context(self, prompt: Prompt, span: Span) -> tuple[int, ...]:
        """The tokens behind which an item is computed; none of them is another item's."""
        if not self._alone:
            return prompt.token_ids[: prompt.media[0].offset]
        others_end = max((media.offset + media.length for media in prompt.media[:-1]), default=0)
        return prompt.token_ids[max(others_end, span.offset - 1) : span.offset]

    def clear(self) -> None:
        self._queue.clear()

    def next_job(self) -> CompileJob | None:
        """The next entry's job, or None. What cannot be computed now is dropped, so the queue always drains; but an
        embedding that is being written is waited for: with asynchronous scheduling an idle step is planned before the
        saves of the last step are answered.
        """
        for key, waiting in list(self._queue.items()):
            if self._is_being_written(waiting):
                continue
            del self._queue[key]
            job = self._make_job(waiting)
            if job is not None:
                return job
            self._session.counters.add("dropped_saves", label="not_compiled")
        return None

    def _is_being_written(self, waiting: _Waiting) -> bool:
        """Whether the embedding is there as soon as its writer answers."""
        index, key = self._session.index, waiting.span.embedding_key
        return index.get(key) is None and index.holds(key) and time.monotonic() < waiting.deadline_s

    def _make_job(self, waiting: _Waiting) -> CompileJob | None:
        session, span, pool = self._session, waiting.span, self._pool
        embedding = session.index.get(span.embedding_key)
        num_blocks = -(-span.end // self._block_size)
        if pool is None or embedding is None or embedding.num_tokens != span.num_embedded:
            return None
        if session.index.holds(span.kv_key) or pool.get_num_free_blocks() < num_blocks:
            return None
        session.index.pin(embedding, is_use=False)  # the reservation below must not evict it
        nbytes = session.layout.kv_nbytes(span.length)
        entry = session.reserve(span.kv_key, nbytes, span.length, waiting.entry_class)
        session.index.unpin(embedding)
        if entry is None:
            return None
        blocks = pool.get_new_blocks(num_blocks)
        job_id = session.new_job(pinned=[embedding], written=entry, on_done=lambda error: pool.free_blocks(blocks))
        block_ids = tuple(block.block_id for block in blocks)
        return CompileJob(job_id, waiting.prompt, block_ids, span.run, embedding.extent, entry.extent)
