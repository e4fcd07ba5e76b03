"""What the library describes once becomes the options of commands, so that no option is spelled twice.

    def bench(bundle: BundleArgument, machine: Annotated[MachineOptions, Described(MachineOptions)]) -> None: ...

A tuple of texts is an option that may be repeated; a tuple of numbers is written with commas between.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from kvx.runtime.errors import OptionError
from kvx.runtime.rules import Option, described

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BundleArgument = Annotated[Path, typer.Argument(help="The folder of a bundle, which kvx export wrote.")]
ModelOption = Annotated[
    Path | None,
    typer.Option(help="The folder of the bundle to use.  [default: the newest below ./artifacts]", show_default=False),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Write to this file instead of standard output. It appears under its name once it is complete.",
    ),
]

SEQUENCES = (tuple, Sequence)
NAMED = re.compile(r"`(\w+)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One option of a command: what Typer reads, and what the library gets for it."""

    name: str
    type: Any
    default: Any
    flags: tuple[str, ...]
    help: str
    convert: Callable[[Any], Any]

    def for_typer(self, flags: Mapping[str, str], environment: str | None = None) -> inspect.Parameter:
        """The parameter as Typer takes it from a signature; its help names other options by their flags. With
        `environment`, it is also read from there.
        """
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[
                self.type if self.default is not None else self.type | None, self._option(flags, environment)
            ],
            default=inspect.Parameter.empty if self.default is MISSING else self.default,
        )

    def _option(self, flags: Mapping[str, str], environment: str | None) -> Any:  # noqa: ANN401  # as typer.Option
        name = max(self.flags, key=len).partition("/")[0].lstrip("-").replace("-", "_").upper()
        return typer.Option(
            *self.flags,
            help=spelled(self.help, flags),
            metavar="<str>" if self.type == list[str] else None,
            envvar=None if environment is None else environment + name,
            show_envvar=False,
        )


class Described:
    """In the annotation of a command's parameter: it stands for the options that `owner`, a dataclass, describes, or
    `table`, where `types` has the types; for those of `only`, or for all `but` some. Hidden ones are the library's.

    The command gets an `owner` made of what differs from the defaults, or the values by name unless `build`.
    """

    def __init__(
        self,
        owner: type[DataclassInstance],
        *,
        table: Mapping[str, Option] | None = None,
        types: type | None = None,
        only: tuple[str, ...] = (),
        but: tuple[str, ...] = (),
        build: bool = True,
    ) -> None:
        self._owner = owner
        self._table = described(owner) if table is None else table
        self._types = types or owner
        self._names = [name for name in self._table if (name in only if only else name not in but)]
        self._build = build

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The options as parameters, in the order of the descriptions."""
        hints, defaults = _types_of(self._types), {field.name: field.default for field in fields(self._owner)}
        shown = (name for name in self._names if not self._table[name].hidden)
        return tuple(_parameter(name, hints[name], defaults.get(name), self._table[name]) for name in shown)

    def value(self, given: Mapping[str, object]) -> object:
        """What the command gets for the values that Typer read. Raises OptionError."""
        values = {one.name: one.convert(given[one.name]) for one in self.parameters if given[one.name] != one.default}
        return self._owner(**values) if self._build else values


def with_described_options(
    command: Callable[..., None] | None = None, *, environment: str | None = None
) -> Callable[..., Any]:
    """The command with the options that its Described parameters stand for, for Typer to read from its signature.

    An option that two of them have is one option, and both get its value. With `environment`, the beginning of their
    names there, options are also read from the environment.
    """
    if command is None:
        return functools.partial(with_described_options, environment=environment)
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: group for name, parameter in own.items() if (group := _group(parameter)) is not None}
    options = {one.name: one for group in reversed(groups.values()) for one in group.parameters}
    flags = {name: max(one.flags, key=len).partition("/")[0] for name, one in options.items()}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in own.items():
        if name not in groups:
            parameters[name] = parameter
            continue
        for one in groups[name].parameters:
            parameters.setdefault(one.name, options[one.name].for_typer(flags, environment))

    @functools.wraps(command)
    def call(**given: object) -> None:
        made = {name: group.value(given) for name, group in groups.items()}
        command(**made, **{name: value for name, value in given.items() if name in own and name not in made})

    call.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return call


_types_of = functools.cache(get_type_hints)  # evaluating annotations takes longer than all else here


def _group(parameter: inspect.Parameter) -> Described | None:
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Described)), None)


def spellings(app: typer.Typer, command: str | None) -> dict[str, str]:
    """How a command, or those of a group, spell their options, by name."""
    root = typer.main.get_command(app)
    chosen = getattr(root, "commands", {}).get(command)
    members = getattr(chosen, "commands", {"": chosen}).values()
    options = [option for one in members if one is not None for option in one.params if option.opts[0].startswith("-")]
    return {option.name.rstrip("_"): max(option.opts, key=len) for option in options}


def spelled(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library with the options that it names in backticks as the command line spells them."""
    return NAMED.sub(lambda found: flags.get(found[1], found[0]), message)


def _parameter(name: str, hint: object, default: object, option: Option) -> Parameter:
    kinds = _kinds(hint)
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    unset = "" if option.unset is None else f"  [default: {option.unset}]"
    kind, convert = _reading(name, kinds, option)
    if kind is bool and default is not False:
        flags = tuple(flag if "/" in flag else f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
    return Parameter(
        name=name, type=kind, default=_shown(default, option), flags=flags, help=option.help + unset, convert=convert
    )


def _kinds(hint: object) -> tuple[Any, ...]:
    """The types that an annotation allows, but for None."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return () if hint is NoneType else (hint,)


def _reading(name: str, kinds: tuple[Any, ...], option: Option) -> tuple[Any, Callable[[Any], Any]]:
    """What Typer reads for such a value, and what makes the library's value of that."""
    if option.unit is not None:
        return float, functools.partial(_times, name, option.unit)
    simple = [kind for kind in kinds if get_origin(kind) not in SEQUENCES]
    if simple:
        return next((kind for kind in (Path, str) if kind in simple), simple[0]), lambda value: value
    elements = {kind for one in kinds for part in get_args(one) if part is not ... for kind in _kinds(part)}
    if str in elements:
        return list[str], tuple
    return str, functools.partial(_numbers, name, float if float in elements else int)


def _shown(default: object, option: Option) -> object:
    """A default as it is written on the command line."""
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or None
    if option.unit is not None and isinstance(default, int | float):
        return default / option.unit
    return default


def _times(name: str, unit: float, value: float) -> int:
    """A number of units as the library counts."""
    if not 0 < value < math.inf:
        raise OptionError(
            f"`{name}` is {value:g}",
            expected="a number above 0",
            remedy="Correct it or leave it out.",
            option=name,
        )
    return max(1, int(value * unit))


def _numbers(name: str, kind: type[int] | type[float], value: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    try:
        return tuple(kind(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise OptionError(
            f"`{name}` is {value}",
            expected="numbers with commas between them",
            remedy=f"Correct `{name}`.",
            option=name,
        ) from None
