"""Shards as plain text and JSON lines, and what writes each format."""

from __future__ import annotations

import json
from typing import BinaryIO, Protocol

from kvx.runtime.scale.columns import Columns, Written
from kvx.runtime.scale.inputs import Format
from kvx.runtime.scale.lines import JsonObject, LineReader
from kvx.runtime.scale.parquet import ParquetReader, ParquetWriter
from kvx.runtime.scale.rows import Fields, Reader, Row
from kvx.runtime.text.lines import one_line


class Writer(Protocol):
    """Writes the rows of one shard to a stream, which stays open."""

    def write(self, row: Row, written: Written) -> None:
        """Takes the next row."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class TextWriter:
    """A line for each row: its translation, nothing where there is none."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, row: Row, written: Written) -> None:
        """See Writer."""
        self._stream.write(one_line(written.translation or "").encode() + b"\n")

    def close(self) -> None:
        """See Writer."""


class JsonWriter:
    """An object for each row: its own fields as they stand in its line, and those of the output after them."""

    def __init__(self, stream: BinaryIO, columns: Columns, text_field: str) -> None:
        self._stream = stream
        self._columns = columns
        self._text_field = text_field

    def write(self, row: Row, written: Written) -> None:
        """See Writer."""
        own = ", ".join(
            f"{json.dumps(name, ensure_ascii=False)}: {value}"
            for name, value in zip(self._columns.names, self._values(written), strict=True)
        )
        kept = self._kept(row)
        self._stream.write(f"{{{kept}{', ' if kept else ''}{own}}}\n".encode())

    def close(self) -> None:
        """See Writer."""

    def _values(self, written: Written) -> list[str]:
        texts = [json.dumps(value, ensure_ascii=False) for value in (written.translation, written.error)]
        return texts if self._columns.details is None else [*texts, written.details or "null"]

    def _kept(self, row: Row) -> str:
        """The fields of a row, without the braces around them."""
        kept = row.kept
        if isinstance(kept, str):
            return json.dumps({self._text_field: kept}, ensure_ascii=False)[1:-1]
        if not isinstance(kept, JsonObject):
            return ""
        if kept.names.isdisjoint(self._columns.names):
            return kept.text.strip()[1:-1].strip()
        fields = json.loads(kept.text)
        return json.dumps({name: one for name, one in fields.items() if name not in self._columns.names})[1:-1]


def reader_for(kind: Format, fields: Fields, shard_rows: int) -> Reader:
    """What reads a format. Raises OptionError where a package is not installed."""
    if kind == "parquet":
        return ParquetReader(fields, shard_rows)
    return LineReader(fields, shard_rows, as_json=kind == "jsonl")


def writer_for(kind: Format, stream: BinaryIO, columns: Columns, text_field: str) -> Writer:
    """What writes a format."""
    if kind == "parquet":
        return ParquetWriter(stream, columns, text_field)
    return JsonWriter(stream, columns, text_field) if kind == "jsonl" else TextWriter(stream)
