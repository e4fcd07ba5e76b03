"""docs/options.md says what the commands say."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from kvx.cli import app
from kvx.scripts.write_options import NOTES, PAGE, commands, options_page, rows_of

COMMANDS = list(commands())
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
OF_EVERY_COMMAND = {"-h", "--help"}


def words(text: str) -> str:
    """The text without what a page or a terminal makes of it."""
    return " ".join(html.unescape(text.replace("\\|", "|")).split())


def section(path: str) -> str:
    """What the page says of a command."""
    return PAGE.read_text(encoding="utf-8").split(f"## `{path}`\n")[1].split("\n## ")[0]


def printed(path: str) -> str:
    """Its help as it is printed where no line has to be broken."""
    return CliRunner().invoke(app, [*path.split()[1:], "--help"], prog_name="kvx", terminal_width=1000).stdout


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run scripts/write_options.py"


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_the_help_of_a_command_says_what_the_page_says(path: str, command: Any) -> None:  # noqa: ANN401
    text, page = words(printed(path)), words(section(path))
    for row in rows_of(path, command):
        assert words(f"{row.names} {row.value} {row.help}") in text
        assert f"`{row.names}`" in page
        assert words(row.help) in page
        if row.default:
            assert words(row.default) in text
            assert words(row.default) in page


@pytest.mark.parametrize("path", [path for path, _ in COMMANDS])
def test_every_flag_and_sentence_of_the_help_is_on_the_page(path: str) -> None:
    text, page = printed(path), section(path)
    assert set(FLAG.findall(text)) - OF_EVERY_COMMAND <= set(FLAG.findall(page))
    listed = text.split("\nOptions:\n")[1].split("\nCommands:\n")[0].splitlines()
    helps = [found[1] for found in (re.search(r" {2,}(\S[^ ]* .*)", line[4:]) for line in listed) if found]
    assert [one for one in helps if words(NOTES.sub("", one)) not in words(page)] == ["Show this message and exit."]
