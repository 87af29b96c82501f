"""Recompute samples that stand for all of a span; its other tokens follow the change that these show.

What stands before an image (a number, a legend, a role) changes the KV of its tokens: partly all alike, partly by what
each of them holds. So samples are tokens that differ as much as may be, and each reused token follows those that it is
like (`exec.content`, `exec.shift`). Naive reuse loses this part of the context, and so does `leading`, whose tokens
know their new context while all others keep the old one.

Cost: that of `leading` at the same ratio, as far as that is computing; attention of samples late in a span reads more
keys, and the others cost one product of weights and changes per layer. Source: our own; samples by farthest-first
traversal, weights by ridge regression.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from vlcache_connector.policy.base import Policy, num_chosen
from vlcache_connector.types import Run

MIN_SAMPLES = 12
"""Fewer do not cover what a picture holds, however small it is."""


class Shifted(Policy):
    name = "shifted"
    shifts = True

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        count = num_chosen(length, ratio, MIN_SAMPLES)
        if count == 0:
            return ()
        if count == length:
            return (Run(0, length),)
        chosen = dict.fromkeys(islice(order, count))
        for token in _scattered(length):
            if len(chosen) == count:
                break
            chosen[token] = None
        return _joined(sorted(chosen))


def _scattered(length: int) -> Iterator[int]:
    """All tokens, some of them again: where the whole begins, its second half, then each half's second half and so on,
    so that the first n are everywhere (van der Corput 1935).
    """
    bits = (length - 1).bit_length()
    for number in range(1 << bits):
        yield int(f"{number:0{bits}b}"[::-1], 2) * length >> bits


def _joined(tokens: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    start = previous = tokens[0]
    for token in tokens[1:]:
        if token > previous + 1:
            runs.append(Run(start, previous + 1))
            start = token
        previous = token
    return (*runs, Run(start, previous + 1))
