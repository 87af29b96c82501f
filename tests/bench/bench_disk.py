"""How fast is the disk tier on this machine?

    make bench-disk         (or: python tests/bench/bench_disk.py [--quick] [--folder FOLDER] [--output FILE])

Verified reads and durable writes are measured beside plain ones, in turns, on the same files and buffers. "Plain" moves
the same bytes by one thread in pieces of the same size, and looks at none of them. Cold reads come from the device: the
kernel was asked to drop the files from its page cache. Start-up and look-ups follow. Writes out/bench_disk.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import disk_index, disk_transfers
from bench.results import OUT, circumstances, say, shown, warn_when_busy, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases and repeats: to see that it runs")
    parser.add_argument("--folder", type=Path, help="where the files go, on the disk in question (default: out/)")
    parser.add_argument("--output", type=Path, default=OUT / "bench_disk.json")
    arguments = parser.parse_args()
    warn_when_busy()
    result = circumstances()
    parent = arguments.folder or OUT
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench_disk_") as folder:
        result["transfers"] = disk_transfers.run(Path(folder), quick=arguments.quick)
        result["start"] = disk_index.start(Path(folder), 2_000 if arguments.quick else 100_000)
        result["look_up"] = disk_index.look_ups(Path(folder), 20_000 if arguments.quick else 1_000_000)
    write_json(arguments.output, result)
    say(f"written to {shown(arguments.output.resolve())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
