"""Functions that run in the engine's process: they look at the connector's state, or plant a fault in it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.sampling_params import RequestOutputKind

from e2e.engine import Answer, Ask, answer_of, request_of
from vlcache_connector.engine import fetches
from vlcache_connector.engine.kv_worker import VLCacheWorker
from vlcache_connector.engine.metadata import ReusePiece
from vlcache_connector.engine.session import SCHEDULERS
from vlcache_connector.exec import audit, recompute
from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.transfer import save_run
from vlcache_connector.metrics import merge
from vlcache_connector.plan.costs import Prices
from vlcache_connector.plan.keys import tenant_tag
from vlcache_connector.types import Run

_undo: list[Callable[[], None]] = []


def core(llm: Any) -> Any:
    """vLLM's engine core, when it runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def session(llm: Any) -> Any:
    return SCHEDULERS._sessions[llm.llm_engine.vllm_config.instance_id][0]


def worker(llm: Any) -> VLCacheWorker:
    return get_kv_transfer_group()._worker  # type: ignore[union-attr]


def model(llm: Any) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner.model


def accepts_embedding_inputs(llm: Any) -> bool:
    return bool(llm.llm_engine.vllm_config.model_config.multimodal_config.enable_mm_embeds)


def entry_sizes(llm: Any) -> list[int]:
    """Bytes of the entries that can be found, KV and embeddings alike."""
    index = session(llm).index
    return [entry.extent.nbytes for key, entry in index._entries.items() if index.get(key) is not None]


def kv_nbytes_of_a_token(llm: Any) -> int:
    """In the pages, all layers."""
    pages = worker(llm)._pages
    assert pages is not None
    heads, dim = pages.row_shape
    return len(pages.caches) * 2 * heads * dim * pages.dtype.itemsize


def num_kv_entries(llm: Any) -> int:
    """Entries that hold KV: those whose size fits their tokens' KV, not their embedding."""
    index, layout = session(llm).index, session(llm).layout
    return sum(
        entry.extent.nbytes >= layout.kv_nbytes(entry.num_tokens)
        for key, entry in index._entries.items()
        if index.get(key) is not None
    )


def cached_hashes(llm: Any, ask: Ask) -> int:
    """How many leading blocks of a plain request for this prompt are in vLLM's prefix cache."""
    prompt, sampling = request_of(ask)
    llm.llm_engine.add_request("probe", prompt, sampling)
    scheduler = core(llm).scheduler
    (request,) = scheduler.requests.values()
    pool = scheduler.kv_cache_manager.block_pool
    found = [pool.get_cached_block(block_hash, [0]) is not None for block_hash in request.block_hashes]
    llm.llm_engine.abort_request([request.request_id], internal=True)
    while llm.llm_engine.has_unfinished_requests() or scheduler.requests:
        llm.llm_engine.step()
    return sum(found)


def reset_store(llm: Any) -> None:
    core(llm).scheduler.connector.reset_cache()


def drain(llm: Any) -> bool:
    """Wait until everything that is to be written is written."""
    return bool(session(llm).lower.drain(30))


def be_patient(llm: Any) -> None:
    """Let requests wait for a disk longer than computing takes: the model is small, and tests share the machine."""
    fetches.MIN_WAIT_S = fetches.MAX_WAIT_S = 60.0


def forget_host_tier(llm: Any) -> None:
    """Evict everything from host memory, as room for new entries does."""
    index = session(llm).index
    for entry in list(index._entries.values()):
        index._remove(entry)


def check_store(llm: Any) -> None:
    """The index agrees with itself, and nothing is pinned or under way between requests."""
    state = session(llm)
    state.index.check()
    assert not state._jobs, f"jobs were never answered: {state._jobs}"
    assert all(entry.pins == 0 for entry in state.index._entries.values()), "a pin leaked"


def counters(llm: Any) -> dict[str, Any]:
    """What both sides have measured since the last call."""
    stats = core(llm).scheduler.connector.get_kv_connector_stats()
    total = dict(_seen(llm))
    _seen(llm).clear()
    merge(total, stats.data if stats else {})
    return total


_seen_counts: dict[str, Any] = {}


def _seen(llm: Any) -> dict[str, Any]:
    return _seen_counts


def watch_counters(llm: Any) -> None:
    """Keep what the engine takes from the counters at every step, for `counters`."""
    connector_class = type(core(llm).scheduler.connector)
    take = connector_class.get_kv_connector_stats

    def taking(connector: Any) -> Any:
        stats = take(connector)
        merge(_seen_counts, stats.data if stats else {})
        return stats

    connector_class.get_kv_connector_stats = taking


def count_encoder_runs(llm: Any) -> int:
    """How many images the vision encoder has processed since the last call. The first call starts counting."""
    visual = model(llm).visual
    if not hasattr(visual, "_images_seen"):
        visual._images_seen = 0
        forward = visual.forward

        def counting(x: torch.Tensor, grid_thw: Any, *args: Any, **kwargs: Any) -> Any:
            visual._images_seen += len(grid_thw)
            return forward(x, grid_thw, *args, **kwargs)

        visual.forward = counting
    seen, visual._images_seen = visual._images_seen, 0
    return int(seen)


def audit_everything(llm: Any) -> None:
    """From here on all reuse is audited, and what full computation gives is kept."""
    side, compare = session(llm), audit._divergence
    options = side.options
    side.options = replace(options, audit_fraction=1.0)
    _undo.append(lambda: setattr(side, "options", options))

    def watching(true: torch.Tensor, other: torch.Tensor) -> Any:
        _audited.append(true.float().log_softmax(-1))
        return compare(true, other)

    audit._divergence = watching  # type: ignore[assignment]
    _undo.append(lambda: setattr(audit, "_divergence", compare))


_audited: list[torch.Tensor] = []


def last_audit(llm: Any) -> list[float]:
    """Log-probabilities of the first token that the latest audit found by full computation."""
    found: list[float] = _audited[-1].tolist()
    return found


def run_idle(llm: Any) -> int:
    """Step the idle engine as its busy loop does, until it has nothing left to do; returns the number of steps."""
    steps = 0
    while core(llm).scheduler.has_requests():
        core(llm).step_fn()
        steps += 1
        assert steps < 100, "the engine never gets idle"
    return steps


def plant(llm: Any, owner: str, name: str, times: int = 1) -> None:
    """Make `owner.name` (a dotted path to a class or module, and a function in it) raise the next `times` times."""
    target = _owner_of(owner)
    original = getattr(target, name)
    left = times

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            raise RuntimeError(f"planted in {name}")
        return original(*args, **kwargs)

    setattr(target, name, raising)
    _undo.append(lambda: setattr(target, name, original))


def _owner_of(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    module = __import__(module_name, fromlist=["x"])
    return getattr(module, attribute) if attribute else module


def repair(llm: Any) -> None:
    """Take all planted faults back."""
    while _undo:
        _undo.pop()()


def count_calls(llm: Any, owner: str, name: str) -> None:
    """Count calls of `owner.name`, as for `plant`, for `num_calls`."""
    target = _owner_of(owner)
    function = getattr(target, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        _calls.append(name)
        return function(*args, **kwargs)

    setattr(target, name, counting)
    _undo.append(lambda: setattr(target, name, function))


_calls: list[str] = []


def num_calls(llm: Any) -> int:
    """Calls since the last time this was asked."""
    count = len(_calls)
    _calls.clear()
    return count


def prices(llm: Any) -> dict[str, float | None]:
    """Seconds per token of each kind of work, as measured so far."""
    found = session(llm).prices
    return {kind: getattr(found, kind).per_token_s for kind in ("compute", "recompute", "load", "encode")}


def set_prices(llm: Any, per_token_s: dict[str, float]) -> None:
    """As if this had been measured; forgotten again with `repair`."""
    forget_prices(llm)
    for kind, seconds in per_token_s.items():
        for _ in range(32):
            session(llm).prices.add(kind, 1, seconds)


def forget_prices(llm: Any) -> None:
    state = session(llm)
    state.prices = Prices()
    _undo.append(lambda: setattr(state, "prices", Prices()))


def plant_on_rank(llm: Any, rank: int, owner: str, name: str) -> None:
    """`plant`, once, in one worker process of a tensor-parallel engine."""
    llm.collective_rpc(_plant_if, args=(rank, owner, name))


def repair_all_ranks(llm: Any) -> None:
    llm.collective_rpc(repair)


def _plant_if(worker_of_vllm: Any, rank: int, owner: str, name: str) -> None:
    if worker_of_vllm.rank == rank:
        plant(None, owner, name)


def watch_narrowed(llm: Any) -> None:
    """Note on all ranks which tokens passes go on with, for `narrowed`."""
    llm.collective_rpc(_watch_narrowed)


def narrowed(llm: Any) -> list[list[list[int]]]:
    """Of each rank, positions of each pass that has become smaller."""
    found: list[list[list[int]]] = llm.collective_rpc(_narrowed)
    return found


def _watch_narrowed(worker_of_vllm: Any) -> None:
    choose = recompute.kept_at
    _left.clear()

    def noting(layer: int, batch: VirtualBatch, *others: Any) -> torch.Tensor:
        keep = choose(layer, batch, *others)
        _left.append(batch.positions[keep].tolist())
        return keep

    recompute.kept_at = noting  # type: ignore[assignment]
    _undo.append(lambda: setattr(recompute, "kept_at", choose))


def _narrowed(worker_of_vllm: Any) -> list[list[int]]:
    return _left


_left: list[list[int]] = []


def drive(llm: Any, asks: Sequence[tuple[int, Ask]]) -> list[Answer]:
    """Answers of requests that arrive at given engine steps, in the order of `asks`."""
    waiting = sorted(range(len(asks)), key=lambda i: asks[i][0])
    answers: dict[str, Answer] = {}
    step = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and asks[waiting[0]][0] <= step:
            number = waiting.pop(0)
            prompt, sampling = request_of(asks[number][1])
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            llm.llm_engine.add_request(f"driven-{number}", prompt, sampling)
        for output in llm.llm_engine.step():
            answers[output.request_id] = answer_of(output)
        step += 1
    return [answers[f"driven-{number}"] for number in range(len(asks))]


def compute_prefix(llm: Any, ask: Ask, num_tokens: int) -> int:
    """Bring the whole blocks of a prompt's first tokens, and no others, into vLLM's prefix cache; returns their
    tokens.
    """
    prompt, sampling = request_of(ask)
    llm.llm_engine.add_request("prefix", prompt, sampling)
    scheduler = core(llm).scheduler
    blocks: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        (request_id,) = scheduler.requests
        llm.llm_engine.step()
        if request_id in scheduler.requests:
            blocks = list(scheduler.kv_cache_manager.get_block_ids(request_id)[0])
    keep = num_tokens // scheduler.block_size
    assert keep < len(blocks), "the prompt is too short, or its request ended in its first step"
    scheduler.kv_cache_manager.block_pool.evict_blocks(set(blocks[keep:]))
    return int(keep * scheduler.block_size)


def num_free_blocks(llm: Any) -> int:
    """Blocks that no request holds."""
    return int(core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def abort_after(llm: Any, ask: Ask, steps: int) -> None:
    """Start a request, and abort it after so many engine steps."""
    prompt, sampling = request_of(ask)
    llm.llm_engine.add_request("aborted", prompt, sampling)
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["aborted"])


def watch_steps(llm: Any) -> None:
    """Note of each step how many tokens the engine computes and how many the pieces of reuse recompute."""
    _watched_steps.clear()
    scheduler_side = core(llm).scheduler.connector._scheduler
    build = scheduler_side.build_connector_meta

    def watching(output: Any) -> Any:
        metadata = build(output)
        recomputed = sum(len(run) for piece in metadata.reuse for run in piece.recomputed)
        _watched_steps.append((output.total_num_scheduled_tokens, recomputed))
        return metadata

    scheduler_side.build_connector_meta = watching
    _undo.append(lambda: setattr(scheduler_side, "build_connector_meta", build))


_watched_steps: list[tuple[int, int]] = []


def watched_steps(llm: Any) -> list[tuple[int, int]]:
    return _watched_steps


# -- what a reuse job left in the pages -------------------------------------------------------------------------------


def watch_jobs(llm: Any) -> None:
    """Keep the pieces of each reuse job together with the pages that the last one left behind."""
    reuse = VLCacheWorker._reuse

    def watching(self: VLCacheWorker, pieces: Sequence[ReusePiece]) -> None:
        reuse(self, pieces)
        for piece in pieces:
            _open_jobs.setdefault(piece.request_id, []).append(piece)
            if piece.is_last:
                job = _open_jobs.pop(piece.request_id)
                _watched_jobs.append((job, pages_of(self, job)))

    VLCacheWorker._reuse = watching  # type: ignore[method-assign]
    _undo.append(lambda: setattr(VLCacheWorker, "_reuse", reuse))


_open_jobs: dict[str, list[ReusePiece]] = {}
_watched_jobs: list[tuple[list[ReusePiece], torch.Tensor]] = []


def recomputed_by(job: Sequence[ReusePiece]) -> list[Run]:
    return [run for piece in job for run in piece.recomputed]


def pages_of(side: VLCacheWorker, job: Sequence[ReusePiece]) -> torch.Tensor:
    """Keys and values [layers, 2, tokens, heads, dim] of a request up to the end of its covered range."""
    pages = side._pages
    assert pages is not None
    reused = [run for piece in job for span in piece.spans for run in span.reused]
    end = max(run.end for run in (*recomputed_by(job), *reused))
    found = torch.empty(len(pages.caches), 2, end, *pages.row_shape, dtype=pages.dtype)
    save_run(pages, found, Run(0, end), job[-1].block_ids)
    return found


def last_job(llm: Any) -> dict[str, Any]:
    """The latest watched job as plain data: runs, pages, stored entries, positions, embeddings with their tokens."""
    job, pages = _watched_jobs[-1]
    side = worker(llm)
    slab = side._session.slab
    spans = {span.offset: span for piece in job for span in piece.spans}
    token_ids, config = torch.tensor(job[-1].prompt.token_ids), model(llm).config
    media = ((token_ids == config.image_token_id) | (token_ids == config.video_token_id)).nonzero()[:, 0]
    tokens = {span: media[(media >= span.offset) & (media < span.run.end)] for span in spans.values()}
    return {
        "embeddings": [(at, slab.embedding(span.embedding, len(at)).clone()) for span, at in tokens.items()],
        "token_ids": job[-1].prompt.token_ids,
        "positions": side._stack.positions(job[-1].prompt),
        "recomputed": recomputed_by(job),
        "pages": pages,
        "num_pieces": len(job),
        "spans": [
            {
                "offset": span.offset,
                "reused": [run for piece in job for s in piece.spans if s.offset == span.offset for run in s.reused],
                "entry": slab.kv(span.kv, span.length).clone(),
                "stored_positions": slab.positions(span.kv, span.length).clone(),
                "narrowings": span.narrowings,
            }
            for span in spans.values()
        ],
    }


def positions_of(llm: Any, ask: Ask) -> tuple[torch.Tensor, torch.Tensor]:
    """Rope positions [3, tokens] of a prompt: by the adapter, and by the model from what vLLM's processor made."""
    prompt, sampling = request_of(ask)
    llm.llm_engine.add_request("probe", prompt, sampling)
    scheduler = core(llm).scheduler
    (request,) = scheduler.requests.values()
    tokens, features = list(request.prompt_token_ids), request.mm_features
    state = scheduler.connector._scheduler._states[request.request_id]
    found = worker(llm)._stack.positions(state.prompt(len(tokens)))
    expected, _ = model(llm).get_mrope_input_positions(tokens, features)
    llm.llm_engine.abort_request([request.request_id], internal=True)
    while llm.llm_engine.has_unfinished_requests() or scheduler.requests:
        llm.llm_engine.step()
    return found, expected


# -- limits and traces ------------------------------------------------------------------------------------------------


def tag_of(salt: str) -> str:
    return tenant_tag(salt)


def nbytes_by_tenant(llm: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in session(llm).index._entries.values():
        tenant = entry.entry_class.tenant
        found[tenant] = found.get(tenant, 0) + entry.extent.nbytes
    return found


def latest_entry(llm: Any, kind: str) -> tuple[int, float | None]:
    """Tokens of the entry of a kind that was inserted last, and the seconds that a hit of it saves."""
    index = session(llm).index
    entry = [entry for entry in index._entries.values() if entry.entry_class.kind == kind][-1]
    return entry.num_tokens, index._order._all.facts(entry.key).seconds


def end_trace(llm: Any) -> None:
    session(llm).trace.close()
