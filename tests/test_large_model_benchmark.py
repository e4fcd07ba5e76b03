"""The benchmark of a large model, at a tenth of the size."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from kvx.benchmarks.large_model import main

LARGEST = {"fp32": 3072, "int8": 2048}  # MiB at the peak of an export


@pytest.mark.proof
@pytest.mark.parametrize("precision", LARGEST)
def test_it_exports_loads_and_translates_within_bounds(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--work", str(tmp_path), "--scale", "0.1", "--precisions", precision])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [precision, "export with proof"],
        [precision, "import and load"],
        [precision, "a sentence of 20 tokens"],
    ]
    assert 0 < float(rows[0][3].replace(",", "")) < LARGEST[precision]
