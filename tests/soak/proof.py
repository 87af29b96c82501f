"""The last act of every soak: bytes and pages are spoilt on purpose, and the auditors must notice.

A soak that finds nothing proves nothing unless its eyes were open until the end.
"""

import asyncio
import os
import signal
import time
from pathlib import Path

from e2e.server import Server
from soak import journal, state
from soak.client import connected
from soak.report import Report, read_audits
from soak.settings import Settings
from soak.traffic import Call, Traffic
from soak.verdict import RESOLUTION, Judge, foretold_by_name

_RATIO = 0.37
"""No other request has it, so no blocks of the prefix cache fit."""


async def prove(server: Server, settings: Settings, judge: Judge, report: Report) -> None:
    """Adds to `report` what was not noticed. The engine is idle at first, and good for nothing afterwards."""
    folder, start = Path(settings.folder), time.time()
    for pid in state.ready_processes(folder):
        os.kill(pid, signal.SIGUSR2)
    await asyncio.sleep(1)
    traffic = Traffic(settings.seed, settings.scenes, settings.pictures)
    params = {"mode": "reuse", "recompute_ratio": _RATIO}
    calls = [Call(800_000 + i, i % settings.scenes, "reuse", params, max_tokens=1) for i in range(40)]
    second = Judge(judge.references, judge.noise)
    async with connected(server.url, traffic.scenes) as client:
        second.take(await client.ask_all(calls, 2))
    events = [event for event in journal.read(folder) if event["at_s"] >= start]
    second.finish(foretold_by_name(events), ())
    found = Report({})
    read_audits(events, RESOLUTION, found)
    noticed = {
        "spoilt bytes of an entry": any("changed after they were written" in text for text in found.broken),
        "spoilt pages": any(text.startswith("replay of") for text in found.broken),
        "a wrong answer": any("against loaded" in text for text in second.wrong),
    }
    report.audits["noticed when spoilt"] = sorted(what for what, is_noticed in noticed.items() if is_noticed)
    for what, is_noticed in noticed.items():
        report.expect(is_noticed, f"the auditors did not notice {what}")
