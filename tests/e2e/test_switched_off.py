"""One option switches everything off, whatever requests ask for, and leaves the caches alone."""

from pathlib import Path

from e2e.conftest import Start
from e2e.engine import Ask, Picture

A = Picture(1)


def test_an_engine_that_is_switched_off_is_plain_vllm(start_here: Start, tmp_path: Path) -> None:
    folders = {"disk_path": str(tmp_path / "disk"), "snapshot_path": str(tmp_path / "snapshot")}
    engine = start_here("off", "qwen3_vl", "float32", {"mode": "off", **folders})
    plain = start_here("plain", "qwen3_vl", "float32", None)
    prompts = [Ask(["look ", A, "what?"]), Ask(["words before it, ", A, "and now?"])]
    for ask in prompts:
        (answer,) = engine.ask(ask)
        assert answer.report["mode"] == "off" and answer.report["reason"] == "mode"
        assert answer.report["reused_tokens"] == answer.report["recomputed_tokens"] == 0
        assert answer.gap(plain.ask_one(ask)) == 0.0
    assert 'the option "mode" is "off"' in engine.log_text()
    assert list(tmp_path.glob("*/*")) == [], "nothing was opened or written"
    assert engine.call(num_host_slabs) == 0
    assert engine.call(encoder_connector) is None


def num_host_slabs(llm: object) -> int:
    """Slabs that this process maps."""
    return Path("/proc/self/maps").read_text().count("memfd:vlcache")


def encoder_connector(llm: object) -> object:
    config = llm.llm_engine.vllm_config.ec_transfer_config  # type: ignore[attr-defined]
    return config and config.ec_connector
