"""Options from texts, where there is no command line: NAME=VALUE arguments, and the environment.

An option is spelled as `kvx serve` spells it, with underscores: body_kb=512, or KVX_BODY_KB=512.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from kvx.runtime.errors import OptionError
from kvx.runtime.rules import Option, described

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Owner = TypeVar("Owner", bound="DataclassInstance")

ENVIRONMENT = "KVX_"
FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def spelling(name: str, option: Option) -> str:
    """How an option is spelled in arguments: as on the command line, with underscores."""
    flag = max(option.flags, key=len) if option.flags else name
    return flag.partition("/")[0].lstrip("-").replace("-", "_")


def spellings(owner: type, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """The options of a dataclass by their spellings."""
    found = {spelling(name, option): name for name, option in described(owner).items() if not option.hidden}
    return {spelled: name for spelled, name in found.items() if name not in but}


def options_of(
    owner: type[Owner], arguments: Mapping[str, object], environment: Mapping[str, str], *, but: tuple[str, ...] = ()
) -> Owner:
    """The options of a dataclass, but for some, from arguments and, where these lack one, from the environment.

    Raises OptionError.
    """
    values: dict[str, Any] = {}
    for spelled, name in spellings(owner, but=but).items():
        told = arguments.get(spelled)
        if told is not None:
            values[name] = _value(owner, name, spelled, told, separator=",")
        elif environment.get(variable := ENVIRONMENT + spelled.upper()):
            values[name] = _value(owner, name, spelled, environment[variable], separator=None)
    return owner(**values)


def check_known(arguments: Mapping[str, object], known: Mapping[str, str]) -> None:
    """Raises OptionError where an argument is spelled as no option is."""
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        raise OptionError(
            f"There is no option {', '.join(unknown)}",
            expected=f"one of {', '.join(sorted(known))}",
            remedy="Correct the name or leave it out.",
            option=unknown[0],
        )


def _value(owner: type, name: str, spelled: str, told: object, *, separator: str | None) -> object:
    """What the dataclass gets. What cannot be read stays a text, which the dataclass refuses."""
    kind, option = _kind(owner, name), described(owner)[name]
    if option.unit is not None:
        return _times(spelled, told, option.unit)
    if kind is tuple:
        parts = told.split(separator) if isinstance(told, str) else told
        return tuple(part.strip() for part in parts if part) if isinstance(parts, list | tuple) else told
    if isinstance(told, str) and kind in READ:
        with contextlib.suppress(ValueError):
            return READ[kind](told)
    return told


def _flag(told: str) -> bool:
    if (found := FLAGS.get(told.strip().lower())) is None:
        raise ValueError(told)
    return found


READ: dict[type, Callable[[str], object]] = {bool: _flag, Path: Path, int: int, float: float}


def _kind(owner: type, name: str) -> type:
    """The type of a field, but for None: tuple, where it has several values."""
    hint = get_type_hints(owner)[name]
    if (origin := get_origin(hint)) is tuple:
        return tuple
    found: type = hint if origin is None else next(part for part in get_args(hint) if part is not type(None))
    return found


def _times(spelled: str, told: object, unit: float) -> int:
    """A number of units as the library counts. Raises OptionError."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if (count := float(str(told))) > 0:
            return max(1, int(count * unit))
    raise OptionError(
        f"{spelled} is {str(told)!r:.80}",
        expected="a number above 0",
        remedy="Correct it or leave it out.",
        option=spelled,
    )
