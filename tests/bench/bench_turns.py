"""Does a conversation that used reuse in its first turn go on as fast as one under plain prefix caching?

    make bench-turns        (or: python tests/bench/bench_turns.py [--quick] [--repeats N])

One engine with the connector, in this process. The same conversation of five turns, whose earlier turns never change,
is held three times per repeat, each time from empty prefix and encoder caches:

    plain       mode "off": plain vLLM with its prefix cache
    plain again the same, which shows how far two equal things differ on this machine
    reuse       mode "reuse": its pictures are known, its turns find the conversation's own approximate blocks

Turns 1 and 4 bring a picture that other conversations have shown before, the others bring text. The order of the three
changes from repeat to repeat; ratios of the time to first token are taken within a repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import photos
from bench.engine import PLACEHOLDER, Engine, Measured, VariantError
from bench.intervals import Interval, median
from bench.results import OUT, circumstances, say, shown, table, warn_when_busy, write_json

MODEL: dict[str, Any] = {"hidden": 512, "layers": 8, "vision_hidden": 256, "vision_depth": 4, "max_pixels": 6_500_000}
ENGINE: dict[str, Any] = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 4,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    "hf_overrides": {"vision_config": {"fullatt_block_indexes": [3]}},
}
SIZE = (48, 32)  # of a picture, in tokens
TEXT = "Look at it closely and tell me in a few words what stands out, what is missing, and what you would change. "
ANSWER = "There is a good deal to see, most of it near the middle, and some of it is rather hard to make out. " * 3
TURNS: tuple[tuple[photos.Name | None, str], ...] = (
    ("china", "What does this show?"),
    (None, TEXT),
    (None, TEXT * 2),
    ("flower", "And how does this one differ?"),
    (None, TEXT),
)
WITH_PICTURE = [number for number, (name, _) in enumerate(TURNS) if name is not None]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "off"},
    "plain again": {"mode": "off"},
    "reuse": {"mode": "reuse", "recompute_ratio": 0.05},
}
OTHERS = ("plain again", "reuse")
ALLOWED = 1.0

Conversation = list[Measured]
Repeat = dict[str, Conversation]


def prompts(opening: str) -> list[tuple[str, list[photos.Name]]]:
    """Text and pictures of each turn's request: all turns so far."""
    found, text, names = [], "", []
    for number, (name, question) in enumerate(TURNS):
        picture = PLACEHOLDER if name is not None else ""
        names += [name] if name is not None else []
        text += f"<|im_start|>user\n{opening if number == 0 else ''}{picture}{question}<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        found.append((text, list(names)))
        text += f"{ANSWER}<|im_end|>\n"
    return found


def hold(engine: Engine, pictures: Mapping[photos.Name, Any], opening: str, vlcache: dict[str, Any]) -> Conversation:
    engine.forget()
    return [engine.ask(text, [pictures[name] for name in names], vlcache) for text, names in prompts(opening)]


def learn(engine: Engine, pictures: Mapping[photos.Name, Any]) -> None:
    """Other conversations show each picture; one more of each kind warms up."""
    for image in pictures.values():
        engine.forget()
        engine.ask(f"<|im_start|>user\n{PLACEHOLDER}", [image], {"mode": "exact"})
    for variant in ("plain", "reuse"):
        hold(engine, pictures, "To warm up. ", VARIANTS[variant])


def require_meaning(repeat: Repeat) -> None:
    """Raises `VariantError` when a turn was not what its name says."""
    for number in range(len(TURNS)):
        plain, reuse = (repeat[name][number].accounting for name in ("plain", "reuse"))
        if (reuse["reused_tokens"] > 0) != (number in WITH_PICTURE):
            raise VariantError(f"turn {number + 1} of the conversation with reuse: {reuse}")
        if reuse["prefix_cached_tokens"] != plain["prefix_cached_tokens"]:
            raise VariantError(f"turn {number + 1} found {reuse} where plain prefix caching found {plain}")
        if number and not reuse["approximate"]:
            raise VariantError(f"turn {number + 1} did not build on reuse: {reuse}")


def measure(engine: Engine, repeats: int) -> list[Repeat]:
    pictures: dict[photos.Name, Any] = {name: photos.of_tokens(name, *SIZE) for name, _ in TURNS if name is not None}
    learn(engine, pictures)
    done = []
    for number in range(repeats):
        names = list(VARIANTS)
        order = names[number % 3 :] + names[: number % 3]
        opening = f"Conversation {number}. "
        held = {name: hold(engine, pictures, opening, VARIANTS[name]) for name in order}
        require_meaning(held)
        times = ", ".join(f"{n} " + " ".join(f"{1e3 * t.engine_s:.0f}" for t in held[n]) for n in names)
        say(f"  {number + 1} of {repeats}: {times} ms")
        done.append(held)
    return done


def ratios(repeats: Sequence[Repeat], turn: int) -> dict[str, Interval]:
    return {
        name: median([held[name][turn].engine_s / held["plain"][turn].engine_s for held in repeats]) for name in OTHERS
    }


def unchanged(repeats: Sequence[Repeat]) -> dict[str, Interval]:
    """Over all turns that bring text only."""
    turns = [turn for turn in range(len(TURNS)) if turn not in WITH_PICTURE]
    return {
        name: median([held[name][turn].engine_s / held["plain"][turn].engine_s for held in repeats for turn in turns])
        for name in OTHERS
    }


def print_results(repeats: Sequence[Repeat]) -> bool:
    """Whether the target is met: not slower on unchanged turns, as far as this machine can tell."""
    rows = []
    for turn, (name, _) in enumerate(TURNS):
        plain, reuse = (median([1e3 * held[v][turn].engine_s for held in repeats]).value for v in ("plain", "reuse"))
        found = ratios(repeats, turn)
        accounting = repeats[0]["reuse"][turn].accounting
        sizes = [f"{accounting[f'{kind}_tokens']}" for kind in ("prefix_cached", "reused", "recomputed", "computed")]
        what = f"{turn + 1}, known picture" if name is not None else f"{turn + 1}, text"
        rows.append([what, *sizes, f"{plain:.0f}", f"{reuse:.0f}", *(str(found[other]) for other in OTHERS)])
    print("\nTime to first token, engine side, medians [ms]; ratios within a repeat: median [95 % interval]")
    header = ["turn", "found", "reused", "recomputed", "computed", "plain", "reuse", "plain again / plain"]
    print(table([*header, "reuse / plain"], rows))
    over_all = unchanged(repeats)
    is_met = over_all["reuse"].value <= max(ALLOWED, over_all["plain again"].high)
    print(f"\nAll turns without a new picture, reuse / plain: {over_all['reuse']}; plain again: ", end="")
    print(f"{over_all['plain again']}; target <= {ALLOWED:g} within noise: {'met' if is_met else 'missed'}\n")
    return is_met


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure later turns of conversations that used reuse.")
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    parser.add_argument("--repeats", type=int, help="default 12")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 12)
    facts = circumstances() | {"repeats": repeats, "model": MODEL, "engine": ENGINE}
    warn_when_busy()
    engine = Engine.start(MODEL, **ENGINE)
    facts["threads"] = engine.num_threads
    try:
        measured = measure(engine, repeats)
    except VariantError as error:
        print(f"FAILED: {error}")
        return 1
    is_met = print_results(measured)
    content = {
        "circumstances": facts,
        "turns": [{name: asdict(one) for name, one in ratios(measured, turn).items()} for turn in range(len(TURNS))],
        "unchanged_turns": {name: asdict(one) for name, one in unchanged(measured).items()},
        "is_met": is_met,
        "repeats": [{name: [asdict(turn) for turn in held[name]] for name in VARIANTS} for held in measured],
    }
    write_json(OUT / "bench_turns.json", content)
    say(f"results: {shown(OUT / 'bench_turns.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
