"""The service on a Ray cluster of two nodes, one of which is lost under load. scripts/test_ray.sh runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: scripts/test_ray.sh installs it in an environment of its own")
pytest.importorskip("kvx.tests.runtime.serving.serving")  # which skips where the extra serve is missing

from kvx.runtime.serving import ray_app
from kvx.scripts.ray_nodes import ENVIRONMENT, Node, cluster_of, command_of, is_possible, wait_for

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not is_possible(), reason="nodes need Linux and root"),
]

PATIENCE = 120  # seconds
CLIENTS = 8
WORDS = {"one": "eins", "twelve thousand": "zwölftausend", "seven hundred and two": "siebenhundertzwei"}
# Clients on a node, which repeat each request until it is answered 200 → the answers, and all statuses.
PROGRAM = """
import http.client, json, sys, time
from concurrent.futures import ThreadPoolExecutor
texts, requests, clients = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
statuses = []
def asked(number):
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
        form = json.dumps({"texts": texts[number % len(texts)]})
        connection.request("POST", "/v1/translate", form, {"content-type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        statuses.append(answer.status)
        if answer.status == 200:
            return json.loads(body)["translations"][0]["text"]
        time.sleep(float(answer.headers["retry-after"]))
with ThreadPoolExecutor(clients) as pool:
    found = list(pool.map(asked, range(requests)))
print(json.dumps([found, statuses]))
"""


def start_clients(node: Node, requests: int) -> subprocess.Popen[str]:
    line = node.line(sys.executable, "-c", PROGRAM, json.dumps(list(WORDS)), str(requests), str(CLIENTS))
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def statuses_of(clients: subprocess.Popen[str], requests: int) -> Counter[int]:
    """What came of clients, whose answers are right."""
    out, _ = clients.communicate(timeout=PATIENCE)
    found, statuses = json.loads(out)
    assert found == [list(WORDS.values())[number % len(WORDS)] for number in range(requests)]
    return Counter(statuses)


def replicas(*nodes: Node) -> int:
    return sum("ServeReplica" in command_of(pid) for node in nodes for pid in node.processes())


def test_a_node_that_is_lost_loses_no_request(
    numbers_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, ray_app.MIDDLEWARE, ray_app.MIDDLEWARES)
    with cluster_of(2, num_cpus="2") as cluster, (tmp_path / "log").open("wb") as log:
        head, other = cluster.nodes
        serve = [str(Path(sys.executable).with_name("serve")), "run", "kvx.runtime.serving.ray_app:app"]
        line = [*serve, f"bundles={numbers_bundle}", "replicas=3", "threads=1", "quiet=1"]
        head.started.append(subprocess.Popen(head.line(*line), env=ENVIRONMENT, stdout=log, stderr=log))
        wait_for(lambda: replicas(head, other) == 3)
        assert replicas(other) >= 1
        assert statuses_of(start_clients(head, 300), 300) == {200: 300}
        clients = start_clients(head, 1000)
        time.sleep(1)
        cluster.lose(other)
        statuses = statuses_of(clients, 1000)
        assert statuses.keys() <= {200, 503}
        assert statuses[503] <= CLIENTS
        assert replicas(head) == 2
