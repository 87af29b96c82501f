"""What the examples show: each answer beside that of plain vLLM, and at the end what reuse has saved.

Nothing here is needed to use VLCache. It adds up `kv_transfer_params["vlcache"]` of the responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("reused", "recomputed", "computed", "prefix_cached")
"""Where the tokens of a prompt come from: an entry; the recompute pass; the engine; vLLM's own prefix cache."""


@dataclass(frozen=True)
class Answer:
    """`report` is the response's `kv_transfer_params["vlcache"]`, asked for with `"explain": true`."""

    text: str
    seconds: float
    report: dict[str, Any]

    @property
    def num_pictures_covered(self) -> int:
        """Pictures that the encoder was not run for, because stored KV covers them."""
        return sum(bool(span["reused"]) for span in self.report["plan"]["spans"])


@dataclass
class Savings:
    """Sums over the requests that were shown."""

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    num_requests: int = 0
    num_equal: int = 0
    encoder_runs: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    def show(self, title: str, answer: Answer, plain: Answer) -> None:
        """Print one request, and add it up."""
        counts = {kind: int(answer.report[f"{kind}_tokens"]) for kind in KINDS}
        for kind, count in counts.items():
            self.tokens[kind] += count
        self.num_requests += 1
        self.num_equal += answer.text == plain.text
        self.encoder_runs += answer.num_pictures_covered
        self.seconds += answer.seconds
        self.plain_seconds += plain.seconds
        shown = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count)
        print(f"{title}\n    answer {answer.text!r}, of plain vLLM {plain.text!r}")
        print(
            f"    tokens: {shown}; {answer.seconds * 1e3:.0f} ms, plain vLLM {plain.seconds * 1e3:.0f} ms", flush=True
        )

    def close(self) -> int:
        """Print the last line; returns the exit status, 1 when nothing was reused."""
        tokens, total = self.tokens, sum(self.tokens.values())
        print(f"\n{self.num_equal} of {self.num_requests} answers are those of plain vLLM.")
        print(
            f"saved: {tokens['reused']} of {total} prompt tokens reused ({tokens['recomputed']} recomputed), "
            f"{self.encoder_runs} encoder runs avoided, {self.seconds:.2f} s instead of {self.plain_seconds:.2f} s"
        )
        return 0 if tokens["reused"] > 0 else 1
