"""The commands of the images as plain processes: the server, Prometheus that scrapes it, Redis; and the dashboard's
queries, evaluated. Only what stands for the containers differs: ports, folders, names of hosts.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from offline import grid_pictures
from savings import KINDS

from e2e.server import Server
from examples.compose_files import BASE, FOLDER, REDIS, ROOT, SECRETS, instructions, services
from examples.test_compose_files import panels, queries
from vlcache_connector.config import Options

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="to run it: apt-get install prometheus"
)
needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None
    or find_spec("lmcache") is None
    or "remote" not in Options.__dataclass_fields__,
    reason="to run it: apt-get install redis-server, pip install --no-deps lmcache, and the option `remote`",
)
SMALL = {"VLCACHE_HOST_GIB": "0.25", "VLCACHE_DISK_GIB": "1", "VLLM_CPU_KVCACHE_GIB": "1", "REDIS_MEMORY": "100mb"}
TOLD_AT_ONCE_S = 60

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compose")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Start]:
    """Starts a command, which ends with the tests of this file."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(service: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch, **replaced: str) -> Server:
    """The command of the service `vllm`, its paths and hosts replaced by those of this machine."""
    model, *arguments = service["command"]
    assert model == "/models/grid"
    for old, new in {"/var/cache/vlcache": str(folder)}.items() | replaced.items():
        arguments = [word.replace(old, new) for word in arguments]
    for name, value in service["environment"].items():
        if value:
            patch.setenv(name, value)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("VLCACHE_RUNTIME_DIR", str(folder / "s"))
    kept = [word for word in arguments if not word.startswith(("--host=", "--port="))]
    return Server(ROOT / "examples" / "grid_model" / "model", folder / "server.log", *kept, "--enforce-eager")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        started = serve(services([BASE], {**SECRETS, **SMALL})["vllm"], folder, patch)
    try:
        yield started.wait_until_ready()
    finally:
        started.close()


@pytest.fixture(scope="module")
def prometheus(server: Server, folder: Path, start: Start) -> str:
    """Its address. It scrapes every second, not every 15; the queries then look at seconds in place of a minute."""
    service = services([BASE], SECRETS)["prometheus"]
    told = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    told["global"]["scrape_interval"] = "1s"
    (job,) = told["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(told))
    arguments = [
        word.replace("/etc/prometheus", str(folder)).replace("=/prometheus", f"={folder}/metrics")
        for word in service["command"]
    ]
    address = f"127.0.0.1:{free_port()}"
    start("prometheus", ["prometheus", *arguments, f"--web.listen-address={address}"], {})
    return f"http://{address}"


def chat(server: Server, text: str, mode: str = "reuse", key: str | None = SECRETS["VLLM_API_KEY"]) -> dict[str, Any]:
    """The report on a request about the one picture."""
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    body = {
        "model": "served",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": "colour at c5"}]}],
        "max_tokens": 2,
        "kv_transfer_params": {"vlcache": {"mode": mode}},
    }
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        report: dict[str, Any] = json.load(response)["kv_transfer_params"]["vlcache"]
    return report


def _png() -> bytes:
    import io

    file = io.BytesIO()
    grid_pictures(1)[0].save(file, "png")
    return file.getvalue()


PICTURE = _png()


def asked(prometheus: str, query: str) -> list[dict[str, Any]]:
    """The result of an instant query; empty also while Prometheus starts."""
    where = f"{prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(where, timeout=10) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:
        return []
    return result


def wait_for(prometheus: str, query: str) -> None:
    deadline = time.monotonic() + TOLD_AT_ONCE_S
    while not asked(prometheus, query):
        assert time.monotonic() < deadline, f"Prometheus has nothing for {query}"
        time.sleep(0.5)


def test_the_served_model_reuses_a_picture_for_who_has_the_key(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        chat(server, "", key=None)
    chat(server, "")
    report = chat(server, "in the evening")
    assert report["reused_tokens"] > 200
    assert set(report) >= {f"{kind}_tokens" for kind in KINDS}


@needs_prometheus
def test_every_query_of_the_dashboard_has_a_result(server: Server, prometheus: str, folder: Path) -> None:
    chat(server, "")
    wait_for(prometheus, "vllm:vlcache_hits_total")
    for number in range(4):  # counters that move, over several scrapes
        chat(server, f"evening {number} letter")
        chat(server, "in the morning", "off")
        time.sleep(1)
    wait_for(prometheus, "rate(vllm:vlcache_reused_tokens_total[30s]) > 0")
    wait_for(prometheus, "rate(vllm:vlcache_declines_total[30s]) > 0")
    for panel in panels():
        for query in queries(panel):
            found = asked(prometheus, query.replace("$__rate_interval", "30s"))
            assert found, f"{panel['title']}: {query}"
    moving = {panel["title"]: 0 for panel in panels()}
    for panel in panels():
        for query in queries(panel):
            results = asked(prometheus, query.replace("$__rate_interval", "60s"))
            moving[panel["title"]] += any(float(result["value"][1]) > 0 for result in results)
    for title in ("Requests with pictures", "Share of prompt tokens", "Time to first token", "Host tier: bytes"):
        assert moving[title] >= 1, f"{title}: all zero"
    assert moving["Errors inside the connector"] == 0


def test_the_health_check_of_the_image_tells_a_server_from_none(server: Server) -> None:
    (words,) = [words for name, words in instructions() if name == "HEALTHCHECK"]
    python, *arguments = json.loads(words.partition("CMD ")[2])
    here = server.url.rpartition(":")[2]
    for port, status in ((here, 0), (str(free_port()), 1)):
        command = [python, *(word.replace(":8000/", f":{port}/") for word in arguments)]
        assert subprocess.run(command, capture_output=True).returncode == status


@needs_redis
def test_a_second_server_finds_in_redis_what_the_first_one_computed(folder: Path, start: Start) -> None:
    found, port = services([BASE, REDIS], {**SECRETS, **SMALL}), str(free_port())
    service = found["redis"]
    shell = [
        word.replace("port 6379", f"port {port}").replace("dir /data", f"dir {folder}") for word in service["command"]
    ]
    start("redis", shell, {"PATH": "/usr/bin:/bin", **service["environment"]})
    kind, check = service["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    check = check.replace("redis-cli", f"redis-cli -p {port}")
    environment = {"PATH": "/usr/bin:/bin", **service["environment"]}
    for _ in range(100):
        if subprocess.run(["sh", "-c", check], env=environment, capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    else:
        raise AssertionError((folder / "redis.log").read_text())
    tiers = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            replaced = {'"redis"': '"127.0.0.1"', "6379": port}
            started = serve(found["vllm"], folder / name, patch, **replaced)
        try:
            started.wait_until_ready()
            report = chat(started, f"server {name}")
            tiers.append((report["reused_tokens"] > 0, report["tier"]))
            time.sleep(2)
        finally:
            started.close()
    assert tiers == [(False, None), (True, "remote")]
