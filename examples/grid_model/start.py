"""Where training of the language model starts: not at random, but with heads that look where answers are.

Word vectors of colours, shapes, columns, rows and picture numbers are at right angles to all others, and all words
share one direction. From it the first layer makes heads that look a fixed number of positions back, blind to rows and
columns: so a visual token finds the number before its picture, and a name of the legend the word that it stands for.
The two layers behind match content and copy places, or match places and copy content. The others start by attending
to what is similar and copying it (Trockman and Kolter 2023). Training moves all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_model.sizes import GROUP, HEAD_DIM, HIDDEN, KV_HEADS, ROPE_THETA
from grid_model.words import COLOURS, COLUMNS, ID, NUMBERED, PLACES, ROWS, SHAPES, THINGS

BACK = (1, 2, 3, 5)  # positions that the query heads of the first layer look back
SHIFT_PAIRS = (0, 3, 6)  # fast rotary pairs of the temporal axis
SHARED = 0.3


def orthonormal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


@dataclass(frozen=True)
class Words:
    """Unit vectors of all words (vocabulary, 128), and directions by what they tell, each (n, 128)."""

    rows: Tensor
    content: Tensor
    place: Tensor
    number: Tensor
    shared: Tensor
    rest: Tensor


def first_words(vocab_size: int) -> Words:
    groups = ([*COLOURS, *SHAPES, "none"], [*COLUMNS, *ROWS], NUMBERED)
    sizes = [len(group) for group in groups]
    basis = orthonormal(HIDDEN, HIDDEN)
    content, place, number, shared, rest = basis.split([*sizes, 1, HIDDEN - sum(sizes) - 1])
    rows = functional.normalize(torch.randn(vocab_size, len(rest)) @ rest, dim=-1)
    for group, directions in zip(groups, (content, place, number), strict=True):
        rows[torch.tensor([ID[word] for word in group])] = directions
    for word in PLACES:  # starts as the middle of its column and row
        rows[ID[word]] = (rows[ID[word[0]]] + rows[ID[word[1]]]) / 2**0.5
    for word in THINGS:
        colour, shape = word.split("-")
        rows[ID[word]] = (rows[ID[colour]] + rows[ID[shape]]) / 2**0.5
    return Words(rows + SHARED * shared, content, place, number, shared, rest)


@dataclass(frozen=True)
class Heads:
    """Projections of attention, the output still without its factor, and the weight of the norms of query and key."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    sharpness: float


def to_queries(projection: Tensor) -> Tensor:
    """(KV heads x 64, 128), repeated for the query heads that share each."""
    return projection.view(KV_HEADS, 1, HEAD_DIM, HIDDEN).expand(-1, GROUP, -1, -1).reshape(-1, HIDDEN)


def projection_to(wanted: Tensor, *, slow: bool = False) -> Tensor:
    """A projection (64, 128) onto `wanted` (n, 128) and, weakly, onto other directions.

    slow: `wanted` goes to dimensions that M-RoPE hardly turns within some hundred positions.
    """
    others = torch.randn(HEAD_DIM - len(wanted), HIDDEN)
    others = 0.3 * functional.normalize(others - others @ wanted.T @ wanted, dim=-1)
    order = sorted(range(HEAD_DIM), key=lambda i: -(i % (HEAD_DIM // 2)) if slow else i)
    projection = torch.empty(HEAD_DIM, HIDDEN)
    projection[order] = torch.cat((wanted, others))
    return projection


def looking_back(words: Words) -> Heads:
    half = HEAD_DIM // 2
    keys = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
    queries = torch.zeros(KV_HEADS * GROUP, HEAD_DIM, HIDDEN)
    for pair in SHIFT_PAIRS:
        keys[:, pair] = words.shared
        for head, back in enumerate(BACK):
            angle = torch.tensor(back * ROPE_THETA ** (-pair / half))
            queries[head, pair], queries[head, half + pair] = angle.cos() * words.shared, -angle.sin() * words.shared
    values = torch.cat(
        [
            projection_to(torch.cat((words.content, words.number, words.rest[: HEAD_DIM - 21]))),
            projection_to(torch.cat((words.number, words.rest[: HEAD_DIM - 4]))),
        ]
    )
    noise = 0.05 / HIDDEN**0.5
    keys, queries = keys.reshape(-1, HIDDEN), queries.reshape(-1, HIDDEN)
    return Heads(
        queries + noise * torch.randn_like(queries),
        keys + noise * torch.randn_like(keys),
        values,
        to_queries(values).T,
        sharpness=2.0,
    )


def matching(words: Words, second: bool) -> Heads:
    """second: what content matches need not be a place, it may be a name."""
    content, place = (torch.cat((part, words.number)) for part in (words.content, words.place))
    keys = torch.cat([projection_to(part, slow=True) for part in (content, place)])
    found = words.rest[:HEAD_DIM] if second else place
    values = torch.cat([projection_to(part) for part in (found, words.content)])
    return Heads(to_queries(keys), keys, values, to_queries(values).T, sharpness=1.3)


def similar() -> Heads:
    keys = torch.cat([orthonormal(HEAD_DIM, HIDDEN) for _ in range(KV_HEADS)])
    values = orthonormal(KV_HEADS * HEAD_DIM, HIDDEN)
    return Heads(to_queries(keys), keys, values, to_queries(values).T, sharpness=1.3)
