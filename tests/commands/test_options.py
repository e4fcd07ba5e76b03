"""Options of commands from descriptions, on a small class that has one of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from kvx.commands.options import Described, spelled, with_described_options
from kvx.runtime.errors import OptionError
from kvx.runtime.rules import Option, Rule, choice, count, flag, number, path, refuse, text, wrong_values

Guests = Annotated[list[str] | None, typer.Argument(help="Who comes.")]
Flavour = Literal["sweet", "sour"]
SPICES = Rule("a tuple of texts", lambda value: True)
SIZES = Rule("a tuple of counts", lambda value: True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: Annotated[str, Option(text(), "What it is called.")]
    eggs: Annotated[int | None, Option(count(12), "How many eggs go in.", unset="as many as there are")] = None
    flavour: Annotated[Flavour, Option(choice(("sweet", "sour")), "What it tastes of.")] = "sweet"
    salt: Annotated[float, Option(number(0, 1), "How much salt goes in.", flags=("-s", "--salt"))] = 0.5
    baked: Annotated[bool, Option(flag(), "Whether it is baked.", flags=("--with-oven",))] = False
    stirred: Annotated[bool | None, Option(flag(), "Whether it is stirred.")] = None
    book: Annotated[str | Path | None, Option(path(), "Where it stands.")] = None
    spices: Annotated[tuple[str | int, ...], Option(SPICES, "A spice.", flags=("--spice",))] = ()
    sizes: Annotated[tuple[int, ...], Option(SIZES, "The sizes of the pans.")] = (20, 26)
    grams: Annotated[int | None, Option(count(10**6), "Its weight in kg.", flags=("--kg",), unit=1000)] = None
    secret: Annotated[int, Option(count(), "What nobody is told.", hidden=True)] = 7
    notes: str = "described nowhere"

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


def app_of(*groups: Described) -> tuple[typer.Typer, list[Any]]:
    """A command with these groups of options, and what it has been called with."""
    app, calls = typer.Typer(rich_markup_mode=None, add_completion=False), []

    def cook(*, guests: Guests = None, one: object, other: object) -> None:
        """Cook."""
        calls.append((guests, one, other))

    cook.__annotations__ |= {"one": Annotated[object, groups[0]], "other": Annotated[object, groups[-1]]}
    app.command()(with_described_options(cook))
    return app, calls


def cooked(*arguments: str) -> Recipe:
    app, calls = app_of(Described(Recipe))
    found = CliRunner().invoke(app, ["--name", "soup", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    [(_, recipe, _)] = calls
    assert isinstance(recipe, Recipe)
    return recipe


def shown(*groups: Described) -> Result:
    return CliRunner().invoke(app_of(*groups)[0], ["--help"], terminal_width=200)


def test_nothing_given_is_the_default() -> None:
    assert cooked() == Recipe(name="soup")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--eggs", "3"], {"eggs": 3}),
        (["--flavour", "sour"], {"flavour": "sour"}),
        (["-s", "0.25"], {"salt": 0.25}),
        (["--salt", "1"], {"salt": 1.0}),
        (["--with-oven"], {"baked": True}),
        (["--stirred"], {"stirred": True}),
        (["--no-stirred"], {"stirred": False}),
        (["--book", "a/b"], {"book": Path("a/b")}),
        (["--spice", "salt", "--spice", "pepper"], {"spices": ("salt", "pepper")}),
        (["--sizes", "1, 2,3"], {"sizes": (1, 2, 3)}),
        (["--sizes", ""], {"sizes": ()}),
        (["--kg", "1.5"], {"grams": 1500}),
        (["--kg", "0.0001"], {"grams": 1}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_given_is_the_librarys_value(arguments: list[str], expected: dict[str, Any]) -> None:
    assert cooked(*arguments) == Recipe(name="soup", **expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--secret", "1"],
        ["--notes", "x"],
        ["--grams", "1"],
        ["--spices", "x"],
        ["--no-with-oven"],
        ["--flavour", "salty"],
        ["--eggs", "x"],
    ],
    ids=" ".join,
)
def test_what_is_no_option_is_a_usage_error(arguments: list[str]) -> None:
    found = CliRunner().invoke(app_of(Described(Recipe))[0], ["--name", "soup", *arguments])
    assert found.exit_code == 2
    assert "Usage: " in found.stderr


def test_a_field_without_a_default_is_required() -> None:
    found = CliRunner().invoke(app_of(Described(Recipe))[0], [])
    assert found.exit_code == 2
    assert "--name" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--eggs", "13"], "`eggs` is 13"),
        (["--kg", "-1"], "`grams` is -1. Expected a number above 0"),
        (["--kg", "nan"], "`grams` is nan"),
        (["--kg", "1e30"], "`grams` is"),
        (["--sizes", "1,x"], "`sizes` is 1,x. Expected numbers with commas"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_values_are_the_librarys_errors(arguments: list[str], mention: str) -> None:
    with pytest.raises(OptionError) as refused:
        cooked(*arguments)
    assert mention in str(refused.value)


def test_help_tells_what_an_option_is_for_and_its_default() -> None:
    text = " ".join(shown(Described(Recipe)).stdout.split())
    for line in (
        "--name <str> What it is called. [required]",
        "--eggs <int> How many eggs go in. [default: as many as there are]",
        "--flavour <sweet|sour> What it tastes of. [default: sweet]",
        "-s, --salt <float> How much salt goes in. [default: 0.5]",
        "--with-oven Whether it is baked.",
        "--stirred / --no-stirred Whether it is stirred.",
        "--book <path> Where it stands.",
        "--spice <str> A spice.",
        "--sizes <str> The sizes of the pans. [default: 20,26]",
        "--kg <float> Its weight in kg.",
    ):
        assert line in text
    assert "secret" not in text


def test_some_of_the_options_are_taken_as_they_are_given() -> None:
    app, calls = app_of(Described(Recipe, only=("eggs", "spices"), build=False))
    assert CliRunner().invoke(app, ["--eggs", "2", "--spice", "salt", "ann"]).exit_code == 0
    given = {"eggs": 2, "spices": ("salt",)}
    assert calls == [(["ann"], given, given)]
    assert "--name" not in shown(Described(Recipe, but=("name",))).stdout


def test_an_option_of_two_groups_is_one_option_and_reaches_both() -> None:
    app, calls = app_of(
        Described(Recipe, only=("eggs",), build=False), Described(Recipe, only=("salt", "eggs"), build=False)
    )
    assert CliRunner().invoke(app, ["--eggs", "2", "--salt", "0.1"]).exit_code == 0
    assert calls == [(None, {"eggs": 2}, {"salt": 0.1, "eggs": 2})]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "`max_new_tokens` is 5. Expected more for `max_new_tokens`",
            "--max-new-tokens is 5. Expected more for --max-new-tokens",
        ),
        ("`cache_bytes` is 0", "--cache-mb is 0"),
        ("`window` is 0, see `kvx export`", "`window` is 0, see `kvx export`"),
        ("no `max_new_tokens", "no `max_new_tokens"),
    ],
)
def test_errors_name_options_as_the_command_line_spells_them(message: str, expected: str) -> None:
    assert spelled(message, {"max_new_tokens": "--max-new-tokens", "cache_bytes": "--cache-mb"}) == expected
