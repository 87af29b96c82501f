"""Where training of the language model starts: not at random, but with heads that look where answers are.

Word vectors of colours, shapes, columns, rows and picture numbers are at right angles to all others, and all words
share one direction. From it the first layer makes heads that look a fixed number of positions back, blind to rows and
columns: so a visual token finds the number before its picture, and a name of the legend the word that it stands for.
The layers behind match content and copy places, or match places and copy content; one head of the second can count, and
the third lets visual tokens read the legend. The last starts by attending to what is similar and copying it (Trockman
and Kolter 2023). Training moves all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_model.sizes import GROUP, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, ROPE_THETA
from grid_model.words import COLOURS, COLUMNS, ID, NAMES, NUMBERED, PLACES, ROWS, SHAPES, THINGS

BACK = (1, 2, 3, 5)  # positions that the query heads of the first layer look back
SHIFT_PAIRS = (0, 3, 6)  # fast rotary pairs of the temporal axis
SHARED = 0.3
SINK = 4.0  # the first word then weighs about as much as six matches for the query of a glyph's word
NAMED = 0.8  # names of a legend then weigh more than visual tokens with the same colour


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
    first: Tensor  # what only the first word of a prompt has
    named: Tensor  # what the names of legends share
    rest: Tensor


def first_words(vocab_size: int) -> Words:
    groups = ([*COLOURS, *SHAPES, "none"], [*COLUMNS, *ROWS], NUMBERED)
    sizes = [len(group) for group in groups]
    basis = orthonormal(HIDDEN, HIDDEN)
    content, place, number, shared, first, named, rest = basis.split([*sizes, 1, 1, 1, HIDDEN - sum(sizes) - 3])
    rows = functional.normalize(torch.randn(vocab_size, len(rest)) @ rest, dim=-1)
    for group, directions in zip(groups, (content, place, number), strict=True):
        rows[torch.tensor([ID[word] for word in group])] = directions
    rows[ID["<|im_start|>"]] = first[0]
    names = torch.tensor([ID[word] for word in NAMES])
    rows[names] = functional.normalize(rows[names] + 0.5 * named, dim=-1)
    for word in PLACES:  # starts as the middle of its column and row
        rows[ID[word]] = (rows[ID[word[0]]] + rows[ID[word[1]]]) / 2**0.5
    for word in THINGS:
        colour, shape = word.split("-")
        rows[ID[word]] = (rows[ID[colour]] + rows[ID[shape]]) / 2**0.5
    return Words(rows + SHARED * shared, content, place, number, shared, first, named, rest)


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
    order = [slow_dimension(i) for i in range(HEAD_DIM)] if slow else list(range(HEAD_DIM))
    projection = torch.empty(HEAD_DIM, HIDDEN)
    projection[order] = torch.cat((wanted, others))
    return projection


def slow_dimension(rank: int) -> int:
    """The dimension of a head that M-RoPE turns at the `rank`-th lowest speed."""
    return sorted(range(HEAD_DIM), key=lambda i: -(i % (HEAD_DIM // 2)))[rank]


def looking_back(words: Words) -> Heads:
    half = HEAD_DIM // 2
    keys = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
    queries = torch.zeros(HEADS, HEAD_DIM, HIDDEN)
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


def matching(key_parts: tuple[Tensor, Tensor], value_parts: tuple[Tensor, Tensor]) -> Heads:
    """For each KV head the directions that are compared, and those that are copied."""
    keys = torch.cat([projection_to(part, slow=True) for part in key_parts])
    values = torch.cat([projection_to(part) for part in value_parts])
    return Heads(to_queries(keys), keys, values, to_queries(values).T, sharpness=1.3)


def counting(words: Words) -> Heads:
    """Content finds places, places find content; one query head for content also looks at the first word.

    Softmax gives n equal matches n / (n + c) of its weight when the first word weighs as much as c of them.
    """
    content, place = (torch.cat((part, words.number)) for part in (words.content, words.place))
    heads = matching((torch.cat((content, words.first)), place), (torch.cat((place, words.first)), words.content))
    heads.q.view(HEADS, HEAD_DIM, HIDDEN)[1, slow_dimension(len(content))] = SINK * words.shared
    return heads


def reading_legend(words: Words) -> Heads:
    """Colours find the names that stand behind them in a legend, places find content.

    Visual tokens do this too: behind a legend their keys and values hold its names.
    """
    place = torch.cat((words.place, words.number))
    heads = matching((torch.cat((words.content, words.named)), place), (words.rest[:HEAD_DIM], words.content))
    shapes = words.content[len(COLOURS) :]
    for query in heads.q.view(HEADS, HEAD_DIM, HIDDEN)[:GROUP]:
        query -= query @ shapes.T @ shapes
        query[slow_dimension(len(words.content))] = NAMED * words.shared
    return heads


def reading_names(words: Words) -> Heads:
    """Content finds places, places find content and what `reading_legend` wrote there."""
    content, place = (torch.cat((part, words.number)) for part in (words.content, words.place))
    names = torch.cat((words.content, words.rest[: HEAD_DIM - len(words.content)]))
    return matching((content, place), (place, names))


def similar() -> Heads:
    keys = torch.cat([orthonormal(HEAD_DIM, HIDDEN) for _ in range(KV_HEADS)])
    values = orthonormal(KV_HEADS * HEAD_DIM, HIDDEN)
    return Heads(to_queries(keys), keys, values, to_queries(values).T, sharpness=1.3)
