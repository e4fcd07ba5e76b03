"""Packages of the extras, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from kvx.runtime.errors import OptionError

EXTRAS = {"pyarrow": "scale", "ray": "ray"}


def arrow(what: str) -> Any:  # noqa: ANN401  # pyarrow has no types
    """The module pyarrow, which `what` needs. Raises OptionError where it is not installed."""
    return package("pyarrow", what)


def package(name: str, what: str) -> Any:  # noqa: ANN401  # what they have is not typed
    """A module of an extra. Raises OptionError where it is not installed."""
    root = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or root).partition(".")[0] != root:
            raise
        extra = EXTRAS[root]
        raise OptionError(
            f"{root} is not installed, and {what} need it",
            expected=f"the packages of the extra {extra}",
            remedy=f"Install them with: pip install 'kvx[{extra}]'",
        ) from None
