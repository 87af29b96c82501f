"""Thousands of mixed requests against the real server, with faults planted in it, and every answer checked.

    python tests/soak/soak.py --requests 10000

Ends with a report (also out/soak.json), and with exit code 1 when anything that is promised did not hold.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import time
import urllib.error
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(TESTS)  # in place of this folder, whose modules are a package's

from bench.results import circumstances  # type: ignore[attr-defined]  # noqa: E402  # mypy finds the folder beside it
from checkpoints import cached_checkpoint  # noqa: E402
from e2e.server import Server  # noqa: E402
from soak import journal, state  # noqa: E402
from soak.client import Client, connected, run_waves  # noqa: E402
from soak.faults import SITES  # noqa: E402
from soak.processes import Watch  # noqa: E402
from soak.proof import prove  # noqa: E402
from soak.report import Report, read_audits  # noqa: E402
from soak.settings import Settings  # noqa: E402
from soak.traffic import KINDS, Traffic  # noqa: E402
from soak.verdict import RESOLUTION, Judge, foretold_by_name, gap_of, plain_names, unplanned_errors  # noqa: E402

IDLE_TIMEOUT_S = 60


def run(settings: Settings) -> Report:
    """One soak, from the start of a server to its end."""
    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The engine's encoder cache holds as many tokens as the largest picture may have: few, so that it evicts as well.
    sizes: dict[str, Any] = {"hidden": 256, "layers": 4, "dtype": "float32", "max_pixels": 128 * 1024}
    checkpoint = cached_checkpoint(settings.family, **sizes)  # type: ignore[arg-type]
    report = Report(asdict(settings), circumstances=circumstances())
    with settings.in_environment():
        server = Server(checkpoint, folder / "server.log", *settings.arguments())
    try:
        server.wait_until_ready()
        judge = asyncio.run(_ask_everything(server, settings, report))
        _look_at_the_end(server, settings, report)
        spoilt_at, log = time.time(), server.log_text()
        asyncio.run(prove(server, settings, judge, report))
    finally:
        server.close()
    events = [event for event in journal.read(folder) if event["at_s"] < spoilt_at]
    judge.finish(foretold_by_name(events), plain_names(events))
    read_audits(events, RESOLUTION, report)
    _judge_answers(judge, settings, report)
    report.broken += [f"in the log: {line}" for line in unplanned_errors(log)]
    return report


async def _ask_everything(server: Server, settings: Settings, report: Report) -> Judge:
    traffic = Traffic(settings.seed, settings.scenes, settings.pictures)
    async with connected(server.url, traffic.scenes) as client:
        judge = await _measure_plain(client, traffic)
        watch = Watch(server._process.pid)
        start, done = time.monotonic(), 0

        def after_wave(answers: list[Any]) -> None:
            nonlocal done
            done += len(answers)
            judge.take(answers)
            if done // 500 != (done - len(answers)) // 500:
                print(f"{done} requests, {time.monotonic() - start:.0f} s, {len(judge.wrong)} wrong", flush=True)

        calls = (traffic.call(number) for number in range(settings.requests))
        await run_waves(client, calls, settings.seed, after_wave)
        report.duration_s = time.monotonic() - start
        watch.stop()
        report.resources = watch.summary()
        report.broken += watch.problems()
        await asyncio.sleep(1)
        # What the engine did while idle is reported with the next request.
        last = await client.ask(traffic.plain_call(999_999, 0, "last"))
        report.expect(last.error is None, f"the server does not answer any more: {last.error}")
    return judge


async def _measure_plain(client: Client, traffic: Traffic) -> Judge:
    """Each scene's plain answer on the idle server, and how far such answers differ among themselves."""
    scenes = range(len(traffic.scenes))
    first = 900_000  # numbers of calls that are not part of the traffic
    calls = [traffic.plain_call(first + i, i, f"plain {i}") for i in scenes]
    references = await client.ask_all(calls, 1)
    broken = [answer.error for answer in references if answer.error is not None]
    assert not broken, f"plain requests fail: {broken[:3]}"
    some = scenes[:100]  # the most frequent ones
    beside = [traffic.plain_call(first + 10_000 + i, i, f"beside {i}") for i in some]
    again = [calls[i] for i in some for _ in range(2)]  # the second one finds the first in the prefix cache
    others = [*await client.ask_all(again, 1), *await client.ask_all(beside, 8)]
    return Judge(references, max(gap_of(references[other.call.scene], other) for other in others))


def _look_at_the_end(server: Server, settings: Settings, report: Report) -> None:
    folder = Path(settings.folder)
    try:
        server.get("/health")
        metrics = server.get("/metrics")
    except (urllib.error.URLError, OSError) as error:
        report.broken.append(f"the server is dead: {error}")
        return
    report.metrics = _metrics(metrics)
    rare = ("vlcache_compiled_entries", "vlcache_loaded_embeddings", "num_preemptions")
    usual = ("vlcache_hits", "vlcache_evictions", "vlcache_saved_entries", "vlcache_failures")
    for name in (*usual, *rare) if settings.is_long else usual:
        report.expect(any(n.startswith(name) and v for n, v in report.metrics.items()), f"no {name}")
    sides = state.ready_processes(folder)
    report.expect(set(sides.values()) == {"scheduler", "worker"}, f"processes of the engine: {sides}")
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        report.at_the_end = {f"{sides[pid]} {k}": v for pid in sides for k, v in _dump(folder, pid).items()}
        left = [problem for pid in sides for problem in state.problems(_dump(folder, pid))]
        if not left or time.monotonic() > deadline:
            break
    report.broken += [f"{IDLE_TIMEOUT_S} s after the last request: {problem}" for problem in left]


def _dump(folder: Path, pid: int) -> dict[str, Any]:
    path = folder / f"state-{pid}.json"
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    for _ in range(100):
        time.sleep(0.1)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    return {"answer to the signal": 1}


def _metrics(text: str) -> dict[str, float]:
    wanted = ("vllm:vlcache_", "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total")
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith(wanted) or "_created" in line:
            continue
        name, _, value = line.rpartition(" ")
        name, _, labels = name.removeprefix("vllm:").partition("{")
        extra = [label for label in labels.rstrip("}").split(",") if not label.startswith(("engine=", "model_name="))]
        key = " ".join([name.removesuffix("_total"), *extra]).strip()
        found[key] = found.get(key, 0.0) + float(value)
    return found


def _judge_answers(judge: Judge, settings: Settings, report: Report) -> None:
    report.requests, report.reasons = dict(judge.counts), dict(judge.reasons)
    report.answers = {"noise": judge.noise, "bound": judge.bound, "wrong": len(judge.wrong)}
    report.answers |= {f"largest gap: {against}": gap for against, gap in judge.largest_gap.items()}
    report.broken += [f"wrong answer: {text}" for text in judge.wrong]
    report.broken += [f"no answer: {text}" for text in judge.failed]
    for name in ("given up", "compared: plain", *(["compared: loaded"] if settings.audit_share else [])):
        report.expect(judge.counts[name] > 0, f"none {name}")
    sites = {f"{site.owner}.{site.name}" for site in SITES} - {name.removesuffix(" (late)") for name in report.faults}
    if settings.fault_rate:
        report.expect(not settings.hits_every_site or not sites, f"no fault was planted in {sorted(sites)}")
        report.expect(bool(report.faults), "no fault was planted")
    for kind in KINDS:
        report.expect(judge.counts[f"kind {kind}"] > 0, f"no request of kind {kind!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak the server with mixed requests and planted faults.")
    for name, value in asdict(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    settings = Settings(**vars(parser.parse_args()))
    report = run(settings)
    report.save(Path("out/soak.json"))
    print(report.text())
    sys.exit(1 if report.broken else 0)


if __name__ == "__main__":
    main()
