"""The benchmark of what Python costs, tried once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kvx
from kvx.benchmarks import overhead


def test_a_step_of_no_cost_takes_microseconds() -> None:
    measure = overhead.steps_of_no_cost()
    assert 1 < measure() < 100_000


def test_a_checkout_is_measured_beside_itself(numbers_bundle: Path) -> None:
    root = Path(kvx.__file__).parent
    script = str(root / "benchmarks" / "overhead.py")
    sizes = ("--rounds", "1", "--repeat", "1", "--bundle", str(numbers_bundle), "--text", "one")
    done = subprocess.run([sys.executable, script, *sizes], capture_output=True, text=True, check=True)
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert names == [overhead.STEP, overhead.ALONE, overhead.BEAMS]
