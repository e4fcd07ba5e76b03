"""What commands say while they run, always on stderr, and what they need to be installed."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.text.lines import STANDARD

if TYPE_CHECKING:
    from kvx.exporter.progress import Progress as Listener

STDOUT = 1
DIFFERENCE, BAD_INPUT, INTERNAL_ERROR, INTERRUPTED = 1, 2, 70, 130  # exit codes; 70 is EX_SOFTWARE of sysexits.h


def say(text: str) -> None:
    """A line of kvx's own on stderr."""
    tell(f"kvx: {text}")


def tell(line: str) -> None:
    """A line on stderr. Where it cannot be written it is lost, and the command goes on."""
    try:
        typer.echo(line, err=True)
    except OSError:
        _drop(sys.stderr)


class _Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def saying_warnings() -> Iterator[None]:
    """What the library warns of becomes lines of kvx's own."""
    log, handler = logging.getLogger("kvx"), _Saying(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Says on stderr what is being waited for, where that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def reporting() -> Iterator[Listener]:
    """What an export says: notes as lines on stderr, the phase that runs as a spinner where that is a terminal."""
    from rich.console import Console

    from kvx.exporter.progress import Progress as Listener

    with Console(stderr=True).status("starting") as status:

        class Spinner(Listener):
            def phase(self, text: str) -> None:
                status.update(text)

            def note(self, text: str) -> None:
                say(text)

        yield Spinner()


@contextlib.contextmanager
def counting(text: str, total: int | None, *, to_terminal: bool) -> Iterator[Callable[[int], None]]:
    """Takes how much is done and shows it as a line on stderr, where that is a terminal and results do not go
    `to_terminal` too.
    """
    if sys.stderr is None or not sys.stderr.isatty() or to_terminal:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn(text), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def require(*modules: str, extra: str) -> None:
    """Raises OptionError where a module of an extra is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"This command needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            expected=f"the packages of the extra {extra}",
            remedy=f"Install them with: pip install 'kvx[{extra}]'",
        )


class ClosedOutput(io.TextIOBase):
    """Stands for a standard output that was closed before the command began: every write fails."""

    def write(self, text: str, /) -> int:
        """Raises OSError."""
        raise OSError(errno.EBADF, "Standard output is closed")

    def reconfigure(self, **_: object) -> None:
        """Nothing: there is nothing to write."""

    def fileno(self) -> int:
        """Its number, which no other file has."""
        return STDOUT


def hold_closed_streams() -> None:
    """Keeps the numbers of standard streams that are closed from the files that are opened later: libraries print to
    them. What is written to a closed standard output fails instead of getting lost.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None and (opened := os.open(os.devnull, os.O_RDWR)) != number:
            os.dup2(opened, number)
            os.close(opened)
    if sys.stdout is None:
        sys.stdout = ClosedOutput()


def check_output(output: Path | None) -> None:
    """Raises OptionError where results would go to a standard output that is closed."""
    if (output is None or str(output) == STANDARD) and (sys.stdout is None or isinstance(sys.stdout, ClosedOutput)):
        raise OptionError(
            "Standard output is closed", expected="a place to write to", remedy="Use `output`.", option="output"
        )


def check_places(*paths: Path | None) -> None:
    """Raises InputError, before any work, for a file of results that no folder could hold."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(
                f"{path} cannot be written",
                expected="a file name in a folder that exists",
                remedy="Check the path.",
            )


def drop_output() -> None:
    """Sends what is still buffered for a standard output that takes no more to nowhere."""
    _drop(sys.stdout)


def _drop(stream: TextIO | None) -> None:
    if stream is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
