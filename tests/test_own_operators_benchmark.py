"""The benchmark of kvx's own operators, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvx.benchmarks.own_operators import main
from kvx.runtime import kernels


@pytest.mark.skipif(kernels.library() is None, reason="kvx was installed without its own operators")
def test_it_compares_steps_with_and_without(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_bundle), "--rows", "1,3", "--source", "4", "--past", "2,3", "--repeat", "3"]
    monkeypatch.setattr(sys, "argv", ["own_operators.py", *arguments])
    main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    measured = [[cell.strip() for cell in row[:3]] for row in rows]
    assert measured == [["tiny", rows, past] for rows in "13" for past in "23"]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])
