"""Memory does not grow with the input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PEAK = """
import json, sys
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import PLAIN
from kvx.runtime.scale.batch import run_batch
from kvx.runtime.scale.folder import OutputFolder
from kvx.runtime.scale.job import BatchOptions, Job
from kvx.runtime.system import peak_bytes, reset_peak

bundle, pattern, out = sys.argv[1:]
model = LoadedModel.at(bundle, "cpu", backend="onnx", threads=2, workers=2, spin=False)
options = PLAIN.resolved(model.manifest.defaults)
job = Job.of((pattern,), BatchOptions(shard_rows=500), options, model.manifest)
peaks, rows = [], []
def told(progress):
    if progress.rows % 1000 == 0:
        peaks.append(peak_bytes())
        reset_peak()
with OutputFolder.open(__import__("pathlib").Path(out), job.describe()) as folder:
    run_batch(job, model, folder, told)
print(json.dumps(peaks))
"""
WIDE = 20_000  # characters beside a text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_is_flat(tmp_path: Path, numbers_bundle: Path, texts: list[str], kind: str) -> None:
    """Of rows of 20 kB, 9,000 would take 180 MB."""
    rows = 9000
    padding = "x" * WIDE
    if kind == "jsonl":
        with (tmp_path / "in.jsonl").open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"text": texts[number % len(texts)], "wide": padding}) + "\n")
    else:
        arrow = pytest.importorskip("pyarrow", reason="the extra scale is not installed")
        import pyarrow.parquet

        table = arrow.table({"text": texts, "wide": [f"{number}{padding}" for number in range(len(texts))]})
        with pyarrow.parquet.ParquetWriter(tmp_path / "in.parquet", table.schema, use_dictionary=False) as writer:
            for _ in range(rows // len(texts)):
                writer.write_table(table)
    line = [sys.executable, "-c", PEAK, numbers_bundle, tmp_path / f"in.{kind}", tmp_path / "out"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=True, timeout=120)
    peaks = json.loads(done.stdout)
    assert len(peaks) == rows // 1000
    assert max(peaks[-3:]) < max(peaks[2:5]) + 40 * 2**20, [peak >> 20 for peak in peaks]
