"""Jobs on real clusters of this machine, whose workers, nodes and drivers are killed. scripts/test_ray.sh runs them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvx.tests.runtime.scale.conftest import RunJob, no_leftovers, read_rows, shards
from kvx.tests.runtime.scale.test_resume import digests, written

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra ray); scripts/test_ray.sh has it"
)

ROWS, SHARD_ROWS = 6000, 250
PATIENCE = 120  # seconds
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(slots=True)
class Cluster:
    """A head on a port of its own, and further nodes, as processes of this test."""

    address: str
    nodes: list[subprocess.Popen[bytes]]

    def workers(self) -> list[int]:
        """The processes of actors that translate, on any of the nodes."""
        parents = {int(path.name): parent_of(path) for path in Path("/proc").glob("[0-9]*")}
        roots = {node.pid for node in self.nodes}
        found = [one for one in parents if "ShardWorker" in command_of(one)]
        return [one for one in found if roots & set(ancestors(one, parents))]


def parent_of(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def ancestors(one: int, parents: dict[int, int]) -> Iterator[int]:
    while one := parents.get(one, 0):
        yield one


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def free_port() -> int:
    """One below those that Ray gives to workers."""
    for port in range(7300, 7400):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


def start_node(*arguments: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", *arguments]
    line += ["--object-store-memory=100000000"]
    return subprocess.Popen(
        line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """A node with all its processes."""
    parents = {int(path.name): parent_of(path) for path in Path("/proc").glob("[0-9]*")}
    members = [one for one in parents if process.pid in ancestors(one, parents)]
    for pid in (process.pid, *members):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two logical CPUs each."""
    with tempfile.TemporaryDirectory(prefix="kvx-ray-", ignore_cleanup_errors=True) as folder:
        import ray

        address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        port = address.rpartition(":")[2]
        nodes = [start_node("--head", "--include-dashboard=false", f"--port={port}", f"--temp-dir={folder}")]
        try:
            wait_for(lambda: is_open(address) and alive(address) == 1)
            nodes.append(start_node(f"--address={address}"))
            wait_for(lambda: alive(address) == 2)
            yield Cluster(address, nodes)
        finally:
            for node in reversed(nodes):
                end(node)


def is_open(address: str) -> bool:
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), 1).close()
        return True
    return False


def alive(address: str) -> int:
    """How many nodes a cluster has."""
    raylet = importlib.import_module("ray._raylet")
    nodes = raylet.GcsClient(address=address).get_all_node_info(timeout=10).values()
    return sum(node.state == 0 for node in nodes)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


@pytest.fixture
def line(tmp_path: Path, numbers_bundle: Path, texts: list[str], cluster: Cluster) -> list[str]:
    """The command of a job on the cluster, over two files."""
    written(tmp_path, texts, ROWS, files=2)
    job = ["batch", "--model", str(numbers_bundle), "--input", str(tmp_path / "in-*.jsonl")]
    job += ["--output", str(tmp_path / "out"), "--shard-rows", str(SHARD_ROWS)]
    return [sys.executable, "-m", "kvx", *job, "--engine", "ray", "--address", cluster.address, "--workers", "2"]


def start(line: list[str], output: Path, shards_there: int) -> subprocess.Popen[bytes]:
    """The command, after so many shards are there."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: process.poll() is not None or (output.is_dir() and len(shards(output)) >= shards_there))
    assert process.poll() is None, process.stderr and process.stderr.read().decode()
    return process


def ends_well(process: subprocess.Popen[bytes], output: Path, expected: list[str]) -> None:
    with no_leftovers(output):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err.decode()
    rows = read_rows(output)
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [row["translation"] for row in rows] == [expected[one % 500] for one in range(ROWS)]


def test_the_shards_and_the_manifest_are_those_of_one_machine(
    line: list[str], tmp_path: Path, run_job: RunJob, expected: list[str]
) -> None:
    ends_well(start([*line, "--ship"], tmp_path / "out", 1), tmp_path / "out", expected)
    run_job(tmp_path / "alone", tmp_path / "in-*.jsonl", shard_rows=SHARD_ROWS)
    assert [one for _, one in digests(tmp_path / "out").values()] == [
        one for _, one in digests(tmp_path / "alone").values()
    ]
    manifests = [json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("out", "alone")]
    assert manifests[0] == manifests[1]


def test_a_worker_that_is_killed_is_replaced(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str]
) -> None:
    process = start(line, tmp_path / "out", 2)
    os.kill(cluster.workers()[0], signal.SIGKILL)
    ends_well(process, tmp_path / "out", expected)


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_driver_that_is_killed_is_gone_on_from_by_either_engine(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str], engine: str
) -> None:
    process = start(line, tmp_path / "out", 5)
    process.kill()
    process.wait()
    wait_for(lambda: not cluster.workers())  # Ray ends those of a driver that is gone
    before = digests(tmp_path / "out")
    assert len(before) >= 5
    again = line if engine == "ray" else line[: line.index("--engine")]
    ends_well(start(again, tmp_path / "out", len(before)), tmp_path / "out", expected)
    assert before.items() <= digests(tmp_path / "out").items()


def test_broken_rows_and_a_bundle_that_is_not_on_the_node(line: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text":"one"}\n{broken\n')
    line[line.index("--input") + 1] = str(tmp_path / "bad.jsonl")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "bad.jsonl, line 2: The line is not JSON" in read_rows(tmp_path / "out")[1]["error"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--workers", "9"], "room for 4 workers with 1 logical CPU"),
        (["--cpus-per-worker", "3"], "room for 0 workers with 3 logical CPUs"),
        (["--devices-per-worker", "1"], "0 GPUs"),
        (["--address", "127.0.0.1:9"], "No Ray cluster answers at 127.0.0.1:9"),
        (["--address", "nowhere"], "--address is 'nowhere'"),
    ],
)
def test_what_would_make_ray_wait_is_refused_at_once(line: list[str], options: list[str], mentions: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [*line, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert mentions in done.stderr
    assert time.monotonic() - started < 60


PIPELINE = """
import json, sys, ray
from kvx.runtime.scale import TranslateBatches
address, bundle = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
rows = ray.data.from_items([{"id": one, "text": text} for one, text in enumerate(["one", "two", "three"] * 40)])
found = rows.map_batches(
    TranslateBatches, fn_constructor_args=(bundle,), fn_constructor_kwargs={"threads": 1}, batch_size=50,
    compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1,
).take_all()
print(json.dumps(sorted((row["id"], row["translation"], row["error"]) for row in found)))
"""


def test_translate_batches_is_a_class_for_map_batches(cluster: Cluster, numbers_bundle: Path) -> None:
    line = [sys.executable, "-c", PIPELINE, cluster.address, str(numbers_bundle)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    words = ["eins", "zwei", "drei"] * 40
    assert json.loads(done.stdout) == [[number, word, None] for number, word in enumerate(words)]


def test_a_node_that_is_lost_takes_no_row_with_it(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str]
) -> None:
    """The last test: its cluster is smaller afterwards."""
    line[line.index("--workers") + 1] = "4"
    process = start(line, tmp_path / "out", 3)
    end(cluster.nodes.pop())
    ends_well(process, tmp_path / "out", expected)
