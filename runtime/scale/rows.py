"""Rows of files: what is to be translated, and what is kept beside it."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Protocol

from kvx.runtime.engine.translating import Asked
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.scale.inputs import InputFile


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file. `index` counts the rows of the file from 0, `place` what an editor counts from 1. `asked` is
    its text, or the error of a row without one; `kept` is what its format writes back, None where it cannot be read.
    `position` is how far its file has been read, in bytes.
    """

    file: InputFile
    index: int
    place: int
    asked: Asked | InputError
    kept: object
    position: int

    def told(self, error: InputError) -> str:
        """An error with the file and the line that it is about."""
        return f"{self.file.path}, {self.file.unit} {self.place}: {error.at(None)}"


@dataclass(frozen=True, slots=True)
class EndOfFile:
    """Comes after the last row of a file, which has this many."""

    file: InputFile
    rows: int


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a row that are read: its text, and the languages where rows have their own."""

    text: str
    source_language: str | None = None
    target_language: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.text, self.source_language, self.target_language) if name is not None)

    def opened(self, options: TranslateOptions) -> TranslateOptions:
        """The options, in which a language that rows have themselves need not be named."""
        if self.source_language is not None and options.source_language is None:
            options = options.changed(source_language=())
        if self.target_language is not None and options.target_language is None:
            options = options.changed(target_language=())
        return options

    def asked(self, row: dict[str, object]) -> Asked | InputError:
        """The text of a row with its languages, or what is wrong with it."""
        if self.text not in row:
            return missing(self.text, row)
        text = row[self.text]
        if not isinstance(text, str):
            return InputError(
                f"The field {self.text!r} is {_shown(text)}", expected="a text", remedy="Correct the row."
            )
        languages = [None if name is None else row.get(name) for name in (self.source_language, self.target_language)]
        for name, code in zip((self.source_language, self.target_language), languages, strict=True):
            if not isinstance(code, str | None):
                return InputError(
                    f"The field {name!r} is {_shown(code)}",
                    expected="the code of a language, or null for the one of all rows",
                    remedy="Correct the row.",
                )
        source, target = languages
        return Asked(text, source or None, target or None)  # type: ignore[arg-type]  # they were checked


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.60}"


def missing(name: str, row: Collection[str]) -> InputError:
    """The error of a row or file without a field."""
    names = ", ".join(list(row)[:10]) or "none"
    return InputError(
        f"There is no field {name!r}", expected=f"one of its fields: {names}", remedy="Name the field of the texts."
    )


class Reader(Protocol):
    """Reads the rows of one format."""

    def check(self, file: InputFile, taken: Collection[str]) -> None:
        """Raises InputError for a file that lacks the fields, or has one of those `taken` by the output."""
        ...

    def rows(self, file: InputFile, skipped: Collection[int]) -> Generator[Row, None, int]:
        """The rows of a file, but for those of the shards that are skipped → how many it has. Raises InputError."""
        ...

    def pieces(self, file: InputFile, skipped: Collection[int]) -> Generator[tuple[int, bytes], None, int]:
        """The number and content of every shard that is not skipped, for `rows_of` → how many rows the file has."""
        ...

    def rows_of(self, file: InputFile, shard: int, piece: bytes) -> Generator[Row, None, int]:
        """The rows of one shard."""
        ...
