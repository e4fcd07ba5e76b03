"""Markdown tables, and the units of what stands in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

MEBIBYTE = 2**20


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, text: Collection[int] = ()) -> list[str]:
    """The lines of a table whose columns are as wide as their longest cell. Columns are aligned to the right, as
    figures are, but for those whose numbers, from 0, are in `text`.
    """
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *others = (_line(row, widths, text) for row in cells)
    rule = "|".join("-" * (width + 1) + ("-" if number in text else ":") for number, width in enumerate(widths))
    return [first, f"|{rule}|", *others]


def mebibytes(count: float | None) -> str:
    """A number of bytes in MiB, or a question mark where it is not known."""
    return "?" if count is None else f"{count / MEBIBYTE:.0f} MiB"


def _line(row: Sequence[str], widths: Sequence[int], text: Collection[int]) -> str:
    aligned = (
        cell.ljust(width) if number in text else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return f"| {' | '.join(aligned)} |"
