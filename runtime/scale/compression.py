"""Compressed files, told by their endings, as streams of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from kvx.runtime.scale.packages import arrow

DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)  # pyarrow's own are ValueErrors and OSErrors


@dataclass(frozen=True, slots=True)
class Compression:
    """One way to compress: the ending of its files, and what makes a stream of content of a stream of a file."""

    ending: str
    reading: Callable[[BinaryIO], BinaryIO]
    writing: Callable[[BinaryIO], BinaryIO]


def _same(stream: BinaryIO) -> BinaryIO:
    return stream


def _write_gz(stream: BinaryIO) -> BinaryIO:
    """Without name and time, so that equal content makes equal files."""
    return cast(BinaryIO, gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=6, mtime=0))


def _read_zst(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(arrow("zst files").CompressedInputStream(stream, "zstd")))


def _write_zst(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, arrow("zst files").CompressedOutputStream(stream, "zstd"))


def _read_gz(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))


def _read_bz2(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(stream, "rb"))


def _write_bz2(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(stream, "wb"))


def _read_xz(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(stream, "rb"))  # who asks for it closes it


def _write_xz(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(stream, "wb"))


COMPRESSIONS = {
    "none": Compression("", _same, _same),
    "gz": Compression(".gz", _read_gz, _write_gz),
    "bz2": Compression(".bz2", _read_bz2, _write_bz2),
    "xz": Compression(".xz", _read_xz, _write_xz),
    "zst": Compression(".zst", _read_zst, _write_zst),
}


def compression_of(path: Path) -> str:
    """The name of the compression that a file's ending tells of."""
    return next((name for name, one in COMPRESSIONS.items() if one.ending and path.suffix == one.ending), "none")
