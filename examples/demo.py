"""Plain vLLM and vLLM with VLCache serve the same chats about the same photographs; measured and checked.

    make demo          (or: python examples/demo.py, in an environment with vLLM and this package)

First the time, on a large model with random weights; then the answers, on a small model that was trained.

The real OpenAI server runs twice, first without and then with the connector's flag, on a checkpoint of Qwen2.5-VL's
architecture with random weights. Each photograph is asked about alone first; then they come back under other system
prompts, with other questions, in other orders and numbers. Exits with 1 when something promised did not happen.

The photographs come with scikit-learn and matplotlib: "china" by danielbuechele and "flower" by vultilion, both CC BY
2.0, and "hopper", a portrait by the US Navy in the public domain; more in tests/bench/photos.py.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from demo_answers import Answered, ask_trained_model, check_answers, summary  # noqa: E402
from demo_checks import Comparison, check_all, noise_of  # noqa: E402
from demo_plot import plot, plot_answers  # noqa: E402
from demo_requests import FIRST_SEEN, MEGAPIXELS, SEEN_BEFORE, Answer, Client, Question, median_answer  # noqa: E402
from demo_server import ServerError, print_tail, serve, worker_cores  # noqa: E402

from bench import photos  # noqa: E402
from bench.results import OUT, circumstances, say, shown, table, warn_when_busy, write_json  # noqa: E402
from checkpoints import cached_checkpoint  # noqa: E402

REPEATS = 3  # of what takes a fraction of a second; of these the median counts
PLAIN_LOG, FLAG_LOG = OUT / "demo-plain.log", OUT / "demo-vlcache.log"
OFF_QUESTIONS = (SEEN_BEFORE[0], SEEN_BEFORE[3])  # also asked in mode "off"

OPTIONS = {
    "--served-model-name": "demo",
    "--max-model-len": "16384",
    "--max-num-batched-tokens": "16384",  # no prompt is cut into chunks, so one request is one step of the engine
    "--max-num-seqs": "4",
    "--limit-mm-per-prompt": '{"image": 4, "video": 0}',
    # One encoder block in eight attends to the whole picture, the others to windows, as in the released models.
    "--hf-overrides": '{"vision_config": {"fullatt_block_indexes": [7]}}',
}
# Compiling took longer than this whole demo on two cores, and what is compared is computed eagerly on both servers.
# Profiling only serves to size the KV cache, whose size is given.
SWITCHES = ["--enforce-eager", "--skip-mm-profiling", "--enable-logging-iteration-details"]
FLAG = {
    "kv_connector": "VLCacheConnector",
    "kv_connector_module_path": "vlcache_connector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"recompute_ratio": 0.05, "host_gib": 2},
}
NOTES = """\
Reading the table
  - plain: vLLM without the flag, prefix and encoder caches empty, so that encoder and prefill run. exact hit: the same
    prompt again on plain vLLM. reuse: vLLM with the flag, its own prefix and encoder caches emptied before.
    An exact hit computes the prompt's last, incomplete block of up to 128 tokens again.
  - Times are those of an HTTP client that asks for one token. Decoding the JPEG is in all of them; preprocessing for
    the encoder is in none, because both servers had preprocessed the photographs before.
  - recomputed: the text in front and 5 % of each picture, by our pass. computed: the question, by the engine.
  - tie: another first token, but plain vLLM's lead for its own token is within the noise.
  - The weights are random. With 5 % recomputed, such a model's answers differ from plain vLLM's more than a trained
    model's: these columns say what reuse costs and saves; what it does to answers is the second part. With all tokens
    recomputed (ratio 1.0) the same machinery must give plain vLLM's answer. That is checked.
  - Both servers run with --enforce-eager: on two cores, compiling takes longer than this whole demo."""


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    fresh: Answer
    exact: list[Answer]


def server_options(with_flag: bool) -> list[str]:
    options = [word for option in OPTIONS.items() for word in option] + SWITCHES
    return [*options, "--kv-transfer-config", json.dumps(FLAG)] if with_flag else options


def tell(what: str, question: Question, answer: Answer) -> None:
    say(f"  {question.title:26s} {what:22s} {answer.ttft_s * 1e3:8.0f} ms, encoder ran for {answer.encoder_runs}")


def warm_up(client: Client) -> None:
    """First calls of every code path pay for what later ones do not; the photographs' pixels get preprocessed."""
    for question in FIRST_SEEN:
        client.ask(question, {"mode": "off"})
    say("  warmed up, pixels of all photographs preprocessed")


def ask_plain(model: Path) -> dict[str, PlainAnswers]:
    """Each question twice: nothing cached, then as an exact hit."""
    answers = {}
    say(f"1. plain vLLM starts (log: {shown(PLAIN_LOG)})")
    with serve(model, server_options(with_flag=False), PLAIN_LOG) as server:
        client = Client(server, PLAIN_LOG)
        say("  ready")
        warm_up(client)
        for question in (*FIRST_SEEN, *SEEN_BEFORE):
            client.forget()
            fresh = client.ask(question)
            tell("plain", question, fresh)
            exact = [client.ask(question) for _ in range(REPEATS)]
            tell("exact hit", question, median_answer(exact))
            answers[question.title] = PlainAnswers(fresh, exact)
    say("  stopped")
    return answers


def ask_with_flag(model: Path, plain: dict[str, PlainAnswers]) -> list[Comparison]:
    say(f"2. vLLM with --kv-transfer-config starts (log: {shown(FLAG_LOG)})")
    with serve(model, server_options(with_flag=True), FLAG_LOG) as server:
        client = Client(server, FLAG_LOG)
        say("  ready")
        warm_up(client)
        comparisons = []
        for question in (*FIRST_SEEN, *SEEN_BEFORE):
            known = plain[question.title]
            ask = ask_known if question in SEEN_BEFORE else ask_first
            comparisons.append(ask(client, question, known))
    say("  stopped, nothing of it is left running")
    return comparisons


def ask_first(client: Client, question: Question, plain: PlainAnswers) -> Comparison:
    client.forget()
    first = client.ask(question)
    tell("stored", question, first)
    return Comparison(question, plain.fresh, plain.exact, stored=first)


def ask_known(client: Client, question: Question, plain: PlainAnswers) -> Comparison:
    def fresh(vlcache: dict[str, Any] | None) -> Answer:
        client.forget()
        return client.ask(question, vlcache)

    reuse = [fresh(None) for _ in range(REPEATS)]
    tell("reuse, 5 %", question, median_answer(reuse))
    complete = fresh({"recompute_ratio": 1.0})
    tell("all recomputed", question, complete)
    off = fresh({"mode": "off"}) if question in OFF_QUESTIONS else None
    if off is not None:
        tell('mode "off"', question, off)
    return Comparison(question, plain.fresh, plain.exact, reuse=reuse, complete=complete, off=off)


def print_results(comparisons: list[Comparison], noise: float) -> None:
    header = "request|photos|tokens|plain|exact hit|reuse|plain/reuse|reuse/exact|reused|recomputed|computed|"
    header += "first token|logprob diff|1.0: first token|1.0: logprob diff"
    print("\n" + table(header.split("|"), [c.cells(noise) for c in comparisons if c.reuse]))
    print("\nStored on first sight (the connector copies KV and encoder output aside):")
    rows = [c.stored_cells() for c in comparisons if c.stored]
    print(table(["request", "tokens", "plain", "with flag", "with flag/plain", "logprob diff"], rows))
    print(f"\nNoise of plain vLLM, the same prompt fresh and as an exact hit: logprob differences up to {noise:.4f}\n")
    print(NOTES)
    print("Photographs")
    for name, megapixels in MEGAPIXELS.items():
        print(f"  - {name}, {megapixels} megapixels: {photos.CREDITS[name]}")


def print_answers(answered: list[Answered]) -> None:
    print("\nAnswers of the trained grid model (5 % recomputed; pictures A and B, each seen alone before)")
    header = ["prompt", "truth", "plain", "reuse", "", "reused", "recomputed"]
    print(table(header, [a.cells() for a in answered]))
    print("\n" + table(["questions", "asked", "plain right", "reuse right", "same"], summary(answered)))


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    facts = circumstances()
    warn_when_busy()
    say("0. checkpoint: Qwen2.5-VL architecture, hidden 768, 10 layers, encoder 256 x 8, bf16, random weights")
    model = cached_checkpoint(
        "qwen2_5_vl", 768, 10, root=ROOT / ".checkpoints", vision_hidden=256, vision_depth=8, max_pixels=4_200_000
    )
    try:
        comparisons = ask_with_flag(model, ask_plain(model))
        answered = ask_trained_model()
    except ServerError as error:
        print(f"FAILED: {error}")
        return 1
    noise = noise_of(comparisons)
    print_results(comparisons, noise)
    print_answers(answered)
    cores = [worker_cores(PLAIN_LOG), worker_cores(FLAG_LOG)]
    checks = check_all(comparisons, noise, cores) + check_answers(answered)
    content = {
        "circumstances": facts | {"worker_cores": cores},
        "options": server_options(with_flag=True),
        "photographs": photos.CREDITS,
        "noise": noise,
        "checks": [check.as_json() for check in checks],
        "requests": [comparison.as_json() for comparison in comparisons],
        "answers": [answer.as_json() for answer in answered],
    }
    write_json(OUT / "demo.json", content)
    plot(comparisons, noise, OUT / "demo.png")
    plot_answers(answered, OUT / "demo-answers.png")
    print("\nChecks")
    for check in checks:
        print(f"  {'ok    ' if check.passed else 'FAILED'}  {check.sentence}")
    say("results: " + ", ".join(shown(OUT / name) for name in ("demo.json", "demo.png", "demo-answers.png")))
    if all(check.passed for check in checks):
        return 0
    print_tail(FLAG_LOG)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the server was stopped")
