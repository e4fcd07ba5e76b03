"""What works, and what is said, where neither onnxruntime nor onnxruntime-gpu is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kvx

WITHOUT = "import sys; sys.modules['onnxruntime'] = None\n"  # Python then finds no such module


def without_onnxruntime(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", WITHOUT + script, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def test_loading_a_bundle_says_which_command_brings_it(numbers_bundle: Path) -> None:
    script = (
        "from kvx import DeviceError, Translator\n"
        "try: Translator.load(sys.argv[1])\n"
        "except DeviceError as error: print(error)"
    )
    done = without_onnxruntime(script, numbers_bundle)
    assert done.stderr == ""
    for part in ("onnxruntime", "not installed", "pip install", "'kvx[cpu]'", "'kvx[gpu]'"):
        assert part in done.stdout


def test_the_command_says_the_same_and_ends_with_the_code_of_bad_input(numbers_bundle: Path) -> None:
    command = ("translate", "--model", numbers_bundle, "twelve")
    done = without_onnxruntime("from kvx.cli import main; main()", *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'kvx[cpu]'" in done.stderr


def test_the_version_and_the_help_need_none() -> None:
    version = without_onnxruntime("from kvx.cli import main; main()", "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"kvx {kvx.__version__}\n", "")
    shown = without_onnxruntime("from kvx.cli import main; main()", "translate", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--beam-size" in shown.stdout
