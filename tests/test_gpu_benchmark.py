"""The benchmark for GPUs, tried on a CPU: all of it but the kernels and the capture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvx.benchmarks.gpu import main


@pytest.mark.proof
@pytest.mark.usefixtures("operators_listed_once")
def test_it_proves_measures_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    sizes = ["--rows", "2", "--steps", "7", "--repeat", "1", "--precisions", "fp16", "bf16"]
    assert main(["--device", "cpu", "--model", "tiny", *sizes, "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    [proof] = found["proofs"]
    assert proof["passed"]
    assert proof["tokens"] > 0
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["kvx", "eager, cache", "eager, no cache"]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert "bf16 on a CPU" in found["left_out"][0]
    assert all(name in printed for name in names)


@pytest.mark.proof
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    sizes = ["--rows", "2", "--steps", "3", "--repeat", "1", "--precisions", "fp32", "--seconds", "0"]
    assert main(["--device", "cpu", "--model", "tiny", *sizes, "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["rows"] == []
    assert "eager, cache, fp32, 2 rows, for want of time" in found["left_out"]
