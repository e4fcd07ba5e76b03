"""Whatever ends the process, the same command goes on: no row is lost, none comes twice, no file is half there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvx import Translator
from kvx.tests.conftest import Seed
from kvx.tests.runtime.scale.conftest import json_lines, no_leftovers, read_rows, shards

PATIENCE = 120  # seconds


def command(bundle: Path, folder: Path, shard_rows: int) -> list[str]:
    files = ["--input", str(folder / "in-*.jsonl"), "--output", str(folder / "out"), "--shard-rows", str(shard_rows)]
    return [sys.executable, "-m", "kvx", "batch", "--model", str(bundle), "--device", "cpu", *files]


def kill_in_its_course(line: list[str], output: Path, further: int, delay: float) -> bool:
    """Kills the command `delay` seconds after so many further shards are there; whether it was still at work."""
    before = len(shards(output)) if output.is_dir() else 0
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if output.is_dir() and len(shards(output)) >= before + further:
            break
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def whole_ids(output: Path, shard_rows: int, last: int) -> list[int]:
    """The ids of all rows in shards, each of which is whole."""
    found: list[int] = []
    for path in shards(output):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert path.read_bytes().endswith(b"\n")
        assert len(rows) == shard_rows or rows[-1]["id"] == last or rows[-1]["last"]
        found.extend(row["id"] for row in rows)
    assert len(found) == len(set(found))
    return found


def digests(output: Path) -> dict[str, tuple[int, str]]:
    """The inode and content of each shard: one that is skipped has the same."""
    return {path.name: (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest()) for path in shards(output)}


def survives_kills(bundle: Path, folder: Path, rows: int, shard_rows: int, *, kills: int, seed: int) -> int:
    """Kills the job again and again, and lets it end → in how many of the runs it was at work when it was killed."""
    generator, hit, out = random.Random(seed), 0, folder / "out"
    line = command(bundle, folder, shard_rows)
    for _ in range(kills):
        before = digests(out) if out.is_dir() else {}
        hit += kill_in_its_course(line, out, generator.randrange(1, 3), generator.random() * 0.2)
        whole_ids(out, shard_rows, rows - 1)
        assert before.items() <= digests(out).items()
    before = digests(out)
    with no_leftovers(out):
        subprocess.run(line, check=True, capture_output=True, timeout=10 * PATIENCE)
    assert before.items() <= digests(out).items()
    assert whole_ids(out, shard_rows, rows - 1) == list(range(rows))
    return hit


def written(folder: Path, texts: list[str], rows: int, files: int) -> None:
    """Files of rows that are numbered through."""
    each = rows // files
    for file in range(files):
        numbers = range(file * each, (file + 1) * each)
        found = [{"id": one, "text": texts[one % len(texts)], "last": one == numbers[-1]} for one in numbers]
        json_lines(folder / f"in-{file}.jsonl", found)


def test_kills_lose_no_row_and_repeat_none(
    tmp_path: Path, numbers_bundle: Path, texts: list[str], expected: list[str]
) -> None:
    written(tmp_path, texts, rows := 6000, files=2)
    assert survives_kills(numbers_bundle, tmp_path, rows, 275, kills=3, seed=5) >= 2
    assert [row["translation"] for row in read_rows(tmp_path / "out")] == [expected[one % 500] for one in range(rows)]


@pytest.mark.proof
def test_twenty_kills_of_a_long_job(tmp_path: Path, seed: Seed, seed_bundle: Path, seed_translator: Translator) -> None:
    """The test set, numbered, many times over: every row is the reference's. KVX_BATCH_ROWS sets how many rows."""
    rows = int(os.environ.get("KVX_BATCH_ROWS", "40000"))
    written(tmp_path, seed.sources, rows, files=4)
    assert survives_kills(seed_bundle, tmp_path, rows, rows // 80, kills=20, seed=1) >= 15  # the others came too late
    greedy = [one["text"] for one in seed.greedy]
    wrong = [row["id"] for row in read_rows(tmp_path / "out") if row["translation"] != greedy[row["id"] % 1000]]
    assert wrong == []
