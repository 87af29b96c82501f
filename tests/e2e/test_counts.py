"""What a hit costs, in things that can be counted: passes, operations, bytes. No busy machine disturbs these tests."""

import pytest

from e2e import inside
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, A, B, show_pictures

LAYERS = 4
ONE, TWO = [OPEN, LONG, A, "what is it?", CLOSE], [OPEN, LONG, B, "and", A, "same?", CLOSE]
EXEC = "vlcache_connector.exec"
LOADS = {
    "leading": [(f"{EXEC}.transfer", "load_rows")],
    "shifted": [(f"{EXEC}.shift", "load_rows"), (f"{EXEC}.shift", "shift_rows")],
}


def calls_of(engine: Engine, ask: Ask, owner: str, name: str, times: int = 1) -> list[int]:
    """Of a hit, and of the same request as often again."""
    engine.forget()
    engine.call(inside.count_calls, owner, name)
    counts: list[int] = []
    for _ in range(times):
        engine.ask_one(ask)
        counts.append(engine.call(inside.num_calls))
    engine.call(inside.repair)
    return counts


@pytest.mark.parametrize("parts", [ONE, TWO], ids=["one picture", "two pictures"])
@pytest.mark.parametrize("policy", LOADS)
def test_a_hit_is_one_pass_and_one_operation_per_picture_or_layer(
    fresh: Engine, policy: str, parts: list[object]
) -> None:
    show_pictures(fresh)
    ask = Ask(parts, ratio=0.05, policy=policy)  # type: ignore[arg-type]
    num_pictures = sum(part in (A, B) for part in parts)
    for owner, name in LOADS[policy]:
        wanted = num_pictures * (LAYERS if policy == "shifted" else 1)
        assert calls_of(fresh, ask, owner, name) == [wanted], name
    assert calls_of(fresh, ask, f"{EXEC}.recompute", "build_batch") == [1], "all pieces of a step share one pass"


def test_the_last_layer_of_a_hit_computes_keys_and_values_only(fresh: Engine) -> None:
    """Nothing reads what comes out of it. The engine's forward behind it runs all layers to their end."""
    show_pictures(fresh)
    ask = Ask(TWO, ratio=0.05)
    hit = calls_of(fresh, ask, "vllm.model_executor.models.qwen2:Qwen2MLP", "forward", times=2)
    assert hit[0] == hit[1] + LAYERS - 1, "the second time all of it is in vLLM's prefix cache"


@pytest.mark.parametrize("policy", LOADS)
def test_a_hit_moves_the_bytes_of_its_reused_tokens_and_nothing_else(fresh: Engine, policy: str) -> None:
    show_pictures(fresh)
    fresh.forget()
    fresh.call(inside.counters)
    fresh.call(inside.count_encoder_runs)
    answer = fresh.ask_one(Ask(TWO, ratio=0.05, policy=policy))
    counts = fresh.call(inside.counters)
    token_nbytes = fresh.call(inside.kv_nbytes_of_a_token)
    assert counts["loaded_bytes"] == answer.report["reused_tokens"] * token_nbytes
    assert counts["passes"] == 1
    assert not any(name.startswith("saved") for name in counts), "nothing that is known is saved again"
    assert fresh.call(inside.count_encoder_runs) == 0
