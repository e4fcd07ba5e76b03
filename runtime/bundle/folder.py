"""A bundle on disk: found, and checked before anything in it is used."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Self

from kvx.runtime.bundle.files import FileEntry, Files, Identity, is_lfs_pointer
from kvx.runtime.bundle.graphs import FORMAT_ENDINGS, GRAPH_FILES
from kvx.runtime.bundle.manifest import MANIFEST_FILE, Manifest, lfs_pointer
from kvx.runtime.errors import BundleError, remedy_of

CHECKPOINT_FILE = "model.pt"
LONGEST_NAME = 255  # bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose manifest has been read and whose files have the names and sizes it gives. `files` are those that
    may be opened; they must stay what they are now.
    """

    folder: Path
    manifest: Manifest
    files: Files = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Notes what the files are."""
        object.__setattr__(self, "files", Files(self.folder, self.manifest.files))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads the manifest and checks names and sizes. A whole format and the checkpoint may be missing: only those
        who use them need them. Raises BundleError.
        """
        manifest = Manifest.read(folder)
        for name in manifest.files:
            _check_name(folder, name)
        bundle = cls(folder, manifest)
        bundle._check_sizes()
        return bundle

    @property
    def missing(self) -> tuple[str, ...]:
        """The files that the manifest names and that are not there."""
        return tuple(name for name in self.manifest.files if Identity.of(self.folder / name) is None)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of the manifest whose files are there."""
        missing = self.missing
        return tuple(name for name in self.manifest.formats if set(GRAPH_FILES[name]).isdisjoint(missing))

    def check_hashes(self, names: Iterable[str] | None = None) -> None:
        """Compares the sha256 of these files, or of all that are there, with the manifest's. Raises BundleError."""
        missing = self.missing if names is None else ()
        for name in (name for name in (self.manifest.files if names is None else names) if name not in missing):
            try:
                got = FileEntry.of(self.folder / name).sha256
            except OSError as error:
                raise _unreadable(self.folder / name, error) from None
            expected = self.manifest.files[name].sha256
            if got != expected:
                raise _altered(f"{self.folder / name} has the sha256 {got[:12]}…", f"{expected[:12]}…")

    def require(self, *names: str) -> None:
        """Raises BundleError unless the bundle holds these files."""
        missing = [name for name in names if name not in self.manifest.files or name in self.missing]
        if missing:
            raise BundleError(
                f"{self.folder} has no {' and no '.join(missing)}",
                expected=f"one of the formats it has: {', '.join(self.formats)}",
                remedy="Choose another `backend`, or export the checkpoint again with `format` both, in fp32.",
            )

    def _check_sizes(self) -> None:
        missing = self.missing
        for name in missing:
            if not self._may_lack(name, missing):
                how = "is not a regular file" if os.path.lexists(self.folder / name) else "is not there"
                raise _altered(f"{self.folder / name} {how}", f"a file of {self.manifest.files[name].bytes} bytes")
        for name, entry in self.manifest.files.items():
            found = Identity.of(self.folder / name)
            if found is not None and found.size != entry.bytes:
                path = self.folder / name
                if is_lfs_pointer(path):
                    raise lfs_pointer(path)
                raise _altered(f"{path} is {found.size} bytes long", f"a file of {entry.bytes} bytes")

    def _may_lack(self, name: str, missing: Collection[str]) -> bool:
        """Only nothing at that path is a missing file, and only the checkpoint or a whole format may be missing."""
        if os.path.lexists(self.folder / name):
            return False
        of_format = next((endings for endings in FORMAT_ENDINGS.values() if name.endswith(endings)), None)
        if of_format is None:
            return name == CHECKPOINT_FILE
        return all(other in missing for other in self.manifest.files if other.endswith(of_format))


def newest_bundle(artifacts: Path) -> Path:
    """The bundle below `artifacts` that was created last. Raises BundleError where there is none."""
    found = []
    for path in sorted(artifacts.glob(f"[!.]*/{MANIFEST_FILE}")):
        try:
            found.append((Manifest.read(path.parent).created, path.parent))
        except BundleError:
            continue
    if not found:
        raise BundleError(
            f"There is no bundle below {artifacts}/",
            expected="one written by kvx export",
            remedy="Name one with `model`, or export a checkpoint first.",
            option="model",
        )
    return max(found)[1]


def _check_name(folder: Path, name: str) -> None:
    """Only plain names: no path leads out of the folder. What a link leads to has the manifest's hash or is refused."""
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")
    plain = plain and name.isprintable() and len(name.encode()) <= LONGEST_NAME
    if not plain:
        raise BundleError(
            f"{folder} lists the file {name!r}",
            expected="plain names of files inside the folder",
            remedy="Do not use this bundle: it may have been tampered with.",
        )


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path} cannot be read ({error.strerror or error})",
        expected="a file of the bundle",
        remedy=remedy_of(error, "Copy the bundle again."),
    )


def _altered(got: str, expected: str) -> BundleError:
    return BundleError(got, expected=expected, remedy="Copy the bundle again, or export the checkpoint again.")
