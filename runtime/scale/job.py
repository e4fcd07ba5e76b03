"""What a job is: its files, its fields and the options of its translations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.search import Sampling
from kvx.runtime.errors import InputError
from kvx.runtime.options import SEARCH_FIELDS, TranslateOptions
from kvx.runtime.rules import Option, Problem, Rule, choice, count, refuse, wrong_values
from kvx.runtime.scale.columns import Columns
from kvx.runtime.scale.compression import COMPRESSIONS
from kvx.runtime.scale.folder import ShardKey, ShardRecord, whole_shards
from kvx.runtime.scale.inputs import FORMATS, Format, InputFile, find_inputs
from kvx.runtime.scale.rows import Fields, Reader
from kvx.runtime.scale.writers import reader_for

CompressionName = Literal["none", "gz", "bz2", "xz", "zst"]
NAME = Rule("a name", lambda value: isinstance(value, str) and value != "")
OF_THE_MACHINE = ("rows", "workers", "cache_bytes", "window", "filters")  # options that change no translation
IN_DETAILS = ("scores", "align", "n_best", "samples")
DETAILS = "details"
MOST_SHARD_ROWS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How rows are read and written. Raises OptionError."""

    text_field: Annotated[str, Option(NAME, "The field of a row that has its text.")] = "text"
    from_field: Annotated[str | None, Option(NAME, "The field of a row that has the code of its text's language.")] = (
        None
    )
    to_field: Annotated[
        str | None, Option(NAME, "The field of a row that has the code of the language to translate it to.")
    ] = None
    translation_field: Annotated[str, Option(NAME, "The field to write the translation to.")] = "translation"
    error_field: Annotated[
        str, Option(NAME, "The field to write the error of a row to that cannot be translated; null for others.")
    ] = "error"
    details_field: Annotated[
        str | None,
        Option(
            NAME,
            "The field to write all to that is known of a translation, as kvx translate --json prints it: scores, "
            "alignments, further translations. In Parquet it is JSON.",
            unset=f"{DETAILS} with --scores, --align, --n-best and --samples, otherwise none",
        ),
    ] = None
    input_format: Annotated[
        Format | None, Option(choice(FORMATS), "The format of the input.", unset="by the endings of the files")
    ] = None
    output_format: Annotated[
        Format | None,
        Option(
            choice(FORMATS),
            "The format of the output. Text may become any other, with its lines in --text-field; any other may "
            "become text, of which a line is a translation.",
            unset="that of the input",
        ),
    ] = None
    compression: Annotated[
        CompressionName | None,
        Option(
            choice(get_args(CompressionName)),
            "How to compress the output. Parquet always compresses its columns.",
            unset="as each input file",
        ),
    ] = None
    shard_rows: Annotated[
        int,
        Option(count(MOST_SHARD_ROWS), "Write this many rows to a shard. A file begins a new one."),
    ] = 5000

    def __post_init__(self) -> None:
        refuse(wrong_values(self))
        names = (self.translation_field, self.error_field, self.details_field)
        refuse(
            Problem(name, f"`{name}` is {value!r}, which another field of the output is called too", "different names")
            for name, value, taken in (
                ("error_field", self.error_field, names[:1]),
                ("details_field", self.details_field, names[:2]),
            )
            if value in taken
        )

    @property
    def fields(self) -> Fields:
        """The fields that are read."""
        return Fields(self.text_field, self.from_field, self.to_field)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Files to translate by a bundle with some manifest."""

    inputs: tuple[InputFile, ...]
    options: BatchOptions
    translate: TranslateOptions
    manifest: Manifest

    @classmethod
    def of(
        cls, patterns: tuple[str, ...], options: BatchOptions, translate: TranslateOptions, manifest: Manifest
    ) -> Self:
        """The job over the files of these patterns, checked as far as their first rows tell. Options of translations
        are resolved. Raises InputError and OptionError.
        """
        inputs = find_inputs(patterns, options.input_format)
        job = cls(inputs=inputs, options=options, translate=_repeatable(translate, options), manifest=manifest)
        refuse(job._contradictions())
        reader, taken = job.reader, job.columns.names if job.output_format != "text" else ()
        for file in inputs:
            reader.check(file, taken)
        return job

    @property
    def input_format(self) -> Format:
        """The format of all files."""
        return self.inputs[0].format

    @property
    def output_format(self) -> Format:
        """The format of the shards."""
        return self.options.output_format or self.input_format

    @property
    def reader(self) -> Reader:
        """What reads the files."""
        return reader_for(self.input_format, self.options.fields, self.options.shard_rows)

    @property
    def columns(self) -> Columns:
        """The fields that are written."""
        own, asked = self.options, self.translate
        more = asked.scores or asked.align or _hypotheses(asked) > 1
        return Columns(own.translation_field, own.error_field, own.details_field or (DETAILS if more else None))

    def compression(self, file: InputFile) -> str:
        """The compression of the shards of a file."""
        return "none" if self.output_format == "parquet" else self.options.compression or file.compression

    def ending(self, file: InputFile) -> str:
        """The ending of the shards of a file."""
        ending = {"jsonl": ".jsonl", "text": ".txt", "parquet": ".parquet"}[self.output_format]
        return ending + COMPRESSIONS[self.compression(file)].ending

    def describe(self) -> dict[str, Any]:
        """What makes it the same job, as JSON."""
        return {
            "bundle": bundle_digest(self.manifest),
            "input": [{"name": one.path.name, "bytes": one.bytes} for one in self.inputs],
            "options": {**asdict(self.options), **_options_form(self.translate)},
        }

    def is_done(self, records: Mapping[ShardKey, ShardRecord]) -> bool:
        """Whether these are all shards of all files."""
        return all(one.bytes == 0 or whole_shards(one.number, records) is None for one in self.inputs)

    def _contradictions(self) -> Iterator[Problem]:
        formats = {self.input_format, self.output_format}
        if formats == {"jsonl", "parquet"}:
            got = f"`output_format` is {self.output_format}, and the input is {self.input_format}"
            yield Problem("output_format", got, "the format of the input, or text")
        if self.output_format == "text":
            for name in IN_DETAILS:
                if name in self.translate.given:
                    yield Problem(name, f"`{name}` is given, but a line of text has only a translation", "jsonl output")
            if self.options.details_field is not None:
                got = "`details_field` is given, but a line of text has only a translation"
                yield Problem("details_field", got, "jsonl output")
        if self.input_format == "text":
            for name in ("from_field", "to_field"):
                if getattr(self.options, name) is not None:
                    yield Problem(
                        name, f"`{name}` is given, but lines of text have no fields", "jsonl or parquet input"
                    )
            if self.output_format != "text" and self.options.text_field in self.columns.names:
                yield Problem("text_field", "`text_field` is a field of the output too", "different names")
        if self.output_format == "parquet" and self.options.compression not in (None, "none"):
            yield Problem("compression", "`compression` is given for Parquet", "no `compression`: it compresses itself")


def bundle_digest(manifest: Manifest) -> str:
    """The sha256 of all that decides a bundle's translations."""
    form = manifest.to_dict()
    told = {name: form[name] for name in form if name not in ("created", "kvx_version", "parity")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _repeatable(translate: TranslateOptions, options: BatchOptions) -> TranslateOptions:
    """The options with a seed, where there are samples, and open where rows have languages of their own."""
    search = translate.search
    if isinstance(search, Sampling) and search.seed is None:
        translate = translate.changed(seed=0)
    return options.fields.opened(translate)


def _hypotheses(options: TranslateOptions) -> int:
    return max(getattr(options.search, "n_best", 1), getattr(options.search, "samples", 1))


def _options_form(options: TranslateOptions) -> dict[str, Any]:
    """The options of translations as JSON, those of the search by their keywords, a shortlist by its content."""
    form = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in OF_THE_MACHINE}
    search = form.pop("search")
    form |= {name: getattr(search, field) for name, field in SEARCH_FIELDS.items() if hasattr(search, field)}
    if options.shortlist is not None:
        form["shortlist"] = _digest_of(Path(options.shortlist))
    plain: dict[str, Any] = json.loads(json.dumps(form, default=str))
    return plain


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})",
            expected="a shortlist",
            remedy="Check the path.",
            option="shortlist",
        ) from None
