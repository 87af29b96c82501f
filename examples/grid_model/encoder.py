"""Stage 1: the encoder learns to say of each token, in the language model's own word vectors, what is where."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from grid_model.model import Encoder
from grid_model.pictures import NUM_CONTENTS, TOKENS, token_patches
from grid_model.words import COLOURS, COLUMNS, ID, ROWS, SHAPES


def targets(embed: Tensor) -> Tensor:
    """(NUM_CONTENTS, 256, 128): the sum of the vectors of colour, shape, column and row (colour and shape: `none`)."""
    words = [[ID["none"], ID["none"]]] + [[ID[c], ID[s]] for c in COLOURS for s in SHAPES]
    content = embed[torch.tensor(words)].sum(1)
    places = [[ID[COLUMNS[t % TOKENS // 2]], ID[ROWS[t // TOKENS // 2]]] for t in range(TOKENS * TOKENS)]
    return content[:, None] + embed[torch.tensor(places)].sum(1)


def train_encoder(embed: Tensor, steps: int, batch: int = 512) -> Encoder:
    encoder, wanted = Encoder(), targets(embed)
    patches = torch.from_numpy(token_patches())
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    random, start = np.random.default_rng(0), time.monotonic()
    for step in range(steps):
        content = torch.from_numpy(random.integers(0, NUM_CONTENTS, batch))
        row, column = (torch.from_numpy(random.integers(0, TOKENS, batch)) for _ in range(2))
        main, deep = encoder(patches[content, row % 2, column % 2], row, column)
        want = wanted[content, row * TOKENS + column]
        loss = ((main - want) ** 2).mean() + 0.3 * ((deep - want) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            error = ((main - want) ** 2).mean() / want.var()
            print(f"encoder {step} relative error {error.item():.4f} {time.monotonic() - start:.0f}s", flush=True)
    return encoder


@torch.no_grad()
def feature_table(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Tokens and DeepStack features of every content at every position, both (NUM_CONTENTS, 256, 128)."""
    patches = torch.from_numpy(token_patches())
    row, column = torch.meshgrid(torch.arange(TOKENS), torch.arange(TOKENS), indexing="ij")
    row, column = row.flatten(), column.flatten()
    tables = [encoder(cell[row % 2, column % 2], row, column) for cell in patches]
    return torch.stack([main for main, _ in tables]), torch.stack([deep for _, deep in tables])
