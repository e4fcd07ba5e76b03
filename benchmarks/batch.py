"""A job beside `kvx translate` on the same lines: on this machine, on Ray on it, and on two nodes against one.

    python benchmarks/batch.py artifacts/my-model --text lines.txt --rows 20000 --ray

A job's rate is that between its first and its last shard. So it leaves out what a start costs, which is told beside it.
For Ray, nodes of a logical CPU each are made on this machine (scripts/ray_nodes.py), and one or two of them hold a
worker of one thread. A node keeps to a core, with all that Ray runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvx.benchmarks.service import KVX, translate
from kvx.runtime.system import available_threads, cpu_model
from kvx.scripts.ray_nodes import ENVIRONMENT, Cluster, Node, cluster_of

TARGET = 40  # shards of a job, or some more


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of a job, as lines and as JSON, and the size of their shards."""

    bundle: Path
    folder: Path
    rows: int

    @classmethod
    def of(cls, bundle: Path, text: Path, rows: int, folder: Path) -> Work:
        """The lines of a text again and again, up to so many rows."""
        lines = text.read_text(encoding="utf-8").splitlines()
        repeated = [lines[number % len(lines)] for number in range(rows)]
        (folder / "in.txt").write_text("".join(f"{line}\n" for line in repeated), encoding="utf-8")
        rows_ = (json.dumps({"id": number, "text": line}) for number, line in enumerate(repeated))
        (folder / "in.jsonl").write_text("".join(f"{row}\n" for row in rows_), encoding="utf-8")
        return cls(bundle, folder, rows)

    def job(self, *options: str, node: Node | None = None) -> tuple[float, float]:
        """Runs a job → rows/s between its first and its last shard, and seconds to the first. Removes what it wrote."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            line = [*KVX, "batch", "--model", str(self.bundle), "-i", str(self.folder / "in.jsonl"), "-o", f"{out}/out"]
            line += ["--beam-size", "1", "--shard-rows", str(max(1, self.rows // TARGET)), *options]
            begun = time.time()
            subprocess.run(node.line(*line) if node else line, env=ENVIRONMENT, check=True, capture_output=True)
            paths = [path for path in Path(out, "out").iterdir() if path.name.startswith("part-")]
            ends = sorted((path.stat().st_mtime, sum(1 for _ in path.open("rb"))) for path in paths)
        rows = sum(count for _, count in ends[1:])
        return rows / (ends[-1][0] - ends[0][0]), ends[0][0] - begun


Run = Callable[[], tuple[float, float | None]]


def measure(runs: dict[str, Run], rounds: int) -> None:
    """Prints each run of each round, in turns, and medians against the first run of all."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(1, rounds + 1):
        for name, run in runs.items():
            rate, first = run()
            found[name].append(rate)
            told = "" if first is None else f", first shard after {first:.1f} s"
            print(f"round {number}: {name}: {rate:.0f} rows/s{told}", flush=True)
    base = found[next(iter(runs))]
    for name, rates in found.items():
        ratio = statistics.median(rate / other for rate, other in zip(rates, base, strict=True))
        print(f"{name}: median {statistics.median(rates):.0f} rows/s, {ratio:.2f} of {next(iter(runs))}")


def on_ray(work: Work, cluster: Cluster, workers: int) -> Run:
    """A job on a cluster that is there."""
    options = ["--engine", "ray", "--address", "auto", "--workers", str(workers)]
    return lambda: work.job(*options, node=cluster.nodes[0])


def main() -> None:
    """Prints the machine and all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    cores = available_threads()
    print(f"{cpu_model()}, {cores} of {os.cpu_count()} cores, {sys.platform}; {given.bundle}, {given.rows} rows")
    with tempfile.TemporaryDirectory() as folder:
        work = Work.of(given.bundle, given.text, given.rows, Path(folder))
        runs: dict[str, Run] = {
            "kvx translate": lambda: (translate(work.bundle, work.folder / "in.txt")[0], None),
            "kvx batch": work.job,
        }
        if not given.ray:
            measure(runs, given.rounds)
            return
        with cluster_of(1, num_cpus=str(cores)) as cluster:
            measure({**runs, f"Ray, {cores} workers on one node": on_ray(work, cluster, cores)}, given.rounds)
        with (
            cluster_of(1, num_cpus="1", cores="0") as one,
            cluster_of(1, num_cpus="1", cores="0") as two,
        ):
            two.start_node(num_cpus="1", cores="1")
            measure({"Ray, one node": on_ray(work, one, 1), "Ray, two nodes": on_ray(work, two, 2)}, given.rounds)


if __name__ == "__main__":
    main()
