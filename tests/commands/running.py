"""The command in a process of its own, in this one, or as a conversation."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from typer.testing import CliRunner

from kvx.cli import main

KVX = [sys.executable, "-m", "kvx"]
SCRIPT = Path(sys.executable).with_name("kvx")
NUMBERS = Path(__file__).resolve().parents[2] / "artifacts" / "numbers-checkpoint" / "model.pt"
PATIENCE = 120  # seconds: an export takes half of that where cores are busy
NOT_OF_USERS = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in NOT_OF_USERS}


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def outcome(code: int, out: bytes, err: bytes) -> Outcome:
    """What a command did."""
    return without_traceback(Outcome(code, out.decode(), err.decode()))


def without_traceback(found: Outcome) -> Outcome:
    """No traceback may ever reach a user who has not asked for it."""
    assert "Traceback" not in found.err, found.err[-300:]
    assert "Traceback" not in found.out
    return found


def invoke(*arguments: str | Path) -> Outcome:
    """The command in this process, where torch is already loaded."""
    return without_traceback(invoke_as_it_is(*arguments))


def invoke_as_it_is(*arguments: str | Path) -> Outcome:
    """As invoke, where there may be a traceback."""
    with CliRunner().isolation() as (out, err, _):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        sys.stdout.flush()
        sys.stderr.flush()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, out.getvalue().decode(), err.getvalue().decode())


def refused(found: Outcome, *mentions: str) -> None:
    """Exit code 2, nothing on stdout, and one sentence of our own."""
    assert (found.code, found.out) == (2, "")
    lines = [line for line in found.err.splitlines() if line.startswith("kvx: error: ")]
    assert len(lines) == 1, found.err
    assert ". Expected " in lines[0]
    for mention in mentions:
        assert mention in lines[0]


def refused_usage(found: Outcome, *mentions: str) -> None:
    assert (found.code, found.out) == (2, "")
    for mention in ("Usage: kvx", *mentions):
        assert mention in found.err


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@dataclass(slots=True)
class Conversation:
    """A running command: what it says arrives as it says it."""

    process: subprocess.Popen[bytes]

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin
        return self.process.stdin

    def read(self, seconds: float) -> bytes:
        """What there is to read within so many seconds, or nothing."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 2**16) if ready else b""

    def end(self, before: bytes = b"") -> Outcome:
        out, err = self.process.communicate(timeout=PATIENCE)
        return outcome(self.process.returncode, before + out, err)


Converse = Callable[..., Conversation]
