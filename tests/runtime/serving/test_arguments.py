"""Options from texts: spelled as `kvx serve` spells them, read from arguments before the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx import OptionError
from kvx.runtime.serving.arguments import check_known, options_of, spellings
from kvx.runtime.serving.settings import ServeOptions


def test_every_option_has_the_spelling_of_the_command_line_with_underscores() -> None:
    pytest.importorskip("typer")
    from kvx.commands.options import Described

    on_the_command_line = {
        max(one.flags, key=len).partition("/")[0].lstrip("-").replace("-", "_"): one.name
        for one in Described(ServeOptions).parameters
    }
    assert spellings(ServeOptions) == on_the_command_line


def test_arguments_are_read_by_the_types_of_the_options() -> None:
    told = {"requests": "8", "timeout": "2.5", "quiet": "yes", "pivot": "en,de", "keys": "keys.toml", "body_kb": "0.5"}
    found = options_of(ServeOptions, told, {})
    expected = ServeOptions(
        requests=8, timeout=2.5, quiet=True, pivot=("en", "de"), keys=Path("keys.toml"), body_bytes=512
    )
    assert found == expected


def test_arguments_may_have_types_already() -> None:
    found = options_of(ServeOptions, {"requests": 8, "pivot": ["en", "de"], "quiet": True, "body_kb": 2}, {})
    assert found == ServeOptions(requests=8, pivot=("en", "de"), quiet=True, body_bytes=2048)


def test_the_environment_stands_behind_the_arguments() -> None:
    environment = {"KVX_REQUESTS": "8", "KVX_PIVOT": "en de", "KVX_TEXTS": "5", "KVX_BEAMS": ""}
    found = options_of(ServeOptions, {"texts": "7"}, environment)
    assert found == ServeOptions(requests=8, pivot=("en", "de"), texts=7)


def test_options_that_are_left_out_are_not_read() -> None:
    assert options_of(ServeOptions, {}, {"KVX_PORT": "none", "KVX_HOST": "x"}, but=("port", "host")) == ServeOptions()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("requests", "many"),
        ("requests", "0"),
        ("quiet", "perhaps"),
        ("timeout", "soon"),
        ("body_kb", "-1"),
        ("cors", 3),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name: str, told: object) -> None:
    with pytest.raises(OptionError, match=name):
        options_of(ServeOptions, {name: told}, {})


def test_an_argument_that_is_no_option_is_refused() -> None:
    with pytest.raises(OptionError, match="no option reqests"):
        check_known({"reqests": "8"}, spellings(ServeOptions))
