"""How fast are the native operations on this CPU?

    make bench-ops          (or: python tests/bench/bench_ops.py [--quick])

load_rows and save_rows are measured against memcpy of the same bytes, shift_rows against load_rows, and
sparse_query_attention against the engine's attention. What is compared runs in turns, and ratios are taken within a
turn. Writes out/bench_ops.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bench_attention_op, bench_rows_op, bench_shift_op
from bench.results import OUT, circumstances, say, warn_when_busy, write_json
from vlcache_connector.kernels import library

RESULTS = OUT / "bench_ops.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases and few repeats, to see that it works")
    quick = parser.parse_args().quick
    if "CPU" not in library.load_libraries():
        print("The CPU library is missing: build it with `python setup.py build_ext --inplace`.", file=sys.stderr)
        return 1
    warn_when_busy()
    head = {**circumstances(), "cpu_isa": library.cpu_isa()}
    threads = sorted({1, min(2, len(os.sched_getaffinity(0)))})
    rows = bench_rows_op.run(threads, quick=quick)
    shift = bench_shift_op.run(threads, quick=quick)
    attention = bench_attention_op.run(threads, quick=quick)
    write_json(RESULTS, {**head, "rows": rows, "shift": shift, "attention": attention})
    say(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
