"""Every format in and out: rows in order, with all that they had."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import importlib
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvx import InputError, OptionError, TranslateOptions
from kvx.tests.runtime.scale.conftest import RunJob, json_lines, read_rows, shards

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.decompress,
    "bz2": bz2.decompress,
    "xz": lzma.decompress,
}


def pyarrow() -> Any:  # noqa: ANN401
    pytest.importorskip("pyarrow", reason="the extra scale is not installed")
    import pyarrow.parquet

    return pyarrow


def test_json_lines_keep_their_fields_to_the_byte(tmp_path: Path, run_job: RunJob) -> None:
    lines = ['{"x":1.10, "text" :"twelve","n":[1,  2]}', '{"text":"one", "deep":{"a":null}, "ü":"\\u00fc"}  ', "{}"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run_job(tmp_path / "out", tmp_path / "in.jsonl")
    [shard] = shards(tmp_path / "out")
    first, second, third = shard.read_text(encoding="utf-8").splitlines()
    assert first == '{"x":1.10, "text" :"twelve","n":[1,  2], "translation": "zwölf", "error": null}'
    assert second == '{"text":"one", "deep":{"a":null}, "ü":"\\u00fc", "translation": "eins", "error": null}'
    assert json.loads(third)["translation"] is None


@pytest.mark.parametrize("compression", [None, *COMPRESS])
def test_text_in_is_text_out_line_by_line(
    tmp_path: Path, run_job: RunJob, texts: list[str], expected: list[str], compression: str | None
) -> None:
    content = "\n".join(texts).encode() + b"\r\n\n"
    path = tmp_path / ("in.txt" if compression is None else f"in.txt.{compression}")
    path.write_bytes(content if compression is None else COMPRESS[compression](content))
    summary = run_job(tmp_path / "out", path, shard_rows=200)
    found = [one.read_bytes() for one in shards(tmp_path / "out")]
    assert [one.name.partition("-")[2] for one in shards(tmp_path / "out")] == [
        f"00000-0000{number}.txt{'' if compression is None else f'.{compression}'}" for number in range(3)
    ]
    plain = b"".join(found if compression is None else map(DECOMPRESS[compression], found))
    assert plain.decode().split("\n") == [*expected, "", ""]
    assert (summary.rows, summary.errors, summary.shards) == (len(texts) + 1, 0, 3)


def test_compressed_shards_of_the_same_rows_are_the_same_files(tmp_path: Path, run_job: RunJob) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    for name in ("a", "b"):
        run_job(tmp_path / name, tmp_path / "in.txt", compression="gz")
    one, other = (shards(tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert one == other


def test_zst_in_and_out(tmp_path: Path, run_job: RunJob) -> None:
    arrow = pyarrow()
    with arrow.CompressedOutputStream(str(tmp_path / "in.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"text":"one"}\n{"text":"two"}\n')
    run_job(tmp_path / "out", tmp_path / "in.jsonl.zst")
    [shard] = shards(tmp_path / "out")
    assert shard.name.endswith(".jsonl.zst")
    found = arrow.CompressedInputStream(str(shard), "zstd").read().decode()
    assert [json.loads(line)["translation"] for line in found.splitlines()] == ["eins", "zwei"]


def table(texts: list[str]) -> Any:  # noqa: ANN401
    """Columns of types that JSON does not have, with a null each."""
    arrow, count = pyarrow(), len(texts)
    day = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    columns = {
        "id": arrow.array(range(count), arrow.int32()),
        "when": arrow.array([day, *[None] * (count - 1)], arrow.timestamp("ns", tz="UTC")),
        "price": arrow.array([decimal.Decimal("1.10")] * count, arrow.decimal128(9, 2)),
        "raw": arrow.array([b"\0\xff"] * count, arrow.binary()),
        "tags": arrow.array([["a", None]] * count, arrow.list_(arrow.string())),
        "text": arrow.array(texts, arrow.string()).dictionary_encode(),
    }
    return arrow.table(columns).replace_schema_metadata({"owner": "somebody"})


def test_parquet_keeps_columns_types_and_metadata(
    tmp_path: Path, run_job: RunJob, texts: list[str], expected: list[str]
) -> None:
    arrow, source = pyarrow(), table(texts)
    arrow.parquet.write_table(source, tmp_path / "in.parquet", row_group_size=130)
    run_job(tmp_path / "out", tmp_path / "in.parquet", shard_rows=170)
    found = [arrow.parquet.read_table(path) for path in shards(tmp_path / "out")]
    assert [one.num_rows for one in found] == [170, 170, 160]
    whole = arrow.concat_tables(found)
    kept = source.set_column(5, "text", source["text"].cast(arrow.string()))
    assert whole.select(source.column_names).set_column(5, "text", whole["text"].cast(arrow.string())).equals(kept)
    assert whole["translation"].to_pylist() == expected
    assert whole["error"].null_count == len(texts)
    assert found[0].schema.metadata[b"owner"] == b"somebody"


def test_text_becomes_json_lines_or_parquet(tmp_path: Path, run_job: RunJob) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    run_job(tmp_path / "json", tmp_path / "in.txt", output_format="jsonl", text_field="t")
    assert [row["t"] for row in read_rows(tmp_path / "json")] == ["one", "two"]
    arrow = pyarrow()
    run_job(tmp_path / "parquet", tmp_path / "in.txt", output_format="parquet", translation_field="de")
    [shard] = shards(tmp_path / "parquet")
    assert arrow.parquet.read_table(shard).to_pylist() == [
        {"text": "one", "de": "eins", "error": None},
        {"text": "two", "de": "zwei", "error": None},
    ]


def test_parquet_becomes_text(tmp_path: Path, run_job: RunJob, texts: list[str], expected: list[str]) -> None:
    pyarrow().parquet.write_table(table(texts), tmp_path / "in.parquet")
    run_job(tmp_path / "out", tmp_path / "in.parquet", output_format="text")
    assert shards(tmp_path / "out")[0].read_text(encoding="utf-8").splitlines() == expected


def test_details_are_what_translate_prints(tmp_path: Path, run_job: RunJob) -> None:
    json_lines(tmp_path / "in.jsonl", [{"text": "twelve"}])
    run_job(tmp_path / "out", tmp_path / "in.jsonl", translate=TranslateOptions(beam_size=2, n_best=2, scores=True))
    [row] = read_rows(tmp_path / "out")
    assert row["details"]["text"] == row["translation"] == "zwölf"
    assert row["details"]["score"] < 0
    assert len(row["details"]["others"]) == 1


def test_rows_name_their_languages(tmp_path: Path, languages_bundle: Path) -> None:
    from kvx import Translator
    from kvx.runtime.scale.batch import run_batch
    from kvx.runtime.scale.folder import OutputFolder
    from kvx.runtime.scale.job import BatchOptions, Job

    translator = Translator.load(languages_bundle, threads=1)
    text = "ein zwei drei"
    rows: list[dict[str, object]] = [{"text": text, "to": to} for to in ("fr", "nl", "xx", 3)]
    json_lines(tmp_path / "in.jsonl", rows)
    options = TranslateOptions(source_language="de").resolved(translator.manifest.defaults)
    own = BatchOptions(to_field="to")
    job = Job.of((str(tmp_path / "in.jsonl"),), own, options, translator.manifest)
    with OutputFolder.open(tmp_path / "out", job.describe()) as folder:
        run_batch(job, translator._model, folder)
    french, dutch, unknown, wrong = read_rows(tmp_path / "out")
    for row in (french, dutch):
        assert (
            row["translation"] == translator.translate_one(text, source_language="de", target_language=row["to"]).text
        )
    assert french["translation"] != dutch["translation"]
    assert "'xx'" in unknown["error"]
    assert "'to' is 3" in wrong["error"]


@pytest.mark.parametrize(
    ("names", "options", "mentions"),
    [
        (["in.jsonl", "in.txt"], {}, "several formats"),
        (["in.odd"], {}, "does not tell its format"),
        (["missing.jsonl"], {}, "cannot be read"),
        (["missing*.jsonl"], {}, "No file matches"),
        (["."], {}, "is a folder"),
        (["-"], {}, "standard input"),
        (["in.jsonl"], {"text_field": "nothing"}, "no field 'nothing'"),
        (["in.jsonl"], {"translation_field": "id"}, "a field 'id' already"),
        (["in.jsonl"], {"output_format": "parquet"}, "`output_format` is parquet"),
        (["in.txt"], {"from_field": "x"}, "lines of text have no fields"),
        (["in.txt"], {"details_field": "x"}, "only a translation"),
        (["in.txt"], {"output_format": "jsonl", "text_field": "error"}, "`text_field`"),
        (["half.jsonl.gz"], {}, "beyond line"),
    ],
)
def test_wrong_input_is_refused_before_a_folder_is_made(
    tmp_path: Path, run_job: RunJob, names: list[str], options: dict[str, Any], mentions: str
) -> None:
    json_lines(tmp_path / "in.jsonl", [{"text": "one", "id": 1}])
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "in.odd").write_text("one\n")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"text":"one"}\n' * 50)[:-12])
    with pytest.raises((InputError, OptionError), match=r"Expected .*\.") as raised:
        run_job(tmp_path / "out", *[name if name == "-" else tmp_path / name for name in names], **options)
    assert mentions in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_in_the_middle_leaves_the_shards_before(tmp_path: Path, run_job: RunJob) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=0) as stream:
        stream.write(b'{"text":"one"}\n' * 6000)
    (tmp_path / "half.jsonl.gz").write_bytes(packed.getvalue()[:75_000])
    with pytest.raises(InputError, match="cannot be read beyond line"):
        run_job(tmp_path / "out", tmp_path / "half.jsonl.gz", shard_rows=500)
    assert len(shards(tmp_path / "out")) >= 1
    assert {len(gzip.decompress(path.read_bytes()).splitlines()) for path in shards(tmp_path / "out")} == {500}


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(OptionError, match=r"pip install 'kvx\[scale\]'"):
        run_job(tmp_path / "out", tmp_path / "in.parquet")
