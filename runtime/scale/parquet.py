"""Parquet, read and written in batches of rows whose other columns are never touched. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any, BinaryIO

from kvx.runtime.errors import InputError
from kvx.runtime.scale.columns import Columns, Written
from kvx.runtime.scale.inputs import InputFile
from kvx.runtime.scale.lines import in_file, occupied
from kvx.runtime.scale.packages import arrow, package
from kvx.runtime.scale.rows import Fields, Row, missing

BATCH_ROWS = 1024
NEEDS = "Parquet files"


class ParquetReader:
    """Reads Parquet files, a batch at a time."""

    def __init__(self, fields: Fields, shard_rows: int) -> None:
        self._fields = fields
        self._shard_rows = shard_rows
        self._arrow = arrow(NEEDS)

    def check(self, file: InputFile, taken: Collection[str]) -> None:
        """See Reader."""
        with self._open(file) as opened:
            schema = opened.schema_arrow
        for name in self._fields.names:
            if name not in schema.names:
                raise in_file(file, missing(name, schema.names))
            kind = schema.field(name).type
            if not self._holds_texts(kind):
                raise in_file(
                    file,
                    InputError(
                        f"The field {name!r} is of type {kind}",
                        expected="texts",
                        remedy="Name another field, or convert it.",
                    ),
                )
        for name in taken:
            if name in schema.names:
                raise in_file(file, occupied(name))

    def rows(self, file: InputFile, skipped: Collection[int]) -> Generator[Row, None, int]:
        """See Reader."""
        total = self._count(file)
        for first, batch in self._batches(file, skipped):
            wanted = (one for one in range(batch.num_rows) if (first + one) // self._shard_rows not in skipped)
            yield from self._rows(file, first, batch, wanted, total)
        return total

    def pieces(self, file: InputFile, skipped: Collection[int]) -> Generator[tuple[int, bytes], None, int]:
        """See Reader. A piece is an Arrow stream."""
        size, shard, parts = self._shard_rows, 0, list[Any]()
        for first, batch in self._batches(file, skipped):
            start = 0
            while start < batch.num_rows:
                now = (first + start) // size
                if now != shard and parts:
                    yield shard, self._packed(parts)
                    parts = []
                shard = now
                end = min(batch.num_rows, (shard + 1) * size - first)
                if shard not in skipped:
                    parts.append(batch.slice(start, end - start))
                start = end
        if parts:
            yield shard, self._packed(parts)
        return self._count(file)

    def rows_of(self, file: InputFile, shard: int, piece: bytes) -> Generator[Row, None, int]:
        """See Reader."""
        first = shard * self._shard_rows
        with self._arrow.ipc.open_stream(piece) as stream:
            for batch in stream:
                yield from self._rows(file, first, batch, range(batch.num_rows), 0)
                first += batch.num_rows
        return first - shard * self._shard_rows

    def _packed(self, batches: list[Any]) -> bytes:
        sink = self._arrow.BufferOutputStream()
        with self._arrow.ipc.new_stream(sink, batches[0].schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        packed: bytes = sink.getvalue().to_pybytes()
        return packed

    def _count(self, file: InputFile) -> int:
        with self._open(file) as opened:
            rows: int = opened.metadata.num_rows
            return rows

    def _batches(self, file: InputFile, skipped: Collection[int]) -> Iterator[tuple[int, Any]]:
        """The batches of the groups in which a shard is not skipped, each with the index of its first row."""
        first, size = 0, self._shard_rows
        with self._open(file) as opened:
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                shards = range(first // size, (first + rows - 1) // size + 1)
                if all(shard in skipped for shard in shards):
                    first += rows
                    continue
                try:
                    for batch in opened.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                        yield first, batch
                        first += batch.num_rows
                except (OSError, self._arrow.ArrowException) as error:
                    raise self._unreadable(file, error) from None

    def _rows(
        self,
        file: InputFile,
        first: int,
        batch: Any,  # noqa: ANN401
        wanted: Iterable[int],
        total: int,
    ) -> Iterator[Row]:
        columns = {name: batch.column(name).to_pylist() for name in self._fields.names}
        for one in wanted:
            asked = self._fields.asked({name: values[one] for name, values in columns.items()})
            position = file.bytes * (first + one + 1) // total if total else 0
            yield Row(file, first + one, first + one + 1, asked, (batch, one), position)

    def _open(self, file: InputFile) -> Any:  # noqa: ANN401
        try:
            return package("pyarrow.parquet", NEEDS).ParquetFile(file.path)
        except (OSError, self._arrow.ArrowException) as error:
            raise self._unreadable(file, error) from None

    def _unreadable(self, file: InputFile, error: BaseException) -> InputError:
        return InputError(
            f"{file.path} cannot be read ({' '.join(str(error).split())})",
            expected="a whole Parquet file",
            remedy="Copy it again, or name its format with `input_format`.",
            option="input",
        )

    def _holds_texts(self, kind: Any) -> bool:  # noqa: ANN401
        types = self._arrow.types
        inner = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        return any(test(inner) for test in tests)


class ParquetWriter:
    """Writes a shard as Parquet: the columns of its input, and those of the output after them."""

    def __init__(self, stream: BinaryIO, columns: Columns, text_field: str) -> None:
        self._stream = stream
        self._columns = columns
        self._text_field = text_field
        self._arrow = arrow(NEEDS)
        self._writer: Any = None
        self._rows: list[tuple[Row, Written]] = []

    def write(self, row: Row, written: Written) -> None:
        """Takes a row; rows are written in batches."""
        if self._rows and (len(self._rows) >= BATCH_ROWS or not self._follows(row)):
            self._flush()
        self._rows.append((row, written))

    def close(self) -> None:
        """Writes what is left."""
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        table = self._kept()
        string = self._arrow.string()
        for name, values in self._columns.by_name([written for _, written in self._rows]).items():
            table = table.append_column(self._arrow.field(name, string), self._arrow.array(values, type=string))
        if self._writer is None:
            writer = package("pyarrow.parquet", NEEDS).ParquetWriter
            self._writer = writer(self._stream, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._rows.clear()

    def _kept(self) -> Any:  # noqa: ANN401
        """The columns of the input for these rows, which follow each other."""
        batch, first = self._place_of(self._rows[0][0])
        if batch is None:
            texts = [row.kept for row, _ in self._rows]
            return self._arrow.table({self._text_field: self._arrow.array(texts, type=self._arrow.string())})
        return self._arrow.Table.from_batches([batch.slice(first, len(self._rows))])

    def _follows(self, row: Row) -> bool:
        """Whether a row is from the same batch of the input as those that wait."""
        return self._place_of(row)[0] is self._place_of(self._rows[0][0])[0]

    def _place_of(self, row: Row) -> tuple[Any, int]:
        """The batch of the input that a row is from, and where it is there."""
        return row.kept if isinstance(row.kept, tuple) else (None, 0)
