"""A bundle on disk: found, and checked before anything in it is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Self

from kvx.runtime.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest
from kvx.runtime.errors import BundleError

SOURCE_TOKENIZER_FILE = "source.model"
TARGET_TOKENIZER_FILE = "target.model"
CHECKPOINT_FILE = "model.pt"
LONGEST_NAME = 255  # bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose manifest has been read and whose files have the names and sizes it gives."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads the manifest and checks names and sizes. Raises BundleError."""
        manifest = Manifest.read(folder)
        for name, entry in manifest.files.items():
            _check_name(folder, name)
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != entry.bytes:
                found = "is not there" if size is None else f"is {size} bytes long"
                raise _altered(f"{folder / name} {found}", f"a file of {entry.bytes} bytes")
        return cls(folder, manifest)

    def check_hashes(self, names: Iterable[str] | None = None) -> None:
        """Compares the sha256 of these files, or of all, with the manifest's. Raises BundleError."""
        for name in self.manifest.files if names is None else names:
            got, expected = FileEntry.of(self.folder / name).sha256, self.manifest.files[name].sha256
            if got != expected:
                raise _altered(f"{self.folder / name} has the sha256 {got[:12]}…", f"{expected[:12]}…")

    def require(self, *names: str) -> None:
        """Raises BundleError unless the bundle holds these files."""
        missing = [name for name in names if name not in self.manifest.files]
        if missing:
            raise BundleError(
                f"{self.folder} has no {' and no '.join(missing)}",
                expected=f"one of the formats it has: {', '.join(self.manifest.formats)}",
                remedy="Choose another `backend`, or export the checkpoint again with `format` both, in fp32.",
            )


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
    """Only plain names of regular files: no path, and no link, leads out of the folder."""
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")
    plain = plain and name.isprintable() and len(name.encode()) <= LONGEST_NAME
    if not plain or (folder / name).is_symlink():
        raise BundleError(
            f"{folder} lists the file {name!r}",
            expected="plain files inside the folder",
            remedy="Do not use this bundle: it may have been tampered with.",
        )


def _altered(got: str, expected: str) -> BundleError:
    return BundleError(got, expected=expected, remedy="Copy the bundle again, or export the checkpoint again.")
