"""A policy of your own: which tokens of a picture are recomputed. No file of the package is edited.

    python examples/new_policy.py

A policy is a subclass of `Policy` with a name and one method; the option `policy` names it as `module:Class`. Its
module must be importable where the engine runs. For a server:

    PYTHONPATH=examples vllm serve MODEL --kv-transfer-config '{... "kv_connector_extra_config":
        {"policy": "new_policy:Ends"}}'

What to keep to: the answer depends on length and ratio alone; a larger ratio only adds tokens; the name is not that of
a policy of the package. Its choices are tried when the engine starts; bad ones stop it with a sentence.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from offline import GRID_MODEL, GRID_QUESTIONS, ask, grid_pictures, message, start
from savings import Savings

from vlcache_connector.policy import Policy
from vlcache_connector.types import Run


class Ends(Policy):
    """Recomputes both ends of each picture: the first tokens, and half as many of the last."""

    name = "ends"

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        first = math.ceil(length * ratio * 2 / 3)
        last = max(first, length - math.ceil(length * ratio / 3))
        return tuple(run for run in (Run(0, first), Run(last, length)) if len(run))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(GRID_MODEL), help="Qwen2.5-VL or Qwen3-VL, a folder or a name")
    options = parser.parse_args()
    first, second = GRID_QUESTIONS
    pictures = grid_pictures(2)

    llm = start(options.model, policy="new_policy:Ends", recompute_ratio=0.06)
    for picture in pictures:
        ask(llm, [message(picture, first)])
    savings = Savings()
    for picture in pictures:
        messages = [message("never again in winter", picture, second)]
        plain = ask(llm, messages, mode="off")
        answer = ask(llm, messages)
        savings.show("other text before the picture", answer, plain)
        for span in answer.report["plan"]["spans"]:
            print(f"    picture at {span['offset']}, {span['length']} tokens: recomputed {span['recomputed']}")
    return savings.close()


if __name__ == "__main__":
    sys.exit(main())
