"""Jobs on a real cluster of two nodes, whose workers, nodes and drivers are killed. scripts/test_ray.sh runs them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvx.scripts.ray_nodes import (
    ENVIRONMENT,
    PORT,
    Cluster,
    Node,
    cluster_of,
    command_of,
    is_possible,
    kill,
    wait_for,
)
from kvx.tests.conftest import Seed
from kvx.tests.runtime.scale.conftest import RunJob, no_leftovers, read_rows, shards
from kvx.tests.runtime.scale.test_resume import digests, whole_ids, written

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed (the extra ray); scripts/test_ray.sh has it",
    ),
    pytest.mark.skipif(not is_possible(), reason="nodes need Linux and root"),
]

ROWS, SHARD_ROWS = 6000, 250
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two logical CPUs each. Ray believes that the second one has a GPU."""
    with cluster_of(1, num_cpus="2") as found:
        found.start_node(num_cpus="2", num_gpus="1")
        yield found


def workers(*nodes: Node) -> list[int]:
    """The processes of actors that translate."""
    return [pid for node in nodes for pid in node.processes() if "ShardWorker" in command_of(pid)]


def job(bundle: Path, folder: Path, *options: str) -> list[str]:
    """The command of a job over the files of a folder."""
    files = ["--input", str(folder / "in-*.jsonl"), "--output", str(folder / "out")]
    return [sys.executable, "-m", "kvx", "batch", "--model", str(bundle), *files, *options]


@pytest.fixture
def line(tmp_path: Path, numbers_bundle: Path, texts: list[str], cluster: Cluster) -> list[str]:
    """The command of a job on the cluster, over two files, given on the head."""
    written(tmp_path, texts, ROWS, files=2)
    options = ["--shard-rows", str(SHARD_ROWS), "--engine", "ray", "--address", "auto", "--workers", "2"]
    return cluster.nodes[0].line(*job(numbers_bundle, tmp_path, *options))


def finished(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def start(line: list[str], output: Path, shards_there: int) -> subprocess.Popen[bytes]:
    """The command, after so many shards are there."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: process.poll() is not None or (output.is_dir() and len(shards(output)) >= shards_there))
    assert process.poll() is None, process.stderr and process.stderr.read().decode()
    return process


def is_further(process: subprocess.Popen[bytes], output: Path, before: int) -> bool:
    """Whether a job has ended or has more shards than before."""
    return process.poll() is not None or len(shards(output)) > before


def contents(output: Path) -> dict[str, str]:
    """The hash of each shard. A worker that was killed may have written it again."""
    return {name: content for name, (_, content) in digests(output).items()}


def ends_well(process: subprocess.Popen[bytes], output: Path, expected: list[str]) -> None:
    with no_leftovers(output):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err.decode()
    rows = read_rows(output)
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [row["translation"] for row in rows] == [expected[one % 500] for one in range(ROWS)]


def test_the_shards_and_the_manifest_are_those_of_one_machine(
    line: list[str], tmp_path: Path, cluster: Cluster, run_job: RunJob, expected: list[str]
) -> None:
    ends_well(start([*line, "--ship", "--workers", "4"], tmp_path / "out", 1), tmp_path / "out", expected)
    for node in cluster.nodes:
        [_] = node.files.glob("kvx-bundles-*/*/encoder.onnx")
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
    os.kill(workers(*cluster.nodes)[0], signal.SIGKILL)
    ends_well(process, tmp_path / "out", expected)


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_driver_that_is_killed_is_gone_on_from_by_either_engine(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str], engine: str
) -> None:
    process = start(line, tmp_path / "out", 5)
    kill(process)
    wait_for(lambda: not workers(*cluster.nodes))  # Ray ends those of a driver that is gone
    before = digests(tmp_path / "out")
    assert len(before) >= 5
    again = line if engine == "ray" else line[line.index(sys.executable) : line.index("--engine")]
    ends_well(start(again, tmp_path / "out", len(before)), tmp_path / "out", expected)
    assert before.items() <= digests(tmp_path / "out").items()


def test_a_row_that_is_broken_gets_its_error(line: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text":"one"}\n{broken\n')
    line[line.index("--input") + 1] = str(tmp_path / "bad.jsonl")
    line[line.index("--address") + 1] = f"127.0.0.1:{PORT}"
    done = finished(line)
    assert done.returncode == 0, done.stderr
    assert "bad.jsonl, line 2: The line is not JSON" in read_rows(tmp_path / "out")[1]["error"]
    assert "Traceback" not in done.stderr


def test_a_file_that_ends_in_the_middle_ends_the_job(line: list[str], tmp_path: Path) -> None:
    whole = gzip.compress((tmp_path / "in-0.jsonl").read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    line[line.index("--input") + 1] = str(tmp_path / "cut.jsonl.gz")
    done = finished(line)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path / 'cut.jsonl.gz'} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("there", ["nothing", "another bundle"])
def test_a_bundle_that_is_not_on_a_node_ends_the_job(
    line: list[str], tmp_path: Path, cluster: Cluster, numbers_bundle: Path, tiny_bundle: Path, there: str
) -> None:
    here, node = tmp_path / "bundle", cluster.nodes[1]
    shutil.copytree(numbers_bundle, here)
    line[line.index("--model") + 1] = str(here)
    if there == "nothing":
        node.run("mount", "-t", "tmpfs", "tmpfs", str(here))
    else:
        node.run("mount", "--bind", str(tiny_bundle), str(here))
    try:
        done = finished([*line, "--workers", "4"])
    finally:
        node.run("umount", str(here))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{here} on kvx-2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_whose_device_kvx_cannot_use_ends_the_job(line: list[str]) -> None:
    done = finished([*line, "--devices-per-worker", "1", "--workers", "1"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "cuda" in done.stderr.lower()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--workers", "9"], "room for 4 workers with 1 logical CPU"),
        (["--cpus-per-worker", "3"], "room for 0 workers with 3 logical CPUs"),
        (["--devices-per-worker", "2"], "1 GPUs"),
        (["--address", "127.0.0.1:9"], "No Ray cluster answers at 127.0.0.1:9"),
        (["--address", "nowhere"], "--address is 'nowhere'"),
    ],
)
def test_what_would_make_ray_wait_is_refused_at_once(line: list[str], options: list[str], mentions: str) -> None:
    started = time.monotonic()
    done = finished([*line, *options])
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
    done = finished(cluster.nodes[0].line(sys.executable, "-c", PIPELINE, cluster.address, str(numbers_bundle)))
    assert done.returncode == 0, done.stderr
    words = ["eins", "zwei", "drei"] * 40
    assert json.loads(done.stdout) == [[number, word, None] for number, word in enumerate(words)]


def test_a_node_that_is_lost_takes_no_row_with_it(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str]
) -> None:
    process = start([*line, "--workers", "4"], tmp_path / "out", 3)
    cluster.lose(cluster.nodes[1])
    ends_well(process, tmp_path / "out", expected)
    cluster.start_node(num_cpus="2")


@pytest.mark.proof
def test_twenty_kills_of_workers_nodes_and_drivers(
    tmp_path: Path, seed: Seed, seed_bundle: Path, cluster: Cluster
) -> None:
    """The test set, numbered, many times over: every row is the reference's. KVX_BATCH_ROWS sets how many rows."""
    rows, out = int(os.environ.get("KVX_BATCH_ROWS", "40000")), tmp_path / "out"
    written(tmp_path, seed.sources, rows, files=4)
    options = ["--shard-rows", str(rows // 80), "--engine", "ray", "--address", "auto", "--workers", "3"]
    command, generator, hit = job(seed_bundle, tmp_path, *options), random.Random(3), Counter[str]()
    driver = start(cluster.nodes[0].line(*command), out, 0)
    for _ in range(20):
        before = contents(out)
        wait_for(partial(is_further, driver, out, len(before)))
        time.sleep(generator.random())
        if driver.poll() is not None:
            break
        hit[what := generator.choice(["worker", "node", "driver"])] += 1
        if what == "worker":
            wait_for(lambda: bool(workers(*cluster.nodes)))
            os.kill(generator.choice(workers(*cluster.nodes)), signal.SIGKILL)
        elif what == "node":
            cluster.lose(cluster.nodes[1])
            cluster.start_node(num_cpus="2")
        else:
            kill(driver)
            wait_for(lambda: not workers(*cluster.nodes))
            whole_ids(out, rows // 80, rows - 1)
            driver = start(cluster.nodes[0].line(*command), out, 0)
        assert before.items() <= contents(out).items()
    with no_leftovers(out):
        _, err = driver.communicate(timeout=PATIENCE + rows / 100)
        assert driver.returncode == 0, err.decode()
    assert whole_ids(out, rows // 80, rows - 1) == list(range(rows))
    greedy = [one["text"] for one in seed.greedy]
    wrong = [row["id"] for row in read_rows(out) if row["translation"] != greedy[row["id"] % 1000]]
    assert wrong == []
    assert sum(hit.values()) >= 15, hit
    assert len(hit) == 3


@pytest.mark.proof
def test_a_job_without_room_says_so_and_goes_on_when_there_is_some(
    tmp_path: Path, numbers_bundle: Path, texts: list[str], expected: list[str]
) -> None:
    written(tmp_path, texts, ROWS, files=2)
    options = ["--shard-rows", str(SHARD_ROWS), "--engine", "ray", "--address", "auto"]
    with cluster_of(1, num_cpus="0") as cluster:
        cluster.start_node(num_cpus="1")
        process = start(cluster.nodes[0].line(*job(numbers_bundle, tmp_path, *options)), tmp_path / "out", 2)
        cluster.lose(cluster.nodes[1])
        assert process.stderr
        said = process.stderr.readline().decode()
        assert "has only 1 node (0 CPUs and 0 GPUs)" in said
        assert "the job waits for nodes with room" in said
        cluster.start_node(num_cpus="1")
        ends_well(process, tmp_path / "out", expected)


def test_a_head_that_is_lost_ends_the_job_which_goes_on_elsewhere(
    line: list[str], tmp_path: Path, cluster: Cluster, expected: list[str]
) -> None:
    """The last test: there is no cluster afterwards."""
    command = line[line.index(sys.executable) :]
    process = start(cluster.nodes[1].line(*command), tmp_path / "out", 3)
    cluster.lose(cluster.nodes[0])
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err.decode()
    assert "Give the same command again" in err.decode()
    ends_well(start(command[: command.index("--engine")], tmp_path / "out", 3), tmp_path / "out", expected)
