"""Commands that are run in folders and on bundles of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx.tests.commands.running import ENVIRONMENT, KVX, PATIENCE, Conversation, Converse, Outcome, Run, outcome


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command in an empty folder."""

    def run(*arguments: str | Path, stdin: bytes = b"", command: list[str] | None = None) -> Outcome:
        line = [*(command or KVX), *map(str, arguments)]
        done = subprocess.run(
            line, input=stdin, capture_output=True, cwd=tmp_path, timeout=PATIENCE, check=False, env=ENVIRONMENT
        )
        return outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def translate(run: Run, numbers_bundle: Path) -> Run:
    def translate(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
        return run("translate", "--model", numbers_bundle, "--device", "cpu", *arguments, stdin=stdin)

    return translate


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


@pytest.fixture
def converse(numbers_bundle: Path, tmp_path: Path) -> Iterator[Converse]:
    """Starts commands whose pipes stay open. They get Ctrl-C even where this process ignores it."""
    started: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*arguments: str, stdin: int = subprocess.PIPE) -> Conversation:
        line = [*KVX, *(arguments or ("translate", "--model", str(numbers_bundle), "--device", "cpu"))]
        started.append(
            subprocess.Popen(
                line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT
            )
        )
        return Conversation(started[-1])

    try:
        yield start
    finally:
        signal.signal(signal.SIGINT, previous)
        for process in started:
            process.kill()
            process.wait()
