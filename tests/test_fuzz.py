"""Hostile input of every kind ends in a result or in an error of kvx, soon, and in the memory that it may take."""

from __future__ import annotations

import collections
import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvx.tests.fuzz import KINDS

FEW, MANY = 40, 400
PATIENCE = 60.0  # seconds for one case on a slow, busy machine
OF_ONNX_RUNTIME = "gcc-toolset-14"  # its own C++ has an assertion that fails in about one altered graph of a thousand
NEEDS = {"graphs": "onnx", "checkpoints": "torch"}


class Campaign:
    """Cases of one kind, in a process that is started anew wherever a case ends it."""

    def __init__(self, kind: str, bundle: Path) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._kind = kind
        self._bundle = bundle

    def run(self, first: int, last: int) -> None:
        """Cases first … last − 1."""
        while first < last:
            first = self._run_process(first, last - first) + 1

    def _run_process(self, first: int, count: int) -> int:
        """→ the last case that was begun."""
        command = [sys.executable, "-m", "kvx.tests.fuzz", self._kind, str(first), str(count), str(self._bundle)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        number = first
        with (
            tempfile.TemporaryFile("w+", errors="replace") as told,  # a pipe that nobody reads would stop the process
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, env=environment) as process,
        ):
            assert process.stdout
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(PATIENCE):
                        process.kill()
                        self.faults.append(f"case {number} takes more than {PATIENCE:g} s")
                        return number
                    line = process.stdout.readline()
                    if not line:
                        break
                    number, *outcome = json.loads(line)
                    if outcome:
                        self._record(number, outcome[0])
            if process.wait() != 0:
                told.seek(0)
                last_words = told.read()[-500:]
                if OF_ONNX_RUNTIME in last_words and self._kind in ("graphs", "bytes"):
                    self.outcomes["aborted"] += 1
                    return number
                self.faults.append(f"case {number} ended the process: {process.returncode} {last_words}")
        return number

    def _record(self, number: int, outcome: str) -> None:
        if "\n" in outcome:
            self.faults.append(f"case {number}:\n{outcome}")
        else:
            self.outcomes[outcome] += 1


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.proof)])
@pytest.mark.parametrize("kind", KINDS)
def test_only_errors_of_ours_come_out(kind: str, cases: int, tiny_bundle: Path, shortlist_bundle: Path) -> None:
    pytest.importorskip(NEEDS.get(kind, "kvx"))
    campaign = Campaign(kind, shortlist_bundle if kind == "shortlists" else tiny_bundle)
    campaign.run(0, cases)
    assert not campaign.faults, "\n".join(campaign.faults)
    assert len(campaign.outcomes) >= 2, campaign.outcomes
    assert campaign.outcomes["aborted"] <= cases / 200
