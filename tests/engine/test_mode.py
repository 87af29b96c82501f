"""An engine's own mode is the most that its requests get."""

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask
from engine.scenes import PROMPT, A, B, C, reused, show


def test_an_exact_engine_reuses_encoder_outputs_and_no_kv_whatever_is_asked(make_engine: MakeEngine) -> None:
    engine = make_engine(mode="exact")
    show(engine)
    engine.forget()
    engine.scheduler.reset_encoder_cache()
    (answer,) = engine.ask(Ask(PROMPT, mode="reuse", ratio=0.0))
    assert answer.report["mode"] == "exact" and answer.report["reason"] == "mode"
    assert reused(answer) == 0 and not answer.report["approximate"]
    assert engine.counts["loaded_embeddings"] == 2
    assert engine.encoded == [A.identifier, B.identifier, C.identifier], "each was encoded once, when it was new"


def test_a_request_may_still_ask_an_exact_engine_for_less(make_engine: MakeEngine) -> None:
    engine = make_engine(mode="exact")
    (answer,) = engine.ask(Ask(PROMPT, mode="off"))
    assert answer.report["mode"] == "off"
    assert engine.counts["saved_entries:kv"] == engine.counts["saved_entries:embedding"] == 0


def test_a_request_that_names_the_engines_own_policy_gets_its_encoder_outputs(make_engine: MakeEngine) -> None:
    own = "vlcache_connector.policy.leading:Leading"
    engine = make_engine(policy=own)
    show(engine)
    engine.forget()
    engine.scheduler.reset_encoder_cache()
    (answer,) = engine.ask(Ask(PROMPT, mode="exact", policy=own))
    assert answer.report["policy"] == own and "error" not in answer.report
    assert engine.encoded == [A.identifier, B.identifier, C.identifier], "each was encoded once, when it was new"
