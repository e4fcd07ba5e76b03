"""kvx's own operators of ONNX Runtime: a library in C that may be missing, and where it is."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from pathlib import Path

SWITCH = "KVX_KERNELS"  # an environment variable: 0 leaves them out, plain takes none of the processor's extensions
PLAIN = "plain"
VERSION = 1  # of the operators; raised whenever graphs of before would not run, or would compute something else
MODULE = f"{__name__}.operators"

_log = logging.getLogger("kvx")


def library() -> Path | None:
    """The library, or None where kvx was installed without a compiler or the environment variable KVX_KERNELS is 0."""
    return None if os.environ.get(SWITCH) == "0" else _built()


@functools.cache
def _built() -> Path | None:
    """The library that was built when kvx was installed, if it can be loaded here."""
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        return None
    try:
        _load(Path(found.origin))
    except OSError as error:
        _log.warning("kvx's own operators cannot be loaded, and are left out: %s", error)
        return None
    return Path(found.origin)


def instructions() -> str | None:
    """The instructions that the operators use on this processor, or None where the library is missing."""
    path = library()
    if path is None:
        return None
    name = _load(path).kvx_instructions
    name.restype = ctypes.c_char_p
    found: bytes = name()
    return found.decode("ascii")


def run(version: int | None) -> bool:
    """Whether graphs with this version of the operators run here, on the CPU."""
    return version == VERSION and library() is not None


def lacking(version: int | None) -> str:
    """Why graphs with this version of the operators do not run here."""
    if version != VERSION:
        return f"they are of version {version}, and this kvx has version {VERSION}"
    switched_off = os.environ.get(SWITCH) == "0"
    return f"{SWITCH} is 0" if switched_off else "kvx has been installed without them"


def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
