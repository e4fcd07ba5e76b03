"""The service on Ray Serve: it answers as `kvx serve` does, and its failures are those that docs/serving.md tells.

Its tests need Ray, which `make setup` does not install: scripts/test_ray.sh runs them in an environment of its own.
"""

from __future__ import annotations

import http.client
import inspect
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("ray", reason="Ray is not installed: scripts/test_ray.sh installs it in an environment of its own")
pytest.importorskip("kvx.tests.runtime.serving.serving")  # which skips where the extra serve is missing

import ray
from ray import serve

from kvx import BundleError, DeviceError, KvxError, OptionError, Translator
from kvx.runtime.serving import ray_app
from kvx.runtime.serving.ray_app import ReplicaOptions
from kvx.runtime.serving.settings import ServeOptions
from kvx.testing import FakeTranslator
from kvx.tests.runtime.serving import test_native
from kvx.tests.runtime.serving.fakes import models_of, process
from kvx.tests.runtime.serving.serving import Client, Reply

CPUS = 16  # logical ones: replicas of fakes need hardly any time
STORE = 80_000_000  # bytes
LONG = "many words " * 100  # 1,100 steps of a slow model
PATIENCE = 30.0

translators = test_native.translators

# The tests of the native API, with a client of Ray Serve.
for _name, _test in vars(test_native).items():
    if _name.startswith("test_") and {"client"} <= set(inspect.signature(_test).parameters) - {"caplog"}:
        globals()[_name] = _test


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the HTTP proxy of a cluster of one node."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patched:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        patched.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the home of whoever tests
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv(ray_app.MIDDLEWARE, ray_app.MIDDLEWARES)
        ray.init(
            "local",  # also where another cluster runs
            num_cpus=CPUS,
            include_dashboard=False,
            object_store_memory=STORE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="serve",
        )
        free.close()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(
    name: str,
    fakes: Mapping[str, Translator],
    replicas: int = 1,
    most_replicas: int | None = None,
    **options: Any,  # noqa: ANN401
) -> str:
    """Starts a service of fakes → its path."""
    service = ServeOptions(quiet=True, grace=1.0, **options)
    size = ReplicaOptions(bundles=("fakes",), replicas=replicas, most_replicas=most_replicas, threads=1)
    path = "/" if name == "native" else f"/{name}"
    serve.run(ray_app.deployed(service, size, partial(models_of, dict(fakes))), name=name, route_prefix=path)
    return path


@pytest.fixture(scope="module")
def client(address: str, translators: dict[str, FakeTranslator]) -> Iterator[Client]:
    deploy("native", translators, pivot=("en",), texts=500, characters=20_000, beams=8)
    yield Client(address)
    serve.delete("native")


@pytest.fixture
def slow(address: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Starts a service of a slow model, which tells its process → the address of the service."""
    name = request.node.name.removeprefix("test_")

    def start(replicas: int = 1, **options: Any) -> str:  # noqa: ANN401
        fake = FakeTranslator(process, step_seconds=0.02)
        return address + deploy(name, {"slow": fake}, replicas, **options)

    yield start
    serve.delete(name)


def translate(address: str, text: str = "hello", **fields: Any) -> Reply:  # noqa: ANN401
    """The answer to one request, over a connection of its own."""
    base, _, path = address.rpartition("/")
    return Client(base).post(f"/{path}/v1/translate", {"texts": text, **fields})


def measured(address: str) -> dict[str, float]:
    """What the metrics of a replica say, without labels."""
    base, _, path = address.rpartition("/")
    lines = Client(base).get(f"/{path}/metrics").body.decode().splitlines()
    found: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        if not line.startswith("#"):
            found[line.split("{")[0].split(" ")[0]] += float(line.rsplit(" ", 1)[1])
    return dict(found)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_the_native_tests_are_those_of_a_client() -> None:
    assert sum(name.startswith("test_") for name in globals()) > 30


def test_all_routes_are_answered_below_a_path_too(slow: Callable[..., str]) -> None:
    at = slow()
    base, path = at.rsplit("/", 1)
    client = Client(base)
    for route, kind in (("/docs", "text/html"), ("/openapi.json", "application/json"), ("/metrics", "text/plain")):
        reply = client.get(f"/{path}{route}")
        assert (reply.status, reply.kind.partition(";")[0]) == (200, kind)
    assert client.get(f"/{path}/nothing").status == 404
    refused = client.post_form(f"/{path}/suggest", q="hello")
    assert (refused.status, list(refused.json)) == (403, ["error"])


def test_a_request_beyond_what_may_wait_is_refused_by_serve_with_429_and_when_to_come_back(
    slow: Callable[..., str],
) -> None:
    at = slow(requests=2, waiting=2)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: translate(at, max_new_tokens=100), range(16)))
    counts = Counter(reply.status for reply in replies)
    assert counts.keys() == {200, 429}
    assert counts[200] >= 4
    assert {reply.headers.get("retry-after") for reply in replies if reply.status == 429} == {"1"}
    assert translate(at).status == 200


def test_a_client_beyond_its_share_is_refused_by_the_service_with_429_and_when_to_come_back(
    slow: Callable[..., str],
) -> None:
    at = slow(requests=16, client_requests=1)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: translate(at), range(8)))
    refused = [reply for reply in replies if reply.status != 200]
    assert 1 <= len(refused) <= 6
    assert {reply.status for reply in refused} == {429}
    assert {reply.kind for reply in refused} == {"application/problem+json"}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(slow: Callable[..., str], stream: bool) -> None:
    at = slow()
    parts = urlsplit(at)
    body = json.dumps({"texts": LONG, "stream": stream, "end_at_limit": True, "max_new_tokens": 2000}).encode()
    head = f"POST {parts.path}/v1/translate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert parts.hostname
    with socket.create_connection((parts.hostname, parts.port or 80), PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: measured(at)["kvx_rows_in_use"] == 1)
    left = time.monotonic()
    wait_until(lambda: measured(at)["kvx_rows_in_use"] == 0)
    assert time.monotonic() - left < 5, "the request would have taken 40 s"
    wait_until(lambda: measured(at)["kvx_cancelled_total"] == 1)


def test_of_a_replica_that_is_killed_only_requests_in_it_are_answered_503_and_all_others_200(
    slow: Callable[..., str],
) -> None:
    inside, clients, each = 4, 24, 6
    at = slow(replicas=2, requests=inside, waiting=1000)
    killed = threading.Event()
    replies: list[Reply] = []

    def ask(_: int) -> None:
        for _ in range(each):
            replies.append(translate(at))
            while replies[-1].status != 200 and replies[-1].headers.get("retry-after"):
                time.sleep(float(replies[-1].headers["retry-after"]))
                replies.append(translate(at))

    def kill() -> None:
        wait_until(lambda: len(replies) > clients)
        os.kill(int(replies[0].json["translations"][0]["text"]), signal.SIGKILL)
        killed.set()

    with ThreadPoolExecutor(clients + 1) as pool:
        killing = pool.submit(kill)
        list(pool.map(ask, range(clients)))
        killing.result()
    counts = Counter(reply.status for reply in replies)
    assert killed.is_set()
    assert counts.keys() <= {200, 503}, counts
    assert 1 <= counts[503] <= inside
    assert counts[200] == clients * each
    assert {reply.kind for reply in replies if reply.status == 503} <= {"application/problem+json"}


def test_a_stream_of_a_replica_that_is_killed_breaks_off(slow: Callable[..., str]) -> None:
    at = slow()
    base, path = at.rsplit("/", 1)
    number = int(translate(at).json["translations"][0]["text"])
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=PATIENCE)
    form = {"texts": LONG, "stream": True, "end_at_limit": True, "max_new_tokens": 2000}
    connection.request("POST", f"/{path}/v1/translate", json.dumps(form), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline() == b"event: token\n"
    os.kill(number, signal.SIGKILL)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answer.read()
    connection.close()


def test_a_killed_replica_is_replaced(slow: Callable[..., str]) -> None:
    at = slow()
    before = translate(at).json["translations"][0]["text"]
    os.kill(int(before), signal.SIGKILL)
    time.sleep(0.2)
    after = translate(at)
    assert after.status == 200, "it waits for the next replica"
    assert after.json["translations"][0]["text"] != before


def test_a_real_bundle_is_served_as_arguments_say(
    address: str, numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(numbers_bundle.parent)
    monkeypatch.setenv("KVX_TEXTS", "2")
    arguments = {"bundles": f"en-de={numbers_bundle.name}", "threads": "1", "body_kb": "1", "quiet": "true"}
    serve.run(ray_app.app(arguments), name="real", route_prefix="/real")
    try:
        reply = translate(f"{address}/real", "twelve", source_language="en", target_language="de")
        assert reply.json["translations"][0]["text"] == "zwölf"
        assert translate(f"{address}/real", "x" * 2000).status == 413
        limits = Client(address).get("/real/v1/models").json["limits"]
        assert (limits["texts"], limits["body_bytes"]) == (2, 1024)
    finally:
        serve.delete("real")


def test_what_has_no_room_is_refused_with_numbers_before_anything_is_started(
    address: str, numbers_bundle: Path
) -> None:
    bundles = str(numbers_bundle)
    with pytest.raises(DeviceError) as caught:
        ray_app.app({"bundles": bundles, "replicas": "3", "threads": "8"})
    assert "3 replicas need 8 logical CPUs each" in caught.value.got
    assert f"1 node ({CPUS} CPUs and 0 GPUs)" in caught.value.got
    assert caught.value.got.endswith("room for 2")
    with pytest.raises(DeviceError, match="1 GPU each"):
        ray_app.app({"bundles": bundles, "threads": "1", "device": "cuda"})
    assert serve.status().applications.keys() <= {"native"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "No `bundles` are named"),
        ({"bundles": "x", "port": "80"}, "There is no option port"),
        ({"bundles": "x", "replicas": "many"}, "`replicas` is 'many'"),
        ({"bundles": "x", "replicas": "3", "most_replicas": "2"}, "`most_replicas` is 2"),
        ({"bundles": "x", "body_kb": "much"}, "body_kb is 'much'"),
        ({"bundles": "x", "device": "cuda:1"}, "`device` is 'cuda:1'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        ray_app.app(arguments)
    assert said in caught.value.got


def test_bundles_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        ray_app.app({"bundles": str(tmp_path / "missing")})


def test_an_address_where_no_cluster_is_is_refused_at_once(
    numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begun = time.monotonic()
    for wrong, said in (
        ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1"),
        ("nowhere", "`address` is 'nowhere'"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", wrong)
        with pytest.raises(KvxError, match=said):
            ray_app.app({"bundles": str(numbers_bundle), "threads": "1"})
    assert time.monotonic() - begun < 10


def test_replicas_follow_the_load_where_there_may_be_several() -> None:
    size = ReplicaOptions(bundles=("x",), replicas=2, most_replicas=5, threads=1)
    [deployment] = [ray_app.deployed(ServeOptions(requests=10), size, list)._bound_deployment]
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 5.0)
    assert deployment.max_ongoing_requests == 10


@pytest.mark.proof
def test_replicas_are_added_under_load(address: str) -> None:
    """Ray Serve adds replicas after half a minute of load."""
    fake = FakeTranslator(process, step_seconds=0.02)
    at = address + deploy("growing", {"slow": fake}, most_replicas=3, requests=4)
    seen, grown = Counter[str](), threading.Event()

    def ask(_: int) -> None:
        while not grown.is_set():
            seen[translate(at, max_new_tokens=50).json["translations"][0]["text"]] += 1

    try:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, number) for number in range(12)]
            end = time.monotonic() + 4 * PATIENCE
            while len(seen) < 3 and time.monotonic() < end and not any(one.done() for one in asked):
                time.sleep(0.5)
            grown.set()
            for one in asked:
                one.result()
        assert len(seen) == 3
        assert min(seen.values()) >= 1
    finally:
        serve.delete("growing")
