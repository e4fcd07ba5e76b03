"""The output folder: whole shards are kept, and no other job gets in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvx import InputError, TranslateOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.scale import folder as folders
from kvx.runtime.scale.batch import Progress
from kvx.runtime.scale.inputs import InputFile
from kvx.runtime.scale.job import bundle_digest
from kvx.runtime.scale.lines import Line, LineReader
from kvx.tests.runtime.scale.conftest import RunJob, json_lines, no_leftovers, read_rows, shards

ROWS = [{"id": number, "text": text} for number, text in enumerate(["one", "two", "three", "four", "five"] * 4)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return json_lines(tmp_path / "in.jsonl", ROWS)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in shards(folder)}


def test_a_file_begins_a_new_shard(tmp_path: Path, rows: Path, run_job: RunJob) -> None:
    other = json_lines(tmp_path / "other.jsonl", ROWS[:8])
    (tmp_path / "nothing.jsonl").write_text("\n")
    summary = run_job(tmp_path / "out", rows, tmp_path / "nothing.jsonl", other, shard_rows=8)
    assert {path.name: len(path.read_text().splitlines()) for path in shards(tmp_path / "out")} == {
        "part-00000-00000.jsonl": 8,
        "part-00000-00001.jsonl": 8,
        "part-00000-00002.jsonl": 4,
        "part-00002-00000.jsonl": 8,
    }
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert [one["last"] for one in manifest["shards"]] == [False, False, True, True]
    assert manifest["complete"]
    assert summary.shards == 4


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_only_what_is_missing_is_translated_again(tmp_path: Path, rows: Path, run_job: RunJob, lost: list[int]) -> None:
    run_job(tmp_path / "out", rows, shard_rows=8)
    whole, before = read_rows(tmp_path / "out"), inodes(tmp_path / "out")
    files = shards(tmp_path / "out")
    for number in lost:
        files[number].unlink()
    with no_leftovers(tmp_path / "out"):
        summary = run_job(tmp_path / "out", rows, shard_rows=8)
    assert read_rows(tmp_path / "out") == whole
    assert summary.rows - summary.rows_before == sum((8, 8, 4)[number] for number in lost)
    kept = [files[number].name for number in range(3) if number not in lost]
    assert {name: inodes(tmp_path / "out")[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: content[:5] + b"#" + content[6:]],
    ids=["cut", "emptied", "altered"],
)
def test_a_shard_that_is_not_what_was_written_is_written_again(
    tmp_path: Path, rows: Path, run_job: RunJob, damage: Callable[[bytes], bytes]
) -> None:
    run_job(tmp_path / "out", rows, shard_rows=8)
    first = shards(tmp_path / "out")[0]
    content = first.read_bytes()
    first.write_bytes(damage(content))
    run_job(tmp_path / "out", rows, shard_rows=8)
    assert first.read_bytes() == content


def test_files_that_are_done_are_not_opened_again(
    tmp_path: Path, rows: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = json_lines(tmp_path / "other.jsonl", ROWS)
    run_job(tmp_path / "out", rows, other, shard_rows=8)
    shards(tmp_path / "out")[-1].unlink()
    monkeypatch.setattr(LineReader, "check", lambda *_: None)
    reading: list[Path] = []
    own = LineReader._lines

    def noted(reader: LineReader, file: InputFile) -> Iterator[Line]:
        reading.append(file.path)
        return own(reader, file)

    monkeypatch.setattr(LineReader, "_lines", noted)
    run_job(tmp_path / "out", rows, other, shard_rows=8)
    assert reading == [other]


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ({"shard_rows": 9}, "`shard_rows` was 8 and is 9"),
        ({"translate": TranslateOptions(beam_size=2)}, "`beam_size` was None and is 2"),
        ({"translate": TranslateOptions(max_new_tokens=5)}, "`max_new_tokens` was None and is 5"),
        ({"error_field": "e"}, "`error_field` was 'error' and is 'e'"),
    ],
)
def test_other_options_are_refused_and_a_restart_takes_them(
    tmp_path: Path, rows: Path, run_job: RunJob, options: dict[str, Any], mentions: str
) -> None:
    out = tmp_path / "out"
    run_job(out, rows, shard_rows=8)
    before = inodes(out)
    with pytest.raises(InputError) as raised:
        run_job(out, rows, **{"shard_rows": 8, **options})
    assert mentions in str(raised.value)
    assert inodes(out) == before
    with no_leftovers(out):
        summary = run_job(out, rows, restart=True, **{"shard_rows": 8, **options})
    assert (summary.rows, summary.rows_before) == (20, 0)


def test_rows_and_workers_may_change_between_runs(tmp_path: Path, rows: Path, run_job: RunJob) -> None:
    run_job(tmp_path / "out", rows, shard_rows=8)
    shards(tmp_path / "out")[0].unlink()
    assert run_job(tmp_path / "out", rows, shard_rows=8, translate=TranslateOptions(rows=3, workers=1)).rows == 20


def test_another_input_is_refused(tmp_path: Path, rows: Path, run_job: RunJob) -> None:
    run_job(tmp_path / "out", rows, shard_rows=8)
    more = json_lines(tmp_path / "more.jsonl", ROWS)
    with pytest.raises(InputError, match="its input was 1 files and is 2"):
        run_job(tmp_path / "out", rows, more, shard_rows=8)
    json_lines(rows, ROWS[:-1])
    with pytest.raises(InputError, match=r"its input was in\.jsonl of"):
        run_job(tmp_path / "out", rows, shard_rows=8)


def test_a_bundle_that_has_changed_is_refused(tmp_path: Path, model: LoadedModel) -> None:
    manifest = model.manifest
    name, entry = next(iter(manifest.files.items()))
    files = {**manifest.files, name: replace(entry, sha256="0" * 64)}
    assert bundle_digest(replace(manifest, created="2030-01-01T00:00:00", parity=None)) == bundle_digest(manifest)
    assert bundle_digest(replace(manifest, files=files)) != bundle_digest(manifest)


def test_options_may_change_as_long_as_no_shard_is_whole(tmp_path: Path, rows: Path, run_job: RunJob) -> None:
    run_job(tmp_path / "out", rows)
    shards(tmp_path / "out")[0].unlink()
    assert run_job(tmp_path / "out", rows, shard_rows=8).shards == 3


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, rows: Path, run_job: RunJob, *, restart: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"something else in it \(thesis\.txt\)"):
        run_job(tmp_path / "out", rows, restart=restart)
    (tmp_path / "out" / "_manifest.json").write_text("{}")
    with pytest.raises(InputError, match="has not written"):
        run_job(tmp_path / "out", rows, restart=restart)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".kvx") == [
        "_manifest.json",
        "thesis.txt",
    ]


def test_two_jobs_into_one_folder_are_refused_while_one_runs(tmp_path: Path, rows: Path, run_job: RunJob) -> None:
    refused: list[str] = []

    def meanwhile(_: Progress) -> None:
        if not refused:
            with pytest.raises(InputError) as raised:
                run_job(tmp_path / "out", rows, restart=True)
            refused.append(str(raised.value))

    run_job(tmp_path / "out", rows, told=meanwhile)
    assert f"Another job is writing to {tmp_path / 'out'} (process {os.getpid()} on " in refused[0]
    assert len(read_rows(tmp_path / "out")) == len(ROWS)


def test_a_full_disk_leaves_the_whole_shards_and_is_gone_on_from(
    tmp_path: Path, rows: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, plain = list[Path](), folders._sync

    def full_after_a_shard(path: Path) -> None:
        synced.append(path)
        if path.name.startswith(".part-00000-00001"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path)

    monkeypatch.setattr(folders, "_sync", full_after_a_shard)
    with (
        no_leftovers(tmp_path / "out"),
        pytest.raises(InputError, match=r"No space left on device.*Free space on the disk.*same command again"),
    ):
        run_job(tmp_path / "out", rows, shard_rows=8)
    assert [path.name for path in shards(tmp_path / "out")] == ["part-00000-00000.jsonl"]
    monkeypatch.undo()
    assert run_job(tmp_path / "out", rows, shard_rows=8).rows_before == 8
    assert [row["id"] for row in read_rows(tmp_path / "out")] == list(range(20))


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, rows: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, sync, put = list[str](), folders._sync, Path.replace

    def synced(path: Path) -> None:
        events.append(f"sync {path.name}")
        sync(path)

    def named_so(path: Path, to: Path) -> Path:
        events.append(f"name {to.name}")
        return put(path, to)

    monkeypatch.setattr(folders, "_sync", synced)
    monkeypatch.setattr(Path, "replace", named_so)
    run_job(tmp_path / "out", rows)
    named = events.index("name part-00000-00000.jsonl")
    assert any(event.startswith("sync .part-00000-00000.jsonl.") for event in events[:named])
    assert "name part-00000-00000.jsonl.json" in events[:named]
    assert events[named + 1] == "sync out"
