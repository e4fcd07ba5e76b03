"""A signal ends a command quietly, from its first moment on, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvx.tests.commands.running import ENVIRONMENT, KVX, PATIENCE, SCRIPT, Converse, names_in

FRESH = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
INTERRUPTED_WHILE_IT_LOADS = """
import importlib.abc, os, signal, sys

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize(
    "module", ["kvx.runtime.arrays", "numpy", "kvx.cli", "typer", "kvx.commands.verify", "onnxruntime", "sentencepiece"]
)
@pytest.mark.parametrize("command", [KVX, [sys.executable, str(SCRIPT)]], ids=["module", "script"])
def test_ctrl_c_while_modules_load_is_quiet(
    command: list[str], module: str, numbers_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FRESH + INTERRUPTED_WHILE_IT_LOADS.format(module=module))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "translate", "--model", numbers_bundle, "one"],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONPATH": path},
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_program_that_imports_kvx_keeps_its_own_ctrl_c() -> None:
    script = f"{FRESH}; import kvx; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"True\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_no_half_translation(
    converse: Converse, numbers_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "out").write_text("before")
    command = converse("translate", "--model", str(numbers_bundle), "--device", "cpu", "-o", "out")
    command.stdin.write(b"one\n")
    command.stdin.flush()
    deadline = time.monotonic() + PATIENCE
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    command.process.send_signal(number)
    found = command.end()
    assert (found.code, found.out, found.err) == (code, "", "")
    assert names_in(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "before"


def test_a_command_that_was_started_to_outlive_its_terminal_does(numbers_bundle: Path) -> None:
    line = ["nohup", *KVX, "translate", "--model", str(numbers_bundle), "--device", "cpu"]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdin
        assert process.stdout
        for text, answer in ((b"one\n", b"eins\n"), (b"twelve\n", "zwölf\n".encode())):
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline() == answer
            process.send_signal(signal.SIGHUP)
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
