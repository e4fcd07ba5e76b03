"""A folder that appears whole or not at all, and replaces only what it may."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.errors import BundleError, OptionError


def check_output(folder: Path, checkpoint: Path, *, force: bool) -> None:
    """Raises OptionError, before any work, for an output that must not be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return
    if checkpoint.resolve().is_relative_to(folder.resolve()):
        remedy = "Name another folder with `output`: this one holds the checkpoint."
    elif folder.is_symlink() or not _is_bundle(folder):
        remedy = "Name another folder with `output`: this one is no bundle, so it is never replaced."
    elif not force:
        remedy = "Replace it with `force`, or name another folder with `output`."
    else:
        return
    raise OptionError(f"The output {folder} exists already", expected="a new folder", remedy=remedy, option="output")


@contextlib.contextmanager
def whole_or_nothing(folder: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place at the end, or vanishes. Raises OptionError."""
    folder = folder.absolute()
    partial, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{what}") for what in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OptionError(
            f"The output {folder} cannot be made ({error.strerror})",
            expected="a folder that may be written",
            remedy="Name another folder with `output`.",
            option="output",
        ) from None
    try:
        yield partial
        _put(partial, folder, old, force=force)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _put(partial: Path, folder: Path, old: Path, *, force: bool) -> None:
    if folder.exists() and not (force and _is_bundle(folder)):
        raise OptionError(
            f"The output {folder} has appeared in the meantime",
            expected="a new folder",
            remedy="Export again, or name another folder with `output`.",
            option="output",
        )
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)


def _is_bundle(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except BundleError:
        return False
    return True
