"""An option is described once, beside its field: what it may be, what it is for, how the command line spells it.

    rows: Annotated[int | None, Option(count(4096), "Rows of each worker.", unset="64, or what fits")] = None

From that description come the check of the dataclass, the option of the command line and docs/options.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

import numpy as np

from kvx.runtime.errors import OptionError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be: `expected` completes "Expected …" and is true of every value that `holds`."""

    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `help` is a sentence for people; `unset` says what None stands for; `keyword` is its name where it
    is not the field's.

    `flags` are its spellings on the command line, by default its name with dashes. `unit` is what the command
    line counts in: a value there is this many of the library's. `hidden` options are the library's alone.
    """

    rule: Rule
    help: str
    unset: str | None = None
    keyword: str | None = None
    flags: tuple[str, ...] = ()
    unit: float | None = None
    hidden: bool = False


class Problem(NamedTuple):
    """What is wrong with an option: a sentence without its full stop, and what completes "Expected …"."""

    option: str
    got: str
    expected: str


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def count(most: int = LARGEST_COUNT, *, least: int = 1) -> Rule:
    """Whole numbers from `least` to `most`."""
    end = "up" if most == LARGEST_COUNT else f"to {most}"
    return Rule(f"a whole number from {least} {end}", lambda value: is_whole(value) and least <= value <= most)


def number(least: float, most: float, *, above: bool = False) -> Rule:
    """Numbers from `least`, or `above` it, to `most`."""

    def holds(value: object) -> bool:
        if not isinstance(value, int | float | np.number) or isinstance(value, bool):
            return False
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        return bool((least < value if above else least <= value) and value <= most)

    start = f"a number {'above' if above else 'from'} {least:g}"
    return Rule(start if most == math.inf else f"{start}{' and up' if above else ''} to {most:g}", holds)


def flag() -> Rule:
    """True or False."""
    return Rule("True or False", lambda value: isinstance(value, bool))


def choice(names: Collection[str]) -> Rule:
    """One of these names."""
    listed = list(names)
    return Rule(f"{', '.join(listed[:-1])} or {listed[-1]}", lambda value: isinstance(value, str) and value in listed)


def text() -> Rule:
    """A text."""
    return Rule("a text", lambda value: isinstance(value, str))


def encodable(most: int) -> Rule:
    """A text of at most so many characters that UTF-8 can say."""

    def holds(value: object) -> bool:
        return isinstance(value, str) and len(value) <= most and is_encodable(value)

    return Rule(f"a text of valid Unicode of at most {most} characters", holds)


def is_encodable(value: str) -> bool:
    """Whether UTF-8 can say it: a str, as JSON has it too, can hold half a character."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def path() -> Rule:
    """The path of a file or folder."""
    return Rule("a path", lambda value: isinstance(value, str | Path) and "\0" not in str(value))


def described(owner: type) -> dict[str, Option]:
    """The described fields of a dataclass, by name."""
    return _described(owner)


@functools.cache
def _described(owner: Hashable) -> dict[str, Option]:
    hints = get_type_hints(owner, include_extras=True)
    found = ((name, option_of(hint)) for name, hint in hints.items())
    return {name: option for name, option in found if option is not None}


def option_of(hint: object) -> Option | None:
    """The description in an annotation, if there is one."""
    return next((part for part in get_args(hint) if isinstance(part, Option)), None)


def wrong_values(options: DataclassInstance) -> Iterator[Problem]:
    """The fields of a dataclass with values that their rules do not allow. None is allowed where it is the default."""
    rules = described(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in rules and not (value is None and field.default is None):
            option = rules[field.name]
            yield from wrong_value(option.keyword or field.name, value, option.rule)


def wrong_value(name: str, value: object, rule: Rule) -> Iterator[Problem]:
    """The problem with a value, if there is one."""
    if not rule.holds(value):
        yield Problem(name, f"`{name}` is {value!r:.80}", f"{rule.expected} for `{name}`")


def refuse(problems: Iterable[Problem]) -> None:
    """Raises one OptionError that names all problems, if there are any."""
    found = list(problems)
    if found:
        raise OptionError(
            ". ".join(dict.fromkeys(problem.got for problem in found)),
            expected="; ".join(dict.fromkeys(problem.expected for problem in found)),
            remedy="Correct or leave out what is named.",
            option=found[0].option,
        )
