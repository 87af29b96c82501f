"""What the remote tier takes for granted of lmcache. Where one of these fails, `store/remote` needs a look before the
pinned range (pyproject.toml, `interface.SUPPORTED`) may be widened.
"""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from redis_server import needs_redis, running
from store.remote_tiers import needs_lmcache, resp
from vlcache_connector.errors import OptionError
from vlcache_connector.store.remote.adapter import Adapter, AdapterError, AdapterTimeoutError
from vlcache_connector.store.remote.blob import BlobKey
from vlcache_connector.store.remote.interface import SUPPORTED, missing_interface, parse, require_lmcache

KEY = BlobKey(bytes(range(32)), 1, 2, 3, "0123456789abcdef")


def test_the_pinned_range_is_the_one_that_users_are_told() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["lmcache"] == [f"lmcache{SUPPORTED}"]


def test_without_lmcache_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(OptionError, match=r"needs lmcache: pip install 'vlcache-connector\[lmcache\]'"):
        require_lmcache()


@needs_lmcache
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("lmcache.v1.distributed.l2_adapters", "create_l2_adapter"),
        ("lmcache.v1.distributed.l2_adapters.config", "get_l2_adapter_config_class"),
        ("lmcache.v1.distributed.l2_adapters.base:L2AdapterInterface", "query_load_result"),
        ("lmcache.v1.memory_management:TensorMemoryObj", "byte_array"),
        ("lmcache.v1.platform", "consume_fd"),
    ],
)
def test_an_interface_that_has_moved_is_named_with_advice(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    assert missing_interface() == []
    module, _, owner = place.partition(":")
    target: Any = __import__(module, fromlist=["x"])
    bases = [target] if not owner else getattr(target, owner).__mro__
    for base in bases:
        if name in vars(base):
            monkeypatch.delattr(base, name)
    with pytest.raises(OptionError, match=name) as caught:
        require_lmcache()
    assert f"Install lmcache{SUPPORTED}" in str(caught.value)


@needs_lmcache
def test_lmcache_reports_nothing_to_its_makers() -> None:
    script = (
        "from vlcache_connector.store.remote.interface import require_lmcache\n"
        "require_lmcache()\n"
        "from lmcache.usage_telemetry.identity import is_usage_tracking_enabled\n"
        "print(is_usage_tracking_enabled())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LMCACHE_TRACK_USAGE"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "False"


@needs_lmcache
@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"type": "no_such_store"}, "no_such_store"),
        ({"type": "resp", "port": 6379}, "host"),
        ({"type": "resp", "host": "cache", "port": "6379"}, "port"),
        ({"type": "fs_native"}, "base_path"),
    ],
)
def test_a_wrong_description_is_an_error_that_says_what_is_wrong(description: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(description)


@needs_lmcache
def test_a_backend_that_cannot_be_made_is_not_connected() -> None:
    config, _ = parse({"type": "fs_native", "base_path": "/proc/none"})
    with pytest.raises(AdapterError):
        Adapter(config, 5.0)


@needs_lmcache
def test_names_of_blobs_on_a_file_system_are_what_they_were(tmp_path: Path) -> None:
    """They are part of the format: engines of different releases share a store."""
    config, timeout_s = parse({"type": "fs_native", "base_path": str(tmp_path), "timeout_s": 20})
    adapter = Adapter(config, timeout_s)
    adapter.store([KEY], [memoryview(bytearray(b"value"))])
    hexed = bytes(range(32)).hex()
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        f"vlcache-1@0x00000000@0@{bytes(32).hex()}.data",
        f"vlcache-1@0x00020001@3@{hexed}@0123456789abcdef.data",
    }
    adapter.close()


@needs_lmcache
@needs_redis
def test_what_lmcache_does_wrong_is_still_wrong(tmp_path: Path) -> None:
    """If this fails, lmcache was mended, and a workaround can go: it takes a value of another length for a failure of
    the connection, and a load of nothing waits in vain.
    """
    with running(tmp_path) as server:
        config, _ = parse(resp(server.port, num_workers=1))
        adapter = Adapter(config, 20.0)
        adapter.store([KEY], [memoryview(bytearray(1000))])
        with pytest.raises(AdapterError, match="another length"):
            adapter.load([KEY], [memoryview(bytearray(999))])
        impatient = Adapter(config, 0.3)
        server.ask("FLUSHALL")
        with pytest.raises(AdapterTimeoutError):
            impatient.load([KEY], [memoryview(bytearray(1000))])
