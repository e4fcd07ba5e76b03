"""Plain text and JSON lines, compressed or not."""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Collection, Generator, Iterator, KeysView
from dataclasses import dataclass
from typing import BinaryIO

from kvx.runtime.engine.translating import Asked
from kvx.runtime.errors import InputError
from kvx.runtime.scale.compression import COMPRESSIONS, DAMAGED
from kvx.runtime.scale.inputs import InputFile
from kvx.runtime.scale.rows import Fields, Row, missing
from kvx.runtime.text.lines import LONGEST_LINE

LONGEST_OBJECT = 16 * 2**20  # bytes of a JSON line
CHECKED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it stands in a file, without its end; None where it is longer than it may be."""

    place: int
    raw: bytes | None
    position: int


class LineReader:
    """Reads files of which each line is a row. Blank JSON lines are no rows."""

    def __init__(self, fields: Fields, shard_rows: int, *, as_json: bool) -> None:
        self._fields = fields
        self._shard_rows = shard_rows
        self._as_json = as_json
        self._longest = LONGEST_OBJECT if as_json else LONGEST_LINE

    def check(self, file: InputFile, taken: Collection[str]) -> None:
        """See Reader. A file has a field if one of its first rows has it."""
        if not self._as_json:
            return
        objects = [row for line in itertools.islice(self._lines(file), CHECKED_ROWS) if (row := _object(line.raw))]
        for name in self._fields.names:
            if objects and not any(name in row for row in objects):
                raise in_file(file, missing(name, objects[0]))
        for name in taken:
            if any(name in row for row in objects):
                raise in_file(file, occupied(name))

    def rows(self, file: InputFile, skipped: Collection[int]) -> Generator[Row, None, int]:
        """See Reader."""
        count = 0
        for count, line in enumerate(self._lines(file), 1):
            if (count - 1) // self._shard_rows not in skipped:
                yield self._row(file, count - 1, line)
        return count

    def pieces(self, file: InputFile, skipped: Collection[int]) -> Generator[tuple[int, bytes], None, int]:
        """See Reader. A piece has a number before each line, as blank ones are left out and long ones are cut."""
        count = 0
        numbered = enumerate(self._lines(file))
        for shard, lines in itertools.groupby(numbered, lambda one: one[0] // self._shard_rows):
            piece = io.BytesIO()
            for index, line in lines:
                count = index + 1
                if shard not in skipped:
                    piece.write(b"%d %b\n" % (line.place, b"\0" if line.raw is None else line.raw))
            if shard not in skipped:
                yield shard, piece.getvalue()
        return count

    def rows_of(self, file: InputFile, shard: int, piece: bytes) -> Generator[Row, None, int]:
        """See Reader."""
        count = 0
        for count, numbered in enumerate(io.BytesIO(piece), 1):
            place, _, raw = numbered.removesuffix(b"\n").partition(b" ")
            line = Line(int(place), None if raw == b"\0" else raw, 0)
            yield self._row(file, shard * self._shard_rows + count - 1, line)
        return count

    def _lines(self, file: InputFile) -> Iterator[Line]:
        place = 0
        try:
            with file.path.open("rb") as raw, COMPRESSIONS[file.compression].reading(raw) as stream:
                for place, line in enumerate(_raw_lines(stream, self._longest), 1):
                    if not (self._as_json and line is not None and (not line or line.isspace())):
                        yield Line(place, line, raw.tell() if not raw.closed else file.bytes)
        except DAMAGED as error:
            raise InputError(
                f"{file.path} cannot be read beyond line {place} ({getattr(error, 'strerror', None) or error})",
                expected="a whole file",
                remedy="Copy or compress it again.",
                option="input",
            ) from None

    def _row(self, file: InputFile, index: int, line: Line) -> Row:
        asked, kept = self._asked(line)
        return Row(file, index, line.place, asked, kept, line.position)

    def _asked(self, line: Line) -> tuple[Asked | InputError, object]:
        """The text of a line, and what is kept of it."""
        if line.raw is None:
            return _wrong(f"The line has more than {self._longest} bytes", "shorter lines", "Check the file."), None
        try:
            text = line.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"Byte {error.start + 1} (0x{line.raw[error.start]:02x}) is not UTF-8"
            return _wrong(got, "UTF-8 text", "Convert the file first, for example with iconv."), None
        return self._asked_in_json(text) if self._as_json else (Asked(text), text)

    def _asked_in_json(self, text: str) -> tuple[Asked | InputError, object]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            return _wrong(f"The line is not JSON ({error})", "a JSON object", "Correct the line."), None
        if not isinstance(row, dict):
            return _wrong(f"The line is the JSON value {text!r:.60}", "a JSON object", "Correct the line."), None
        return self._fields.asked(row), JsonObject(text, row.keys())


@dataclass(frozen=True, slots=True)
class JsonObject:
    """An object as it stands in its line, with the names of its fields."""

    text: str
    names: KeysView[str]


def occupied(name: str) -> InputError:
    """The error of a file that has a field which the output would write."""
    return InputError(
        f"There is a field {name!r} already, and the output would have another of this name",
        expected="names that the rows do not have",
        remedy="Choose another name with `translation_field`, `error_field` or `details_field`.",
    )


def in_file(file: InputFile, error: InputError) -> InputError:
    """The error with the name of the file."""
    return InputError(f"{file.path}: {error.got}", expected=error.expected, remedy=error.remedy, option=error.option)


def _wrong(got: str, expected: str, remedy: str) -> InputError:
    return InputError(got, expected=expected, remedy=remedy)


def _object(raw: bytes | None) -> dict[str, object] | None:
    try:
        found = json.loads(raw or b"")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _raw_lines(stream: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """The lines of a stream without their ends and a byte order mark; None for one that is too long."""
    first = True
    while raw := stream.readline(longest + 1):
        if first:
            raw, first = raw.removeprefix(codecs.BOM_UTF8), False
            if not raw:
                return
        if len(raw) <= longest:
            yield raw.removesuffix(b"\n").removesuffix(b"\r")
            continue
        while not raw.endswith(b"\n") and (more := stream.readline(longest)):
            raw = more
        yield None
