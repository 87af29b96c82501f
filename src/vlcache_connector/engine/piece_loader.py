"""Worker side: what is loaded for a piece of reuse, and what the recompute pass is told of it."""

from functools import partial

import torch
from vllm.logger import init_logger

from vlcache_connector.engine.metadata import ReusePiece, SpanLoad
from vlcache_connector.engine.session import WorkerSession
from vlcache_connector.exec.model import LayerStack, Prompt
from vlcache_connector.exec.narrow import Narrowed
from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import position_delta
from vlcache_connector.exec.sequence import EncoderOutput, SequenceInput
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.exec.transfer import load_runs
from vlcache_connector.store.slab import Slab
from vlcache_connector.types import Extent, Run

logger = init_logger(f"vllm.{__name__}")


class PieceLoader:
    """Moves reused tokens of pieces into the pages, as far as the pass does not do it on its way."""

    def __init__(self, pages: Pages, stack: LayerStack, session: WorkerSession) -> None:
        self._pages = pages
        self._stack = stack
        self._session = session
        self._positions: dict[str, torch.Tensor] = {}  # of requests that have had a piece, but not the last

    def load(self, piece: ReusePiece) -> tuple[SequenceInput, str | None]:
        """The piece's part of the pass, and what went wrong. A piece that failed takes part all the same."""
        if piece.error is not None:
            nothing = torch.empty(0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)
            return SequenceInput(*nothing, (), (), []), piece.error
        narrowed = [_narrowed(piece, span) for span in piece.spans if span.narrowings]
        sequence = partial(
            SequenceInput,
            torch.tensor(piece.prompt.token_ids, dtype=torch.int64),
            block_ids=piece.block_ids,
            runs=piece.recomputed,
            whole=[span.run for span in piece.spans if span.narrowings or shifts(piece, span)],
            narrowed=narrowed,
            question=piece.question if narrowed else None,
        )
        try:
            positions = self._positions_of(piece)
            slab = self._session.slab
            embeddings = [encoder_output(slab, piece.prompt, span.offset, span.embedding) for span in piece.spans]
        except Exception as error:
            logger.exception("VLCache: request %s could not be prepared", piece.request_id)
            anywhere = torch.zeros(3, len(piece.prompt.token_ids), dtype=torch.int64)
            return sequence(anywhere, embeddings=[]), f"preparation: {error}"
        shifted, compared = dict[Run, StoredSpan](), dict[Run, StoredSpan]()
        problem = None
        try:
            for span in piece.spans:
                if shifts(piece, span):
                    shifted[span.run] = self._stored(span, positions)
                    continue
                self._load_span(span, positions, piece.block_ids)
                if span.narrowings and piece.measure is not None:
                    compared[span.run] = self._stored(span, positions)
        except Exception as error:
            logger.exception("VLCache: request %s could not be loaded", piece.request_id)
            problem = f"load: {error}"
        return sequence(positions, embeddings=embeddings, shifted=shifted, compared=compared), problem

    def forget(self, request_id: str) -> None:
        """Its last piece is done."""
        self._positions.pop(request_id, None)

    def _positions_of(self, piece: ReusePiece) -> torch.Tensor:
        if piece.request_id not in self._positions:
            self._positions[piece.request_id] = self._stack.positions(piece.prompt)
        return self._positions[piece.request_id]

    def _load_span(self, span: SpanLoad, positions: torch.Tensor, block_ids: tuple[int, ...]) -> None:
        entry, delta = self._session.slab.kv(span.kv, span.length), self._delta(span, positions)
        nbytes = load_runs(self._pages, self._stack.rope, entry, span.offset, delta, span.reused, block_ids)
        self._session.counters.add("loaded_bytes", nbytes)

    def _stored(self, span: SpanLoad, positions: torch.Tensor) -> StoredSpan:
        """A span that the pass is to load, or to look into."""
        entry, delta = self._session.slab.kv(span.kv, span.length), self._delta(span, positions)
        return StoredSpan(self._pages, self._stack.rope, span.offset, entry, delta, span.reused)

    def _delta(self, span: SpanLoad, positions: torch.Tensor) -> int:
        return position_delta(
            self._session.slab.positions(span.kv, span.length), positions[:, span.run.start : span.run.end]
        )


def encoder_output(slab: Slab, prompt: Prompt, offset: int, extent: Extent) -> EncoderOutput:
    """What is stored at `extent` of the prompt's media item that begins at `offset`."""
    media = prompt.item(offset)
    return EncoderOutput(media.embedded, slab.embedding(extent, media.num_embedded))


def shifts(piece: ReusePiece, span: SpanLoad) -> bool:
    """Whether reused tokens of a span move by what its recomputed ones show."""
    return piece.shifts and bool(span.reused) and any(len(run.intersect(span.run)) for run in piece.recomputed)


def _narrowed(piece: ReusePiece, span: SpanLoad) -> Narrowed:
    num_recomputed = sum(len(run.intersect(span.run)) for run in piece.recomputed)
    return Narrowed(span.run, span.narrowings, num_recomputed)
