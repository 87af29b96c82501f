"""Test and measure the operations on a GPU. `make gpu` builds the library and runs this; neither vLLM nor a network is
needed.

    python tests/bench/gpu.py [--results FOLDER] [--only PART ...] [--rehearse]

1. checks: all tests of the operations on the device, and a part of them under compute-sanitizer
2. rows: load_rows, save_rows and shift_rows beside copies on the device, and from and to pinned memory
3. attention: sparse_query_attention beside PyTorch's attention
4. engine, where vLLM is installed: reuse end to end, and times to the first token (see gpu_engine.py)

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu_attention, gpu_checks, gpu_rows
from bench.results import OUT, ROOT, circumstances, say, write_json
from vlcache_connector.kernels import library

RESULTS = ROOT / "tests" / "bench" / "results"
ENGINE_LIMIT_S = 240  # for each kind of attention of the recompute pass


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "libraries": {state.device: str(state.path) for state in library.library_report() if state.is_loaded},
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


def run_engine(rehearse: bool) -> dict[str, Any]:
    """gpu_engine.py in processes of its own, since vLLM takes the whole device, for both attentions of a pass."""
    if find_spec("vllm") is None:
        say("engine: vLLM is not installed here, so nothing is run end to end")
        return {"outcome": "vLLM is not installed"}
    found = {attention: run_engine_with(attention, rehearse) for attention in ("engine", "vlcache")}
    return {"outcome": "; ".join(sorted({each["outcome"] for each in found.values()})), **found}


def run_engine_with(attention: str, rehearse: bool) -> dict[str, Any]:
    say(f"engine with attention = {attention!r}, {ENGINE_LIMIT_S} s at most")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "engine.json")
        script = str(ROOT / "tests" / "bench" / "gpu_engine.py")
        arguments = ["--attention", attention, "--results", str(results), *(["--rehearse"] if rehearse else [])]
        done = gpu_checks.execute([sys.executable, script, *arguments], {}, ENGINE_LIMIT_S)
        print(done.output[-12000:], flush=True)
        measured = json.loads(results.read_text()) if results.exists() else {}
    outcome = {0: "passed", None: f"stopped after {ENGINE_LIMIT_S} s"}.get(done.code, "failed")
    return {"outcome": outcome, "seconds": round(done.seconds, 1), **measured}


def parts(device: torch.device, rehearse: bool) -> dict[str, Callable[[], Any]]:
    return {
        "checks": lambda: gpu_checks.run(device.type),
        "rows": lambda: gpu_rows.run(device, rehearse=rehearse),
        "attention": lambda: gpu_attention.run(device, rehearse=rehearse),
        "engine": lambda: run_engine(rehearse),
    }


def failures(results: dict[str, Any]) -> list[str]:
    failed = [f"{check['name']} failed" for check in results.get("checks", ()) if check["outcome"] == "failed"]
    failed += [f"{name}: {value['error']}" for name, value in results.items() if "error" in value]
    if results.get("engine", {}).get("outcome") not in (None, "passed", "vLLM is not installed"):
        failed.append(f"engine {results['engine']['outcome']}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["checks", "rows", "attention", "engine"]
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run; default all")
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
    for part, run in parts(device, options.rehearse).items():
        if part not in options.only:
            continue
        try:
            results[part] = run()
        except RuntimeError as error:  # the next part may still tell something
            say(f"{part}: {error}")
            results[part] = {"error": str(error)}
        write_json(path, {"circumstances": head, **results})  # after each part: whoever runs this may lose patience
    say(f"written: {path}")
    for failure in failures(results):
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(failures(results)))


if __name__ == "__main__":
    sys.exit(main())
