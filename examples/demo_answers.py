"""The demo's second part: right and wrong answers. A small trained model reads pictures, with and without reuse.

The model is examples/grid_model, its pictures are drawn here. Every picture is shown alone first; then it comes back
behind other text, behind a legend, and beside another picture in both orders. The truth is known for every question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_checks import Check
from demo_server import Server, ServerError, serve
from grid_model.chat import chat_of, pictures_of, with_urls
from grid_model.scenes import Question, Scene, ask, new_scene

from bench.results import OUT, say, shown

MODEL = Path(__file__).parent / "grid_model" / "model"
SEED = 9
QUESTIONS = 4  # of each group
RATIO = 0.05
OPTIONS = ["--served-model-name", "demo", "--max-model-len", "4096", "--max-num-seqs", "4", "--enforce-eager"]
OPTIONS += ["--skip-mm-profiling", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
FIRST_QUESTION = Question("at", ["colour", "at", "c5"], [])  # stores a picture; nobody reads the answer
FLAG = {
    "kv_connector": "VLCacheConnector",
    "kv_connector_module_path": "vlcache_connector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"recompute_ratio": RATIO, "host_gib": 1},
}


@dataclass(frozen=True, slots=True)
class Case:
    """`pictures` names those of the scene, in its order: A and B are the ones that were shown alone."""

    group: str
    pictures: str
    scene: Scene
    question: Question

    @property
    def truth(self) -> str:
        return " ".join(self.question.answer)

    def prompt(self) -> str:
        """The prompt in words, long text before the pictures only by its length."""
        before = [f"({len(self.scene.filler)} words)"] if self.scene.filler else self.scene.opening()
        pictures = [p for i, name in enumerate(self.pictures) for p in (*self.scene.before_picture(i), f"[{name}]")]
        return " ".join([*before, *pictures, *self.question.words])


@dataclass(frozen=True, slots=True)
class Answered:
    case: Case
    plain: str
    reuse: str
    reused_tokens: int
    recomputed_tokens: int

    @property
    def plain_right(self) -> bool:
        return self.plain == self.case.truth

    @property
    def same(self) -> bool:
        return self.reuse == self.plain

    def cells(self) -> list[str]:
        texts = [self.case.prompt(), self.case.truth, self.plain, self.reuse]
        return [*texts, "same" if self.same else "differs", str(self.reused_tokens), str(self.recomputed_tokens)]

    def as_json(self) -> dict[str, Any]:
        asked = {"group": self.case.group, "prompt": self.case.prompt(), "truth": self.case.truth}
        counts = {"reused_tokens": self.reused_tokens, "recomputed_tokens": self.recomputed_tokens}
        return asked | {"plain": self.plain, "reuse": self.reuse, **counts}


def cases() -> tuple[dict[str, Scene], list[Case]]:
    """The pictures alone, by name, and what is asked about them."""
    random = np.random.default_rng(SEED)
    alone = {name: new_scene(random) for name in "AB"}
    filler, legend = new_scene(random, filler=50).filler, new_scene(random, legend=4).legend
    single, multiple = {"at": 2.0, "where": 1.0, "count": 1.0}, {"at": 2.0, "where": 1.0, "which": 1.0}
    asked = []
    for group, names, before, tasks in (
        ("one picture", "A", {}, single),
        ("50 words before", "A", {"filler": filler}, single),
        ("a legend before", "A", {"legend": legend}, {"at": 1.0}),
        ("two pictures", "AB", {}, multiple),
        ("two pictures, other order", "BA", {}, multiple),
        ("from one picture to the other", "AB", {}, {"hop": 1.0}),
    ):
        scene = Scene(np.concatenate([alone[name].pictures for name in names]), **before)
        asked += [Case(group, names, scene, question) for question in ask(scene, random, tasks, QUESTIONS)]
    return alone, asked


def answers(server: Server, asked: Iterable[Case]) -> list[tuple[str, dict[str, Any]]]:
    """Texts, and the connector's account of each; vLLM's own caches are emptied before every question."""
    found = []
    for case in asked:
        if not server.post("/reset_prefix_cache")["success"]:
            raise ServerError("vLLM could not reset its prefix cache: a request still holds blocks")
        server.post("/reset_encoder_cache")
        messages = with_urls(chat_of(case.scene, case.question), pictures_of(case.scene))
        body = {"model": "demo", "messages": messages, "max_tokens": 4, "temperature": 0}
        response = server.post("/v1/chat/completions", body)
        account = (response.get("kv_transfer_params") or {}).get("vlcache") or {}
        found.append((response["choices"][0]["message"]["content"].strip(), account))
    return found


def ask_trained_model() -> list[Answered]:
    """Every question once on plain vLLM, and once where the pictures were seen before. Raises `ServerError`."""
    alone, asked = cases()
    plain_log, flag_log = OUT / "demo-answers-plain.log", OUT / "demo-answers-vlcache.log"
    say(f"3. plain vLLM starts with the trained grid model (log: {shown(plain_log)})")
    with serve(MODEL, OPTIONS, plain_log) as server:
        plain = answers(server, asked)
    say(f"4. vLLM with the flag starts with it (log: {shown(flag_log)})")
    with serve(MODEL, [*OPTIONS, "--kv-transfer-config", json.dumps(FLAG)], flag_log) as server:
        answers(server, [Case("alone", name, scene, FIRST_QUESTION) for name, scene in alone.items()])
        reuse = answers(server, asked)
    say(f"  stopped, {len(asked)} questions asked on both")
    return [
        Answered(case, text, other, account.get("reused_tokens", 0), account.get("recomputed_tokens", 0))
        for case, (text, _), (other, account) in zip(asked, plain, reuse, strict=True)
    ]


def summary(answered: list[Answered]) -> list[list[str]]:
    """For each group how many were asked, right on plain vLLM, right under reuse, and the same on both."""
    rows = []
    for group in dict.fromkeys(a.case.group for a in answered):
        of = [a for a in answered if a.case.group == group]
        counts = (len(of), sum(a.plain_right for a in of), sum(a.reuse == a.case.truth for a in of))
        rows.append([group, *map(str, counts), str(sum(a.same for a in of))])
    return rows


def check_answers(answered: list[Answered]) -> list[Check]:
    return [
        Check("plain vLLM gave the trained model's right answers", _prompts(a for a in answered if not a.plain_right)),
        Check(
            "all its questions about known pictures reused tokens", _prompts(a for a in answered if not a.reused_tokens)
        ),
        Check(
            f"with {RATIO:.0%} recomputed, its answers are plain vLLM's", _prompts(a for a in answered if not a.same)
        ),
    ]


def _prompts(offenders: Iterable[Answered]) -> tuple[str, ...]:
    return tuple(a.case.prompt() for a in offenders)
