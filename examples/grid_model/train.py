"""Trains the grid model on CPU: the encoder first, then the language model through stages of growing difficulty.

    cd examples && python -m grid_model.train RUN --minutes 40 --workers 2

Resumes from RUN/state.safetensors; RUN/log.txt grows. Step n of worker w draws its batch from (seed, n, w): the same
number of workers sees the same data however often a run was interrupted.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from grid_model.batches import IMAGE, Batch, Kind, new_batch
from grid_model.encoder import feature_table, train_encoder
from grid_model.model import Encoder, Language
from grid_model.muon import Muon
from grid_model.run_state import load_state, save_state
from grid_model.stages import STAGES, stage_at
from grid_model.words import VOCAB_SIZE

ENCODER_STEPS = 300
WARM_UP = 30
REPORT = 20  # steps between two lines of the log, each with a checkpoint


def logits_of(model: Language, tables: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and labels (n) of the positions whose next token is part of an answer."""
    main, deep = (table[batch.content, batch.place] for table in tables)
    mask = (batch.ids == IMAGE)[..., None]
    prefix = model.embed[batch.ids].masked_scatter(mask, main)
    features = torch.zeros_like(prefix).masked_scatter(mask, deep)
    hidden = model(prefix, features, batch.at, batch.unseen, batch.branches, batch.branch_at)
    wanted = batch.labels != -100
    return hidden[wanted] @ model.embed.T, batch.labels[wanted]


def correct_by_task(logits: Tensor, labels: Tensor, batch: Batch) -> dict[str, list[int]]:
    """For each task how many questions were answered right in every token, and how many were asked."""
    right = torch.ones(batch.labels.shape, dtype=torch.bool)
    right[batch.labels != -100] = logits.argmax(-1) == labels
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for task, good in zip(batch.tasks.ravel(), right.all(-1).flatten().tolist(), strict=True):
        tally[task][0] += good
        tally[task][1] += 1
    return tally


def average_gradients(model: Language) -> None:
    """Of all workers, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def first_state(seed: int) -> dict[str, Any]:
    """A trained encoder beside a new language model."""
    torch.manual_seed(seed)
    language = Language(VOCAB_SIZE)
    encoder = train_encoder(language.embed.detach(), ENCODER_STEPS)
    return {
        "encoder": encoder.state_dict(),
        "language": language.state_dict(),
        "optimizer": Muon(language).state,
        "step": 0,
        "seconds": 0.0,
    }


class Log:
    """Collects losses and answers between two lines of RUN/log.txt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, kind: Kind, loss: float, counts: dict[str, list[int]]) -> None:
        self.losses.append(loss)
        for task, (good, asked) in counts.items():
            entry = self.tally[f"{kind.name} {task}"]
            entry[0] += good
            entry[1] += asked

    def line(self, start: str) -> None:
        shares = [f"{task} {good / asked:.3f}" for task, (good, asked) in sorted(self.tally.items())]
        text = f"{start} loss {np.mean(self.losses):.3f} | " + " | ".join(shares)
        with self.path.open("a") as file:
            file.write(text + "\n")
        self.losses.clear()
        self.tally.clear()


def work(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """One worker; the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=options.workers)
    state = load_state(folder / "state.safetensors")
    encoder, language = Encoder(), Language(VOCAB_SIZE)
    encoder.load_state_dict(state["encoder"])
    language.load_state_dict(state["language"])
    optimizer = Muon(language)
    optimizer.state = state["optimizer"]
    tables, log, step = feature_table(encoder), Log(folder / "log.txt"), state["step"]
    start, until = time.monotonic() - state["seconds"], time.monotonic() + 60 * options.minutes
    while step < sum(stage.steps for stage in STAGES):
        stage, within = stage_at(step)
        kind = stage.choose(np.random.default_rng([options.seed, step]))  # the same for all workers
        batch = new_batch(kind, stage.size(kind), stage.questions, np.random.default_rng([options.seed, step, rank]))
        logits, labels = logits_of(language, tables, batch)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        average_gradients(language)
        optimizer.step(stage.rate_at(within) * min(1.0, (step + 1) / WARM_UP))
        log.add(kind, loss.item(), correct_by_task(logits, labels, batch))
        step += 1
        if step % REPORT == 0:
            seconds = time.monotonic() - start
            if rank == 0:
                log.line(f"{step} {stage.name} {seconds:.0f} s (CPU {time.process_time():.0f} s)")
                parts = {"language": language.state_dict(), "optimizer": optimizer.state, "encoder": state["encoder"]}
                save_state(folder / "state.safetensors", {**parts, "step": step, "seconds": seconds})
            late = torch.tensor(float(time.monotonic() > until))
            dist.all_reduce(late)
            if late:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="stop at the next checkpoint behind this time")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each step")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not (folder / "state.safetensors").exists():
        torch.set_num_threads(1)
        save_state(folder / "state.safetensors", first_state(options.seed))
    (folder / "meeting").unlink(missing_ok=True)
    spawn(work, (folder, options), nprocs=options.workers)


if __name__ == "__main__":
    main()
