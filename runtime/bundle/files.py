"""Files: read only where they are regular, and opened only where they are what the manifest says."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Self

from kvx.runtime.errors import BundleError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class NotRegularError(OSError):
    """What stands at a path is a folder, a pipe, a socket or a device."""


def open_regular(path: Path) -> BufferedReader:
    """A regular file, or one that links lead to, open for reading. Raises OSError, and never waits for a writer."""
    _refuse_irregular(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
    except NotRegularError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file, or one byte more than `most` where it is longer. Raises OSError."""
    with open_regular(path) as file:
        return file.read(most + 1)


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer where this file should be."""
    try:
        return read_regular(path, len(LFS_POINTER) - 1).startswith(LFS_POINTER)
    except OSError:
        return False


def _refuse_irregular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularError(0, "is not a regular file", str(path))


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str

    @property
    def is_plausible(self) -> bool:
        """Whether these are a size and a hash at all."""
        return type(self.bytes) is int and self.bytes >= 0 and re.fullmatch("[0-9a-f]{64}", self.sha256) is not None

    @classmethod
    def of(cls, path: Path) -> Self:
        """The entry of a file as it is on disk. Raises OSError."""
        with open_regular(path) as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


class Identity(NamedTuple):
    """What tells a file from one that has taken its place, and from itself with other content."""

    device: int
    inode: int
    size: int
    written: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """That of the regular file at a path, or None where there is none."""
        try:
            found = path.stat()
        except (OSError, ValueError):
            return None
        return (
            cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
        )

    def is_overwritten(self, now: Identity | None) -> bool:
        """Whether the same file has other content now. One that took its place leaves open files and mappings alone."""
        return now is not None and now != self and now[:2] == self[:2]


class Files:
    """The files of a folder that may be opened.

    Those of a bundle are the `entries` of its manifest, and must stay as they were when this was made. A folder that
    has no manifest yet, which an export is writing, owns all that it holds.
    """

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry] | None = None) -> None:
        self.folder = folder
        self._entries = entries
        self._seen = {name: Identity.of(folder / name) for name in entries or ()}

    def __contains__(self, name: str) -> bool:
        """Whether a file may be opened: the manifest says so, not the disk."""
        return (self.folder / name).is_file() if self._entries is None else name in self._entries

    def check(self, names: Iterable[str]) -> None:
        """Raises BundleError where a file that is about to be opened is no longer the one of the manifest."""
        for name in names:
            now = Identity.of(self.folder / name)
            if self._entries is not None and (now is None or now != self._seen[name]):
                self._compare(name, now)

    def check_open(self, names: Iterable[str]) -> None:
        """Raises BundleError where a file that is open or mapped has been written over."""
        for name in names:
            seen = self._seen.get(name)
            now = Identity.of(self.folder / name)
            if seen is not None and seen.is_overwritten(now):
                self._compare(name, now)

    def _compare(self, name: str, now: Identity | None) -> None:
        """A file may have been touched, or have been replaced by its equal."""
        assert self._entries is not None, "only a manifest says what a file was"
        try:
            same = now is not None and FileEntry.of(self.folder / name) == self._entries[name]
        except OSError:
            same = False
        if not same:
            raise BundleError(
                f"{self.folder / name} has changed on disk since the bundle was loaded",
                expected="the files that were checked at load",
                remedy="Load the bundle again.",
            )
        self._seen[name] = now


def files_of(files: Files | Path) -> Files:
    """Files as they are, or those of a folder without a manifest."""
    return Files(files) if isinstance(files, Path) else files
