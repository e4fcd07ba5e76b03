"""`kvx batch`, as people type it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kvx.tests.commands.running import ENVIRONMENT, KVX, PATIENCE, Converse, Outcome, Run, invoke, refused


def batch(bundle: Path, *arguments: str | Path) -> Outcome:
    return invoke("batch", "--model", bundle, "--device", "cpu", *arguments)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id":1,"text":"twelve"}\n{"id":2,"text":"one"}\n{broken\n', encoding="utf-8")
    return path


def test_rows_are_translated_and_the_summary_counts_the_errors(
    numbers_bundle: Path, rows: Path, tmp_path: Path
) -> None:
    found = batch(numbers_bundle, "--input", rows, "--output", tmp_path / "out", "--text-field", "text")
    assert (found.code, found.out) == (0, "")
    assert f"kvx: 3 rows in 1 shard in {tmp_path / 'out'}; 3 of them now in " in found.err
    assert "kvx: 1 row could not be translated:" in found.err
    assert f"{rows}, line 3: The line is not JSON" in found.err
    written = (tmp_path / "out" / "part-00000-00000.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["translation"] for line in written] == ["zwölf", "eins", None]


def test_errors_fail_makes_the_exit_code_1_also_when_all_is_there(
    numbers_bundle: Path, rows: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert batch(numbers_bundle, "-i", rows, "-o", tmp_path / "out", "--errors", "fail").code == 1
    found = batch(numbers_bundle, "-i", rows, "-o", tmp_path / "out")
    assert found.code == 0
    assert "whole already, and skipped: 1 shard" in found.err
    assert "; 0 of them now\n" in found.err


def test_a_pattern_in_quotes_is_expanded(numbers_bundle: Path, rows: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(rows, tmp_path / "in2.jsonl")
    found = run("batch", "--model", numbers_bundle, "--device", "cpu", "-i", "in*.jsonl", "-o", "out")
    assert (found.code, found.out) == (0, "")
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) == 2


def test_wrong_input_is_one_sentence_with_the_commands_own_flags(
    numbers_bundle: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(batch(numbers_bundle, "-i", rows, "-o", out, "--text-field", "x"), "no field 'x'")
    refused(batch(numbers_bundle, "-i", rows, "-o", out, "--translation-field", "id"), "--translation-field")
    refused(batch(numbers_bundle, "-i", rows, "-o", out, "--shard-rows", "0"), "--shard-rows is 0")
    refused(batch(numbers_bundle, "-i", rows, "-o", out, "--compression", "gz", "--output-format", "parquet"))
    refused(batch(numbers_bundle, "-i", rows, "-o", tmp_path), "something else in it (in.jsonl)")
    assert not out.exists()
    batch(numbers_bundle, "-i", rows, "-o", out)
    refused(batch(numbers_bundle, "-i", rows, "-o", out, "--beam-size", "2"), "--beam-size was None", "--restart")


def test_another_bundle_is_refused_until_restart(
    numbers_bundle: Path, tiny_bundle: Path, rows: Path, tmp_path: Path
) -> None:
    batch(numbers_bundle, "-i", rows, "-o", tmp_path / "out")
    refused(batch(tiny_bundle, "-i", rows, "-o", tmp_path / "out"), "the bundle is another one")
    assert batch(tiny_bundle, "-i", rows, "-o", tmp_path / "out", "--restart").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_shards_and_says_how_to_go_on(
    converse: Converse, numbers_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "in.txt").write_text("one hundred and one\n" * 20_000)
    arguments = ("batch", "--model", str(numbers_bundle), "--device", "cpu", "-i", "in.txt", "-o", "out")
    command = converse(*arguments, "--shard-rows", "100")
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("out/part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    command.process.send_signal(number)
    found = command.end()
    assert (found.code, found.out) == (code, "")
    assert "Give the same command again to go on" in found.err
    assert list(tmp_path.glob("out/.part*")) == []
    assert {len(path.read_text().splitlines()) for path in tmp_path.glob("out/part-*")} == {100}


def test_a_kill_leaves_no_lock(numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n" * 20_000)
    line = [*KVX, "batch", "--model", numbers_bundle, "--device", "cpu", "-i", "in.txt", "-o", "out"]
    line += ["--shard-rows", "100"]
    process = subprocess.Popen([*map(str, line)], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("out/part-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        out = tmp_path / "out"
        refused(batch(numbers_bundle, "-i", tmp_path / "in.txt", "-o", out), f"process {process.pid} on")
    finally:
        process.kill()
        process.wait()
    (tmp_path / "in.txt").write_text("one\n")
    refused(batch(numbers_bundle, "-i", tmp_path / "in.txt", "-o", out), "its input was in.txt of")
    assert batch(numbers_bundle, "-i", tmp_path / "in.txt", "-o", out, "--restart").code == 0
