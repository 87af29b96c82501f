"""The command `vlcache`: one module for each subcommand, which imports what it needs when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence

from vlcache_connector.cli import calibrate, check, clear, env, evaluate, explain, ls, simulate, snapshot, warm
from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.control.protocol import NoCacheError

_COMMANDS = (env, explain, warm, ls, check, clear, snapshot, simulate, evaluate, calibrate)
_STATUS = """exit status:
  0    all is well
  1    a problem was found, or what was asked was refused or did not work
  2    the command line is wrong, or there is no cache to ask
  130  interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        "vlcache",
        description="vlcache-connector: reuse of KV cache and encoder output in vLLM",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for module in _COMMANDS:
        module.add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `vlcache ls | head`; what is buffered still goes nowhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VLCacheError, OSError) as error:
        print(f"vlcache {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoCacheError) else 1
    return status
