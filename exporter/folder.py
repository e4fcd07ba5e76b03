"""A folder that appears whole or not at all, and replaces only what it may."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.errors import BundleError, OptionError

if sys.platform != "win32":
    import fcntl

MOST_RACES = 10  # with other exports that replace the same bundle
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def check_output(folder: Path, checkpoint: Path, *, force: bool) -> None:
    """Raises OptionError, before any work, for an output that must not be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return
    if Path(os.path.realpath(checkpoint)).is_relative_to(os.path.realpath(folder)):  # a loop of links is no error yet
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
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_made(partial))
            _clear_leftovers(folder, but=partial)
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


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A new folder that is locked: what another export finds unlocked before that, it removes."""
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_RACES):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder, wait=True))
            if folder.exists():
                break
            stack.close()
        yield


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the folder as this process's own, unless a living process does, which `wait` waits for. False where it is
    not held, or cannot be. The lock ends with the process.
    """
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # it is another's, or the file system has no locks
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _clear_leftovers(folder: Path, but: Path) -> None:
    """Removes what exports to this folder left that were killed: no living process has locked it. An older bundle
    stays where nothing has replaced it.
    """
    replaced = folder.exists()
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    for path in folder.parent.iterdir():
        kind = name.fullmatch(path.name)
        if kind is None or path == but or path.is_symlink() or (kind[1] == "old" and not replaced):
            continue
        with contextlib.suppress(OSError), _locked(path) as ours:
            if ours:
                shutil.rmtree(path, ignore_errors=True)


def _put(partial: Path, folder: Path, old: Path, *, force: bool) -> None:
    """Puts the folder under its name, also while other exports do. Raises OptionError."""
    error = None
    for _ in range(MOST_RACES):
        if folder.exists() and not (force and _is_bundle(folder)):
            raise _appeared(folder)
        try:
            if not folder.exists():
                partial.rename(folder)
            elif not exchange(partial, folder):
                folder.rename(old)
                partial.rename(folder)
        except OSError as failed:
            error = failed
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                break
        else:
            return
    raise OptionError(
        f"The output {folder} cannot be put in its place ({error.strerror if error else 'others replace it too'})",
        expected="a folder that nobody else replaces meanwhile",
        remedy="Export again, or name another folder with `output`.",
        option="output",
    )


def _appeared(folder: Path) -> OptionError:
    return OptionError(
        f"The output {folder} has appeared in the meantime",
        expected="a new folder",
        remedy="Export again, or name another folder with `output`.",
        option="output",
    )


def exchange(one: Path, other: Path) -> bool:
    """Lets two folders swap their names in one step, so that there is a folder of either name at any time. False where
    the system cannot do that. Raises OSError.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc from 2.28 on
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _is_bundle(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except BundleError:
        return False
    return True
