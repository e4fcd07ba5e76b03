"""The files that a job reads: found, ordered and told apart by their endings."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, get_args

from kvx.runtime.errors import InputError, OptionError, listed, remedy_of
from kvx.runtime.scale.compression import COMPRESSIONS, compression_of
from kvx.runtime.text.lines import STANDARD

Format = Literal["jsonl", "parquet", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of a job: its `number` among them, from 0, its size in bytes, its format and compression."""

    number: int
    path: Path
    bytes: int
    format: Format
    compression: str

    @property
    def unit(self) -> str:
        """What its rows are called in messages."""
        return "row" if self.format == "parquet" else "line"


def find_inputs(patterns: Iterable[str], given: Format | None = None) -> tuple[InputFile, ...]:
    """The files of these paths and patterns, those of a pattern in the order of their names, each once.

    `given` is the format of those whose endings do not tell. Raises InputError and OptionError.
    """
    paths = list(dict.fromkeys(path for pattern in patterns for path in _matching(pattern)))
    found = tuple(_input(number, path, given) for number, path in enumerate(paths))
    formats = sorted({one.format for one in found})
    if len(formats) > 1:
        raise InputError(
            f"The input has files of several formats ({', '.join(formats)})",
            expected="one format in a job",
            remedy="Give each format a job and an output folder of its own.",
            option="input",
        )
    return found


def _matching(pattern: str) -> Iterator[Path]:
    if pattern == STANDARD:
        raise InputError(
            "The input is standard input, which cannot be read again when the job goes on",
            expected="files",
            remedy="Write it to a file first, or use kvx translate.",
            option="input",
        )
    if not glob.has_magic(pattern) or Path(pattern).exists():
        yield Path(pattern)
        return
    matching = [path for path in sorted(glob.glob(pattern, recursive=True)) if not Path(path).is_dir()]  # noqa: PTH207
    if not matching:
        raise InputError(
            f"No file matches {pattern}", expected="at least one", remedy="Check the pattern.", option="input"
        )
    yield from map(Path, matching)


def _input(number: int, path: Path, given: Format | None) -> InputFile:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise InputError(
                f"{path} is a folder",
                expected="files",
                remedy=f"Name its files by a pattern, for example '{path / '*.jsonl'}'.",
                option="input",
            )
        if not path.is_file():
            raise InputError(f"{path} is not a regular file", expected="files that can be read again",
                             remedy="Copy its content to a file first.", option="input")  # fmt: skip
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})",
            expected="a file",
            remedy=remedy_of(error, "Check the path."),
            option="input",
        ) from None
    compression = compression_of(path)
    ending = PurePath(path.name.removesuffix(COMPRESSIONS[compression].ending)).suffix.lower()
    kind = given or ENDINGS.get(ending)
    if kind is None:
        raise OptionError(
            f"The name of {path} does not tell its format",
            expected=f"an ending like {listed(list(ENDINGS), len(ENDINGS))}",
            remedy=f"Name the format with `input_format`: {', '.join(FORMATS)}.",
            option="input_format",
        )
    if kind == "parquet" and compression != "none":
        raise InputError(
            f"{path} is a Parquet file that is compressed as a whole",
            expected="Parquet, which compresses its own columns",
            remedy="Decompress it first.",
            option="input",
        )
    return InputFile(number, path, size, kind, compression)
