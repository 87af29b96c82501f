"""An engine that answers by rule. Its store forgets and learns as the real one does: the order of calls counts."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from vlcache_connector.evaluate.runs import Reply
from vlcache_connector.evaluate.tasks import Chat, images_of

WORDS = ("none", "red", "blue")
TOKENS_PER_IMAGE = 100
TEXT_TOKENS = 20


class StopError(Exception):
    """As when a process ends."""


class FakeAsker:
    """Answers rightly (token 1); the more it reuses the more it doubts. With two pictures its doubts win. Reuse never
    pays in it, so only who wants it at any cost gets it.
    """

    def __init__(self, stop_after: int | None = None, declines: str | None = None) -> None:
        self.calls: list[str] = []
        self.asked: list[tuple[str, ...]] = []  # pictures in the store, at each question
        self._left = stop_after
        self._declines = declines
        self._store: set[str] = set()
        self._prefix: set[str] = set()

    def forget(self, entries: bool) -> None:
        self.calls.append("forget all" if entries else "forget")
        self._prefix.clear()
        if entries:
            self._store.clear()

    def show(self, chat: Chat) -> None:
        self.calls.append("show")
        self._store.update(images_of(chat))
        self._prefix.update(images_of(chat))

    def ask(self, chat: Chat, options: Mapping[str, Any]) -> Reply:
        if self._left == 0:
            raise StopError
        self._left = None if self._left is None else self._left - 1
        assert not self._prefix, "asked behind somebody else's prefix"
        images = images_of(chat)
        self.calls.append(f"ask {options.get('recompute_ratio', 'plain')}")
        self.asked.append(tuple(sorted(self._store & set(images))))
        report = self._report(images, options)
        self._store.update(images)
        doubt = 0.9 * report["reused_tokens"] / max(1, TOKENS_PER_IMAGE * len(images)) * min(1.0, len(images) / 2)
        shares = [1e-3, (1 - 1e-3) * (1 - doubt), (1 - 1e-3) * doubt]
        token = max(range(3), key=lambda t: shares[t])
        logprobs = {t: math.log(share) for t, share in enumerate(shares) if share > 0}
        prompt_tokens = TOKENS_PER_IMAGE * len(images) + TEXT_TOKENS
        return Reply(WORDS[token], token, logprobs, prompt_tokens, report, ttft_s=0.001 * prompt_tokens)

    def close(self) -> None:
        self.calls.append("close")

    def share(self, ratio: float | list[float]) -> float:
        """What a ratio, or one for each layer, counts for."""
        return fmean(ratio) if isinstance(ratio, list) else ratio

    def _report(self, images: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
        plain = {"reused_tokens": 0, "recomputed_tokens": 0}
        if options["mode"] == "off":
            return plain | {"reason": "mode"}
        plan = {"plan": {"spans": [{"length": TOKENS_PER_IMAGE} for _ in images]}}
        if self._declines or not images or images[0] not in self._store:
            return plain | plan | {"reason": self._declines or ("miss" if images else "no_media")}
        if not options.get("at_any_cost"):
            return plain | plan | {"reason": "no_gain"}
        total = TOKENS_PER_IMAGE * len(images)
        recomputed = round(self.share(options["recompute_ratio"]) * total)
        return plan | {"reused_tokens": total - recomputed, "recomputed_tokens": recomputed + 2}
