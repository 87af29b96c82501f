"""How tests run `vlcache`, and processes that it can ask."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"}
RUN = "import sys; from vlcache_connector.cli import main; sys.exit(main())"

Start = Callable[..., subprocess.Popen[str]]  # model, number of entries, state
Run = Callable[..., tuple[int, str, str]]  # arguments -> status, standard output, standard error


def process_of(runtime: Path, *arguments: object, **streams: Any) -> subprocess.Popen[str]:
    """`vlcache` in a process of its own."""
    environment = {**ENVIRONMENT, "VLCACHE_RUNTIME_DIR": str(runtime)}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    # Whoever runs the tests in the background may have had interrupts ignored, which processes inherit.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=interruptible, **streams)
