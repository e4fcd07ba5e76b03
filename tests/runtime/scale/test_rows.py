"""A row that cannot be translated gets its error, and fails nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvx import TranslateOptions
from kvx.tests.runtime.scale.conftest import RunJob, json_lines, read_rows, shards

LINES = {
    b'{"text":"one"}': None,
    b"{broken": "line 2: The line is not JSON",
    b"[1]": "line 3: The line is the JSON value '[1]'",
    b'{"other":1}': "line 4: There is no field 'text'",
    b'{"text":null}': "line 5: The field 'text' is null",
    b'{"text":7}': "line 6: The field 'text' is 7",
    b'{"text":"\\ud800"}': "line 7: ",
    b'{"text":"\xff"}': "line 8: Byte 10 (0xff) is not UTF-8",
    b"[" * 100_000: "line 9: The line is not JSON",
    b'{"text":""}': None,
    b'{"text":"two"}': None,
}


def test_each_wrong_row_has_its_own_error_and_line(tmp_path: Path, run_job: RunJob) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n \n\n")
    summary = run_job(tmp_path / "out", path, shard_rows=4)
    rows = read_rows(tmp_path / "out")
    assert len(rows) == len(LINES) == summary.rows
    for row, told in zip(rows, LINES.values(), strict=True):
        assert (row["error"] is None) == (told is None) == (row["translation"] is not None)
        if told is not None:
            assert row["error"].startswith(f"{path}, {told}")
            assert ". Expected " in row["error"]
    assert [row["translation"] for row in rows if row["error"] is None] == ["eins", "", "zwei"]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text(encoding="utf-8"))
    assert manifest["totals"]["errors"] == summary.errors == 8
    assert [one["errors"] for one in manifest["shards"]] == [3, 4, 1]
    assert manifest["shards"][2]["first_errors"] == [rows[8]["error"]]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path, run_job: RunJob) -> None:
    (tmp_path / "in.jsonl").write_text('\n{"text":"one"}\n  \n{"text":1}\n')
    assert run_job(tmp_path / "out", tmp_path / "in.jsonl").rows == 2
    assert "line 4: " in read_rows(tmp_path / "out")[1]["error"]


def test_a_text_beyond_the_positions_is_an_error_or_is_cut_and_counted(tmp_path: Path, run_job: RunJob) -> None:
    long = " ".join(["one"] * 200)
    json_lines(tmp_path / "in.jsonl", [{"text": "one"}, {"text": long}, {"text": "two"}])
    assert run_job(tmp_path / "a", tmp_path / "in.jsonl").errors == 1
    assert "tokens" in read_rows(tmp_path / "a")[1]["error"]
    assert [row["translation"] for row in read_rows(tmp_path / "a")][::2] == ["eins", "zwei"]
    summary = run_job(tmp_path / "b", tmp_path / "in.jsonl", translate=TranslateOptions(on_long="truncate"))
    assert (summary.errors, summary.truncated) == (0, 1)


def test_a_line_that_is_too_long_is_an_error(tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvx.runtime.scale.lines.LONGEST_OBJECT", 100)
    long = '{"text":"one", "x":"' + "y" * 1000 + '"}'
    (tmp_path / "in.jsonl").write_text(f'{long}\n{{"text":"two"}}\n{long}')
    run_job(tmp_path / "out", tmp_path / "in.jsonl")
    first, second, third = read_rows(tmp_path / "out")
    assert "more than 100 bytes" in first["error"]
    assert second["translation"] == "zwei"
    assert "line 3: " in third["error"]


def test_a_field_of_a_later_row_gives_way_to_that_of_the_output(tmp_path: Path, run_job: RunJob) -> None:
    rows = [{"text": "one"}] * 150 + [{"error": "old", "text": "two", "x": "ü"}]
    json_lines(tmp_path / "in.jsonl", rows)
    run_job(tmp_path / "out", tmp_path / "in.jsonl")
    assert read_rows(tmp_path / "out")[-1] == {"text": "two", "x": "ü", "translation": "zwei", "error": None}


def test_rows_of_text_with_an_error_are_empty_lines(tmp_path: Path, run_job: RunJob) -> None:
    (tmp_path / "in.txt").write_bytes(b"one\n\xff\ntwo\n")
    assert run_job(tmp_path / "out", tmp_path / "in.txt").errors == 1
    assert shards(tmp_path / "out")[0].read_text(encoding="utf-8") == "eins\n\nzwei\n"


def test_logits_that_are_not_finite_fail_their_row_alone(
    tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvx.runtime.engine.request import Request

    monkeypatch.setattr(Request, "failed", property(lambda request: request.number == 2))
    json_lines(tmp_path / "in.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    assert run_job(tmp_path / "out", tmp_path / "in.jsonl").errors == 1
    assert [row["translation"] for row in read_rows(tmp_path / "out")] == ["eins", None, "drei"]
    assert "not finite" in read_rows(tmp_path / "out")[1]["error"]


def test_samples_are_the_same_wherever_a_job_goes_on(tmp_path: Path, run_job: RunJob, texts: list[str]) -> None:
    json_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts[:60]])
    sampled = TranslateOptions(samples=1, temperature=5.0)
    run_job(tmp_path / "out", tmp_path / "in.jsonl", shard_rows=20, translate=sampled)
    before = [path.read_bytes() for path in shards(tmp_path / "out")]
    shards(tmp_path / "out")[1].unlink()
    run_job(tmp_path / "out", tmp_path / "in.jsonl", shard_rows=20, translate=sampled)
    assert [path.read_bytes() for path in shards(tmp_path / "out")] == before
