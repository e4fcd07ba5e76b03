"""A job on one machine: rows of all shards flow through one engine, and each shard is closed as its last row comes."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.core import core_for
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.translating import Asked, translate_each
from kvx.runtime.errors import InputError
from kvx.runtime.scale.compression import COMPRESSIONS
from kvx.runtime.scale.folder import OpenShard, OutputFolder, ShardKey, ShardRecord, failed_writing, whole_shards
from kvx.runtime.scale.inputs import InputFile
from kvx.runtime.scale.job import Job
from kvx.runtime.scale.rows import EndOfFile, Row
from kvx.runtime.scale.writers import Writer, writer_for
from kvx.runtime.translation import Translation

FIRST_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: rows that this run has translated, those with an error among them, and bytes of the input that
    have been dealt with by now, by this run or before, of all.
    """

    rows: int
    errors: int
    bytes: int
    all_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of a job: all its rows, those that earlier runs had done, errors, sources that were cut, translations
    that ended at the limit of tokens, and shards; `seconds` that this run translated.
    """

    rows: int
    rows_before: int
    errors: int
    truncated: int
    at_limit: int
    shards: int
    seconds: float
    first_errors: tuple[str, ...]

    @classmethod
    def of(cls, records: Mapping[ShardKey, ShardRecord], rows_before: int | None, seconds: float) -> Self:
        """Of the shards of a job; `rows_before` is None where all of them were there."""
        all_ = [records[key] for key in sorted(records)]
        rows = sum(one.rows for one in all_)
        return cls(
            rows=rows,
            rows_before=rows if rows_before is None else rows_before,
            errors=sum(one.errors for one in all_),
            truncated=sum(one.truncated for one in all_),
            at_limit=sum(one.at_limit for one in all_),
            shards=len(all_),
            seconds=seconds,
            first_errors=tuple(itertools.islice((told for one in all_ for told in one.first_errors), FIRST_ERRORS)),
        )

    @property
    def totals(self) -> dict[str, int]:
        """What the manifest says of all shards."""
        return {name: getattr(self, name) for name in ("rows", "errors", "truncated", "at_limit", "shards")}


Told = Callable[[Progress], object]


def run_batch(job: Job, model: LoadedModel, folder: OutputFolder, told: Told | None = None) -> Summary:
    """Translates what is missing in the folder. A row that cannot be translated gets its error, and fails nothing.

    Raises InputError for files that cannot be read or written; shards that are whole by then stay.
    """
    before, started = sum(one.rows for one in folder.records.values()), time.perf_counter()
    stream = _Stream(job, folder.records)
    shards = Shards(job, folder)
    with core_for(model, job.translate) as core, contextlib.closing(shards):
        results = translate_each(core, stream.asked(), job.translate, stats=DecodeStats())
        with contextlib.closing(results):  # type: ignore[type-var]  # it is a generator
            for done, result in enumerate(results, 1):
                row = shards.next_row(stream.held)
                shards.write(row, result)
                if told is not None:
                    told(Progress(done, shards.errors, stream.bytes_before(row.file) + row.position, stream.all_bytes))
        shards.take_ends(stream.held)
    return conclude(folder, before, time.perf_counter() - started)


def conclude(folder: OutputFolder, rows_before: int | None = None, seconds: float = 0.0) -> Summary:
    """Finishes a folder in which every shard is whole → what came of the job."""
    summary = Summary.of(folder.records, rows_before, seconds)
    folder.finish(summary.totals)
    return summary


class _Stream:
    """The rows of all files that are not done, in order; those that are under way wait in `held`."""

    def __init__(self, job: Job, records: Mapping[ShardKey, ShardRecord]) -> None:
        self.held: deque[Row | EndOfFile] = deque()
        self.all_bytes = sum(one.bytes for one in job.inputs)
        self._job = job
        self._records = records
        sizes = [one.bytes for one in job.inputs]
        self._before = [0, *itertools.accumulate(sizes)]

    def bytes_before(self, file: InputFile) -> int:
        """Bytes of the files before this one."""
        return self._before[file.number]

    def asked(self) -> Iterator[Asked | InputError]:
        """What is to be translated. Each row is held before it is given."""
        reader = self._job.reader
        for file in self._job.inputs:
            skipped = whole_shards(file.number, self._records)
            if skipped is None:
                continue
            rows = reader.rows(file, skipped)
            while True:
                try:
                    row = next(rows)
                except StopIteration as end:
                    self.held.append(EndOfFile(file, end.value))
                    break
                self.held.append(row)
                yield row.asked


class Shards:
    """Writes results to the shards that they belong to, one after the other."""

    def __init__(self, job: Job, folder: OutputFolder) -> None:
        self.errors = 0
        self._job = job
        self._folder = folder
        self._columns = job.columns
        self._open: OpenShard | None = None
        self._key: ShardKey | None = None
        self._writer: Writer | None = None

    def next_row(self, held: deque[Row | EndOfFile]) -> Row:
        """The row of the next result; ends of files before it are dealt with."""
        while isinstance(first := held.popleft(), EndOfFile):
            self._end(first)
        return first

    def take_ends(self, held: deque[Row | EndOfFile]) -> None:
        """Deals with the ends of files after the last row."""
        while held:
            end = held.popleft()
            assert isinstance(end, EndOfFile), "a row without a result"
            self._end(end)

    def write(self, row: Row, result: Translation | InputError) -> None:
        """Writes a result to its shard. Raises InputError where it cannot be written."""
        key = ShardKey(row.file.number, row.index // self._job.options.shard_rows)
        if key != self._key:
            self.finish(last=False)
            self._begin(key, row.file)
        assert self._open is not None
        assert self._writer is not None
        written = self._columns.of_row(row, result)
        self._open.counts.rows += 1
        if isinstance(result, InputError):
            self.errors += 1
            self._open.note_error(written.error or "")
        else:
            self._open.counts.truncated += result.truncated
            self._open.counts.at_limit += result.finish_reason == "length"
        try:
            self._writer.write(row, written)
        except OSError as error:
            raise failed_writing(self._folder.path, error) from error

    def close(self) -> None:
        """Removes a shard that is not whole."""
        if self._open is not None:
            self._open.discard()
            self._open = self._key = self._writer = None

    def _begin(self, key: ShardKey, file: InputFile) -> None:
        compress = COMPRESSIONS[self._job.compression(file)].writing
        self._open = OpenShard(self._folder.path, key, self._job.ending(file), compress)
        self._key = key
        self._writer = writer_for(
            self._job.output_format, self._open.stream, self._columns, self._job.options.text_field
        )

    def finish(self, *, last: bool) -> None:
        """Gives the shard that is open, if there is one, its name. Raises InputError."""
        if self._open is None or self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            raise failed_writing(self._folder.path, error) from error
        record = self._open.finish(last=last)
        self._folder.records[record.key] = record
        self._open = self._key = self._writer = None

    def _end(self, end: EndOfFile) -> None:
        """Closes the shard that is open, at the end of its file."""
        shard_rows = self._job.options.shard_rows
        self.finish(last=self._key is not None and (self._key.shard + 1) * shard_rows >= end.rows)
