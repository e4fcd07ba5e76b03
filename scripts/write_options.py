"""Writes docs/options.md, every option of every command, from the commands themselves.

python scripts/write_options.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from kvx.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
VALUE = re.compile(r"(?P<names>.+?)(?: (?P<value><.*>))?")
NOTES = re.compile(r"  \[([^\]]*)\]")
DEFAULT = re.compile(r"default: (.*)", re.DOTALL)
HEADER = ("Option", "Value", "Default", "What it does")
INTRODUCTION = """\
# Options

`kvx COMMAND --help` prints what this page lists. The library takes the options of a translation by the names of
`kvx translate`, with `_` in place of `-`, as in `translator.translate(texts, beam_size=4)`. Some have another name:
`--ban` is `banned`, `--cache-mb` is `cache_bytes`, in bytes, `--prefix-file` is `prefixes`, and `--alternatives` is
the method `alternatives`. `--backend`, `--device`, `--threads`, `--workers` and `--spin` are arguments of
`Translator.load`.

This page is written by `scripts/write_options.py`.
"""


class Row(NamedTuple):
    """An argument or option: its names, the kind of value, the default, and what it is for."""

    names: str
    value: str
    default: str
    help: str


def options_page() -> str:
    """The page as Markdown."""
    sections = ["\n".join(_section(path, command)) for path, command in commands()]
    return "\n".join([INTRODUCTION, *(f"{section}\n" for section in sections)])


def commands() -> Iterator[tuple[str, Any]]:
    """Every command, which may be a group, with its words: ("kvx translate", the command)."""
    yield from _with_members("kvx", typer.main.get_command(app))


def rows_of(path: str, command: Any) -> list[Row]:  # noqa: ANN401  # Typer keeps its commands' type to itself
    """What a command takes, in the order of its help."""
    context = typer.Context(command, info_name=path)
    records = [parameter.get_help_record(context) for parameter in command.params]
    return [_row(*record) for record in records if record is not None]


def _with_members(path: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    yield path, command
    for name, member in getattr(command, "commands", {}).items():
        yield from _with_members(f"{path} {name}", member)


def _row(names: str, text: str) -> Row:
    notes = NOTES.findall(text)
    defaults = [found[1] for found in map(DEFAULT.search, notes) if found]
    found = VALUE.fullmatch(names)
    assert found
    default = "required" if "required" in notes else "".join(defaults)
    return Row(found["names"], found["value"] or "", default, NOTES.sub("", text))


def _section(path: str, command: Any) -> Iterator[str]:  # noqa: ANN401
    yield f"## `{path}`\n"
    yield command.help.strip() + "\n"
    rows = rows_of(path, command)
    if rows:
        yield _line(HEADER)
        yield "|---|---|---|---|"
    for row in rows:
        value = f"`{row.value}`" if row.value else ""
        yield _line((f"`{row.names}`", value, row.default.replace("<", "&lt;"), row.help.replace("<", "&lt;")))


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
