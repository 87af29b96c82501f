"""The tree tells the truth: who imports whom, what nobody imports, and how long a file may be."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "vlcache_connector"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 300

_GROUND = {"types", "errors", "metrics"}
# room -> rooms it may import from, beside itself. A room is a folder or a module at the top of the package.
ARROWS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "metrics": set(),
    "policy": _GROUND,
    "config": _GROUND | {"policy"},
    "plan": _GROUND | {"policy", "config"},
    "store": _GROUND | {"policy", "config"},
    "kernels": set(),
    "exec": _GROUND | {"policy", "config", "kernels"},
    "engine": _GROUND | {"policy", "config", "plan", "store", "exec", "__init__"},
    "__init__": {"engine"},  # by name, on first use
    "environment": {"errors", "kernels", "engine"},
    "openai_api": {"errors"},
    "explain": {"openai_api"},
    "warm": {"openai_api"},
    "plotting": {"errors"},
    "simulate": _GROUND | {"store", "plotting"},
    "evaluate": _GROUND | {"policy", "engine", "plotting"},
    "cli": {"errors", "config", "environment", "explain", "warm", "simulate", "evaluate", "plotting", "store"},
}
MAY_IMPORT_VLLM = {"engine", "evaluate/asking.py"}
MAY_IMPORT_TORCH = {
    "engine",
    "exec",
    "kernels",
    "environment",
    "store/slab.py",
    "store/remote/adapter.py",
    "store/remote/interface.py",
}
# Modules that write or read pickles. `torch.save` and `torch.load` do as well: see `calls_of`.
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
PICKLING_CALLS = {"torch.save", "torch.load"}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def is_allowed(path: Path, places: set[str]) -> bool:
    return room_of(path) in places or path.relative_to(SOURCE).as_posix() in places


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, also for type checking only, also by name in a string."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = [PACKAGE, *path.relative_to(SOURCE).parts[:-1]]
                kept = parents[: len(parents) - node.level + 1]
                module = ".".join([*kept, module]) if module else ".".join(kept)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"({PACKAGE}|torch|vllm)(\.\w+)+", str(node.value)):
            yield str(node.value)


def rooms_imported_by(path: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(path)]
    inside = [parts[1:] for parts in names if parts[0] == PACKAGE]
    return {parts[0] if parts and parts[0] in ARROWS else "__init__" for parts in inside} - {room_of(path)}


def calls_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(), str(path))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nfor name in sorted(sys.modules): print(name)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_the_table_of_arrows_names_every_room_and_no_other() -> None:
    assert {room_of(path) for path in FILES} == set(ARROWS)


@every_file
def test_arrows_point_one_way(path: Path) -> None:
    assert rooms_imported_by(path) <= ARROWS[room_of(path)]


@every_file
def test_only_the_engine_room_imports_vllm(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert "vllm" not in tops or is_allowed(path, MAY_IMPORT_VLLM)


@every_file
def test_torch_stays_out_of_decisions(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert "torch" not in tops or is_allowed(path, MAY_IMPORT_TORCH)


@every_file
def test_nothing_is_pickled(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & PICKLES
    assert not calls_of(path) & PICKLING_CALLS
    assert "allow_pickle" not in path.read_text()


@every_file
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_importing_the_package_loads_neither_torch_nor_vllm_nor_any_room() -> None:
    loaded = modules_after(f"import {PACKAGE}")
    assert PACKAGE in loaded
    assert not {"torch", "vllm"} & loaded
    assert not {name for name in loaded if name.startswith(f"{PACKAGE}.")}


def test_everything_that_decides_loads_without_torch() -> None:
    pure = [path for path in FILES if not is_allowed(path, MAY_IMPORT_TORCH)]
    dotted = [".".join([PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]) for path in pure]
    names = [name.removesuffix(".__init__") for name in dotted]
    loaded = modules_after(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert not {"torch", "vllm", "numpy"} & loaded


def test_the_reader_of_imports_sees_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are worth what `imports_of` finds."""
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "plan").mkdir()
    path = tmp_path / "plan" / "keys.py"
    path.write_text(
        "import torch.nn as nn\n"
        "from ..store import host\n"
        "from . import spans\n"
        "from vlcache_connector import exec\n"
        "def late():\n    from vllm.v1 import request\n    import_module('vlcache_connector.engine.live')\n"
    )
    assert set(imports_of(path)) == {
        "torch.nn",
        "vlcache_connector.store.host",
        "vlcache_connector.plan.spans",
        "vlcache_connector.exec",
        "vllm.v1.request",
        "vlcache_connector.engine.live",
    }
    assert rooms_imported_by(path) == {"store", "exec", "engine"}
