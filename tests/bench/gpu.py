"""Test and measure the operations on a GPU. `make gpu` builds the library and runs this; neither vLLM nor a network is
needed.

    python tests/bench/gpu.py [--results FOLDER] [--only PART ...] [--engines NAME ...] [--rehearse]

1. checks: all tests of the operations on the device, and a part of them under compute-sanitizer
2. rows: load_rows, save_rows and shift_rows beside copies on the device, and from and to pinned memory
3. attention: sparse_query_attention beside PyTorch's attention and, where vLLM is installed, the engine's
4. engine, where vLLM is installed: reuse end to end, and times to the first token (see gpu_engine.py)

Checks run side by side, and engines start meanwhile. Whatever measures times does so alone.

All that was found goes into one JSON file, tests/bench/results/gpu-<device>-<date>.json. `--rehearse` does all of it on
the CPU with small sizes, to see that this program works; it writes to out/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu_attention, gpu_checks, gpu_rows
from bench.gpu_engines import REHEARSED as REHEARSED_RUNS
from bench.gpu_engines import RUNS, Engines
from bench.gpu_turn import turn
from bench.results import OUT, ROOT, circumstances, say, write_json
from vlcache_connector.kernels import library

RESULTS = ROOT / "tests" / "bench" / "results"


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "libraries": {state.device: state.path.name for state in library.library_report() if state.is_loaded},
        "nvcc": gpu_checks.nvcc_version(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "l2_mib": round(found.L2_cache_size / 2**20),
            "driver": gpu_checks.driver_version(),
            "cuda_of_torch": torch.version.cuda,
        }
    return facts


def failures(results: dict[str, Any]) -> list[str]:
    failed = [f"{check['name']} failed" for check in results.get("checks", ()) if check["outcome"] == "failed"]
    failed += [f"{name}: {value['error']}" for name, value in results.items() if "error" in value]
    for name, engine in results.get("engine", {}).items():
        if name != "error" and engine["outcome"] != "passed":
            failed.append(f"engine {name!r} {engine['outcome']}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["checks", "rows", "attention", "engine"]
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run; default all")
    parser.add_argument("--engines", nargs="+", choices=RUNS, default=list(RUNS), help="engines to run; default all")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else "cuda")
    wanted = "CPU" if options.rehearse else "CUDA"
    if wanted not in library.load_libraries():
        print(f"The {wanted} library is missing, see the warning above.", file=sys.stderr)
        return 1
    head = {**circumstances(), **device_facts(device)}
    name = re.sub(r"[^a-z0-9]+", "-", str(head.get("device", "rehearsal")).lower())
    folder = options.results or (OUT if options.rehearse else RESULTS)
    path = folder / f"gpu-{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
    print(json.dumps(head, indent=2), flush=True)
    results: dict[str, Any] = {}

    def keep(part: str, run: Callable[[], Any]) -> None:
        if part in options.only:
            try:
                results[part] = run()
            except RuntimeError as error:  # the next part may still tell something
                say(f"{part}: {error}")
                results[part] = {"error": str(error)}
            write_json(path, {"circumstances": head, **results})  # whoever runs this may lose patience

    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "turn")
        runs = REHEARSED_RUNS if options.rehearse else {name: RUNS[name] for name in options.engines}
        if find_spec("vllm") is None:
            say("engine: vLLM is not installed here, so nothing is run end to end")
        if "engine" not in options.only or find_spec("vllm") is None:
            runs = {}
        with ExitStack() as mine:
            mine.enter_context(turn(file))
            with Engines(runs, Path(work), file) as engines:
                keep("checks", lambda: gpu_checks.run(device.type))
                engines.wait_until_started()
                keep("rows", lambda: gpu_rows.run(device, rehearse=options.rehearse))
                keep("attention", lambda: gpu_attention.run(device, rehearse=options.rehearse))
                mine.close()
                keep("engine", engines.collect)
    say(f"written: {path}")
    for failure in failures(results):
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(failures(results)))


if __name__ == "__main__":
    sys.exit(main())
