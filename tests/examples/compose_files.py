"""The compose files as a container engine would read them: variables filled in, overrides merged."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "compose"
BASE, GPU, REDIS = FOLDER / "compose.yaml", FOLDER / "compose.gpu.yaml", FOLDER / "compose.redis.yaml"
SECRETS = {
    "VLLM_API_KEY": "key-for-tests",
    "GRAFANA_PASSWORD": "grafana-for-tests",
    "REDIS_PASSWORD": "redis for tests",
}
VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


def services(files: Sequence[Path], settings: Mapping[str, str]) -> dict[str, Any]:
    """Merged services. Lists replace each other as `command` does; the overrides here merge no other lists."""
    merged: dict[str, Any] = {}
    for file in files:
        _merge(merged, yaml.safe_load(file.read_text())["services"])
    filled: dict[str, Any] = _filled(merged, settings)
    return filled


def variables() -> set[str]:
    """Names of all variables in the files."""
    text = "".join(file.read_text() for file in (BASE, GPU, REDIS))
    return {found["name"] for found in VARIABLE.finditer(text) if found["name"]}


def docker_compose(files: Sequence[Path], settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What Debian's docker-compose makes of them; it holds them to the compose specification's schema."""
    command = ["docker-compose", *(word for file in files for word in ("-f", str(file))), "config"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **settings}
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _filled(value: Any, settings: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, settings) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, settings) for each in value]
    return VARIABLE.sub(lambda found: _value(found, settings), value) if isinstance(value, str) else value


def _value(found: re.Match[str], settings: Mapping[str, str]) -> str:
    if found["name"] is None:
        return "$"
    value = settings.get(found["name"], "")
    if not value and found["kind"] == "?":
        raise KeyError(found["name"])
    return value or (found["rest"] or "" if found["kind"] == "-" else "")


# -- the Dockerfile ---------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its arguments, lines joined."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]
