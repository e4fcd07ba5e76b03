"""Lines of text in and out: line n in is line n out."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import itertools
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from kvx.runtime.errors import InputError, OptionError, remedy_of

LONGEST_LINE = 2**20  # bytes
STANDARD = "-"  # stands for standard input or output
NO_NEW_FILES = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder
NOT_REPLACED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)  # mounted, or another's in a sticky folder

_log = logging.getLogger("kvx")


def read_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a UTF-8 stream: they end at a line feed only, and lose a carriage return before it. A byte order
    mark at the beginning of the stream is no part of its first line.

    Raises InputError for bytes that are not UTF-8 and for a line beyond LONGEST_LINE.
    """
    number = 0
    while raw := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise InputError(
                f"The line has more than {LONGEST_LINE} bytes",
                expected="lines of text",
                remedy="Check that the input is a text file with a sentence a line.",
                line=number,
            )
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw:
                return
        yield _decoded(raw.removesuffix(b"\n").removesuffix(b"\r"), number)


def read_text(stream: BinaryIO) -> str:
    """The whole of a UTF-8 stream as it is, but for a byte order mark at its beginning. Raises InputError for bytes
    that are not UTF-8.
    """
    return _decoded(stream.read().removeprefix(codecs.BOM_UTF8), None)


def _decoded(raw: bytes, line: int | None) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"Byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8",
            expected="UTF-8 text",
            remedy="Convert the input first, for example with iconv.",
            line=line,
        ) from None


def open_lines(path: Path) -> BinaryIO:
    """The file at `path`, or standard input for "-", for read_lines. Raises InputError where it cannot be read."""
    try:
        return path.open("rb") if str(path) != STANDARD else open_standard_input()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})",
            expected="a text file",
            remedy=remedy_of(error, "Check the path."),
        ) from None


class _StandardInput(io.BufferedReader):
    """Standard input, as a stream of its own, which never closes: closing would wait for a thread that reads."""

    def close(self) -> None:
        """Nothing: the descriptor is the process's own."""


def open_standard_input() -> BinaryIO:
    """Standard input, in which a thread may still wait when the program ends."""
    return _StandardInput(io.FileIO(sys.stdin.fileno(), closefd=False))


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name only when it is complete; a device or pipe is written directly. A file
    that cannot be replaced, but written, gets the complete content in its place, which is logged as a warning.

    Raises InputError where it cannot be made.
    """
    with complete_binary_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        yield text


@contextlib.contextmanager
def complete_binary_file(path: Path) -> Iterator[BinaryIO]:
    """As complete_file, for bytes."""
    if _is_special(path):
        with _opened(path) as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # a link stays one
    partial, file = _partial(path)
    try:
        with file:
            if partial.parent == path.parent:
                _keep_access(path, file)
            yield file
        _put(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether this is no regular file, nor a place for one. Raises InputError."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:  # a loop of links, a name that cannot be one
        raise _unwritable(path, error) from None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise _unwritable(path, error) from None


def _partial(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside this one. Where the folder takes none but the file itself can be written, one elsewhere."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        return beside, beside.open("xb")
    except OSError as error:
        if error.errno not in NO_NEW_FILES or not _is_writable(path):
            raise _unwritable(path, error) from None
    descriptor, name = tempfile.mkstemp(prefix="kvx.", suffix=".partial")
    return Path(name), os.fdopen(descriptor, "wb")


def _is_writable(path: Path) -> bool:
    try:
        with path.open("r+b"):
            return True
    except OSError:
        return False


def _put(partial: Path, path: Path) -> None:
    """Lets a complete file take the place of another, or its content where the other must stay. Raises OSError."""
    if partial.parent == path.parent:
        try:
            partial.replace(path)
        except OSError as error:
            if error.errno not in NOT_REPLACED or not _is_writable(path):
                raise
        else:
            return
    _log.warning("%s cannot be replaced, so it is written in place. It is incomplete if that is cut short.", path)
    with partial.open("rb") as complete, path.open("r+b") as file:
        shutil.copyfileobj(complete, file)
        file.truncate()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written ({error.strerror})",
        expected="a file name in a folder that exists",
        remedy="Check the path.",
    )


def _keep_access(path: Path, file: BinaryIO) -> None:
    """Gives a file the mode of the one that it will replace, if there is one, and its owner where that is allowed."""
    if path.exists():
        was = path.stat()
        Path(file.name).chmod(stat.S_IMODE(was.st_mode))
        with contextlib.suppress(OSError, AttributeError):  # Windows has no owners
            os.fchown(file.fileno(), was.st_uid, was.st_gid)


def read_file(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """The lines of a file, or the first `limit` of them. Raises InputError, and OptionError for a limit below 1."""
    if limit is not None and limit < 1:
        raise OptionError(
            f"`limit` is {limit}", expected="1 or more", remedy="Correct it or leave it out.", option="limit"
        )
    with open_lines(path) as stream:
        return tuple(itertools.islice(read_lines(stream), limit))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A file of these lines, which appears when it is complete. Raises InputError where it cannot be made."""
    with complete_file(path) as out:
        out.writelines(f"{one_line(line)}\n" for line in lines)


@contextlib.contextmanager
def output_file(path: Path | None) -> Iterator[TextIO]:
    """A file that appears when it is complete, or for "-" and None standard output, as UTF-8 with line feeds."""
    if path is not None and str(path) != STANDARD:
        with complete_file(path) as file:
            yield file
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]  # a TextIOWrapper
        yield sys.stdout
        sys.stdout.flush()


def one_field(text: str) -> str:
    """A text in a line of fields with tabs between them."""
    return one_line(text).replace("\t", " ")


def one_line(text: str) -> str:
    """A text in is a line out, also where a tokenizer has pieces that break lines."""
    return text.replace("\n", " ").replace("\r", " ")
