"""How much sooner is the first token, when all images of a prompt were seen before?

    make bench          (or: python tests/bench/bench_ttft.py [--quick] [--repeats N] [--compiled])

One engine with the connector, in this process. Each prompt is answered in these ways, one after the other, and that is
repeated; ratios are taken within a repeat, so that a slow moment of the machine hits both sides:

    full            mode "off", vLLM's prefix and encoder caches empty: encoder and prefill
    exact hit       mode "off", the same prompt again
    same work n %   mode "off", the same prompt with text behind it, so that vLLM computes exactly as many tokens as in
                    "reuse n %" it and the connector compute together; all others are in its prefix cache
    reuse n %       caches empty again, KV and encoder output from the connector's entries, n % of them recomputed
    layered 5 %     the same, with twice the share in the first layer, ever less in deeper ones and nothing in the last

"Same work" is about the floor of reuse: what it takes to compute its tokens, if all others came back for nothing. So
"same work / exact hit" is what the targets would have to allow, and "reuse / same work" what the connector costs beyond
that. It is no bound: text at the end of a prompt attends to all of it, recomputed tokens of a picture to what stands
before them, so in long prompts, where attention is most of the work, reuse can take less.

Times are the engine's own: from the moment its scheduler has the request until the first token is there. Wall-clock
times of `LLM.generate` are given besides; they add tokenising and hashing the images. Preprocessing images is in
neither: vLLM's cache of preprocessed images stays filled. The engine runs eagerly unless `--compiled` is given, because
compiling takes minutes on a small machine. OMP_NUM_THREADS=1 gives even times also while other work is going on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import photos
from bench.engine import PLACEHOLDER, Engine, Measured, VariantError
from bench.results import OUT, circumstances, say, shown, warn_when_busy, write_json
from bench.ttft_plot import plot
from bench.ttft_report import (
    EXACT,
    FLOOR_PERCENTS,
    FULL,
    LAYERED,
    PERCENTS,
    Case,
    Repeat,
    num_computed,
    print_results,
    report_json,
    reuse,
    same_work,
)

# Image tokens are multiples of the CPU's block size of 128 and the text has about 64 tokens: an exact hit computes the
# prompt's last, incomplete block, so here it computes as many tokens as it does on average, and no more than reuse.
CASES = [
    Case("1 image, 1.7k", (("hopper", 52, 32),)),
    Case("2 images, 1.7k", (("china", 32, 26), ("flower", 32, 26))),
    Case("1 image, 4.1k", (("hopper", 64, 64),)),
    Case("2 images, 4.1k", (("china", 64, 32), ("flower", 64, 32))),
    Case("1 image, 8.2k", (("hopper", 128, 64),)),
    Case("2 images, 8.2k", (("china", 64, 64), ("flower", 64, 64))),
]
QUICK_CASES = 2
MODEL: dict[str, int] = {"hidden": 1024, "layers": 12, "vision_hidden": 512, "vision_depth": 8, "max_pixels": 6_500_000}
ENGINE = {
    "max_model_len": 16384,
    "max_num_batched_tokens": 16384,
    "max_num_seqs": 32,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    # One encoder block in eight attends to the whole picture, the others to windows, as in the released models.
    "hf_overrides": {"vision_config": {"fullatt_block_indexes": [7]}},
}
OPENING = "These pictures come behind words that were never in front of them before, and that is all that is new. "
MORE = "more words, which nobody has to read, stand at the end of it, and they go on for as long as it takes. "
ROUNDED_UP = 4  # recomputed tokens of a prompt beyond its percentage: a part of one for each picture


def shares(num_layers: int) -> list[float]:
    """Of "layered": what each layer recomputes, 5 % on average."""
    return [0.1 * (num_layers - 1 - layer) / (num_layers - 1) for layer in range(num_layers)]


def prompt_of(images: list[Any], opening: str) -> str:
    pictures = " and ".join([PLACEHOLDER] * len(images))
    return f"<|im_start|>user\n{opening}{pictures}What do they show?<|im_end|>\n<|im_start|>assistant\n"


def learn(engine: Engine, images: list[Any]) -> dict[int, int]:
    """Each image alone, under another prompt, so that the connector stores it; then each reuse once, to warm up.

    Percent -> tokens that this reuse computes.
    """
    engine.forget()
    for image in images:
        engine.ask(prompt_of([image], ""), [image], {"mode": "exact"})
    ask_reuse(engine, images, shares(engine.num_layers))
    return {percent: num_computed(ask_reuse(engine, images, percent / 100)) for percent in PERCENTS}


def ask_reuse(engine: Engine, images: list[Any], ratio: float | list[float]) -> Measured:
    engine.forget()
    wanted = {"mode": "reuse", "recompute_ratio": ratio, "at_any_cost": True}
    return engine.ask(prompt_of(images, OPENING), images, wanted)


def repeat_once(engine: Engine, images: list[Any], num_computed_by: Mapping[int, int]) -> Repeat:
    """All variants; `num_computed_by` is from `learn`."""
    text, off = prompt_of(images, OPENING), {"mode": "off"}
    engine.forget()
    repeat = {FULL: engine.ask(text, images, off), EXACT: engine.ask(text, images, off)}
    in_last_block = repeat[FULL].num_prompt_tokens % engine.block_size
    for percent in FLOOR_PERCENTS:
        # The number comes first, so the blocks behind the prompt are those of no other percentage.
        longer = engine.lengthened(text, f"{percent} {MORE}", num_computed_by[percent] - in_last_block)
        repeat[same_work(percent)] = engine.ask(longer, images, off)
    for percent in PERCENTS:
        repeat[reuse(percent)] = ask_reuse(engine, images, percent / 100)
    repeat[LAYERED] = ask_reuse(engine, images, shares(engine.num_layers))
    require_meaning(repeat)
    return repeat


def require_meaning(repeat: Repeat) -> None:
    """Raises `VariantError` when a variant was not what its name says."""
    full, exact = repeat[FULL], repeat[EXACT]
    if full.encoder_runs == 0 or full.accounting["prefix_cached_tokens"] > 0:
        raise VariantError(f"the full prefill was served from a cache: {full}")
    if exact.encoder_runs > 0 or exact.accounting["prefix_cached_tokens"] < full.num_prompt_tokens - 256:
        raise VariantError(f"the exact hit was computed: {exact}")
    most_reused = repeat[reuse(0)].accounting["reused_tokens"]  # all tokens of all pictures
    if most_reused < 0.9 * full.num_prompt_tokens:
        raise VariantError(f"nothing, or little, was reused: {repeat[reuse(0)]}")
    for percent in PERCENTS:
        one = repeat[reuse(percent)]
        num_recomputed = most_reused - one.accounting["reused_tokens"]
        if one.encoder_runs > 0 or not 0 <= num_recomputed - percent / 100 * most_reused <= ROUNDED_UP:
            raise VariantError(f"{num_recomputed} tokens of pictures were recomputed, wanted {percent} %: {one}")
    if repeat[LAYERED].encoder_runs > 0 or repeat[LAYERED].accounting["reused_tokens"] < 0.8 * most_reused:
        raise VariantError(f"nothing, or little, was reused: {repeat[LAYERED]}")
    for percent in FLOOR_PERCENTS:
        one, ours = repeat[same_work(percent)], repeat[reuse(percent)]
        num_tokens = one.num_prompt_tokens - one.accounting["prefix_cached_tokens"]
        if one.encoder_runs > 0 or num_tokens != num_computed(ours):
            raise VariantError(f"{num_tokens} tokens are not the same work: {one} for {ours}")


def measure(engine: Engine, case: Case, repeats: int) -> list[Repeat]:
    images = [photos.of_tokens(*image) for image in case.images]
    num_computed_by = learn(engine, images)
    done = []
    for number in range(1, repeats + 1):
        repeat = repeat_once(engine, images, num_computed_by)
        times = ", ".join(f"{name} {1e3 * one.engine_s:.0f}" for name, one in repeat.items())
        say(f"  {case.title}, {number} of {repeats}: {times} ms")
        done.append(repeat)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the time to the first token with and without reuse.")
    parser.add_argument("--quick", action="store_true", help="the smallest prompts only, 2 repeats")
    parser.add_argument("--repeats", type=int, help="default 5")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model (minutes to start)")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    facts = circumstances() | {"options": vars(options) | {"repeats": repeats}, "model": MODEL, "engine": ENGINE}
    warn_when_busy()
    engine = Engine.start(MODEL, options.compiled, **ENGINE)
    facts["threads"] = engine.num_threads
    try:
        cases = CASES[:QUICK_CASES] if options.quick else CASES
        results = {case: measure(engine, case, repeats) for case in cases}
    except VariantError as error:
        print(f"FAILED: {error}")
        return 1
    print_results(results)
    write_json(OUT / "bench_ttft.json", {"circumstances": facts, "cases": report_json(results)})
    plot(results, OUT / "bench_ttft.png")
    say(f"results: {shown(OUT / 'bench_ttft.json')}, {shown(OUT / 'bench_ttft.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
