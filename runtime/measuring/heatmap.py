"""Attention as one HTML page.

Letters: T target tokens, S source positions, which are bos, the pieces of the source, and eos.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape

from kvx.runtime.arrays import FloatArray
from kvx.runtime.errors import InputError
from kvx.runtime.measuring.page import DIGIT, STYLE, SVG_NAMESPACE, page

CELL = 28  # in units of the SVG
GAP = 8
SLANT = 0.71  # labels of columns rise at 45°
LONGEST_LABEL = 20
FAINTEST = 0.005
LEGEND = (0.05, 0.25, 0.5, 0.75, 1.0)
LEGEND_HEIGHT = 48
OWN_STYLE = """
.heat svg { margin-top: 24px; }
.back { fill: none; stroke: var(--grid); }
.cell { fill: var(--first); }
.most { fill: none; stroke: var(--second); stroke-width: 2; }
"""


def attention_html(
    attention: FloatArray,
    source_pieces: Sequence[str],
    target_pieces: Sequence[str],
    title: str,
    *,
    around: tuple[Sequence[str], Sequence[str]] = (("bos",), ("eos",)),
) -> str:
    """attention [T, S], source pieces with what stands `around` them, S together, and T target pieces → a page with a
    row for each target token, from top to bottom, and a column for each source position. The stronger the colour, the
    more of the row's attention; its most is framed.

    Raises InputError where the numbers do not agree.
    """
    before, after = around
    columns = (*before, *source_pieces, *after)
    expected = (len(target_pieces), len(columns))
    if attention.shape != expected or not target_pieces:
        raise InputError(
            f"The attention has the shape {list(attention.shape)}",
            expected=f"{list(expected)}: a row for each target piece, columns for {', '.join((*before, ''))}"
            f"{len(source_pieces)} source pieces{' and '.join(('', *after))}",
            remedy="Give the pieces of the sentence that the attention belongs to.",
        )
    drawn = _Drawing([_label(piece) for piece in columns], [_label(piece) for piece in target_pieces])
    lines = itertools.chain(drawn.axes(), drawn.cells(attention), drawn.legend())
    body = f"""<p>Rows: target tokens. Columns: source pieces. The frame is where a token looks most.</p>
<div class="heat">
<svg xmlns="{SVG_NAMESPACE}" viewBox="0 0 {drawn.width} {drawn.height}" style="max-width: {drawn.width}px"
 role="img" aria-label="{escape(title)}">
{chr(10).join(lines)}
</svg>
</div>"""
    return page(escape(title), body, STYLE + OWN_STYLE)


class _Drawing:
    """The places of columns and rows, whose labels stand above and to the left."""

    def __init__(self, columns: Sequence[str], rows: Sequence[str]) -> None:
        self._columns, self._rows = columns, rows
        self._left = GAP + DIGIT * max(map(len, rows))
        slanted = round(SLANT * DIGIT * max(map(len, columns)))
        self._top = GAP + slanted + CELL // 2
        self._right, self._bottom = self._left + CELL * len(columns), self._top + CELL * len(rows)
        self.width = max(self._right + slanted, self._left + 2 * CELL * len(LEGEND)) + GAP
        self.height = self._bottom + LEGEND_HEIGHT

    def axes(self) -> Iterator[str]:
        """The labels, and the frame around all cells."""
        for number, label in enumerate(self._columns):
            x, y = self._left + CELL * (number + 0.5), self._top - GAP
            yield f'<text transform="translate({x:g} {y:g}) rotate(-45)">{escape(label)}</text>'
        for number, label in enumerate(self._rows):
            yield _text(self._left - GAP, self._top + CELL * (number + 0.5) + 4, label, "end")
        width, height = self._right - self._left, self._bottom - self._top
        yield f'<rect class="back" x="{self._left}" y="{self._top}" width="{width}" height="{height}"/>'

    def cells(self, attention: FloatArray) -> Iterator[str]:
        """A square for every weight that can be seen, the most of each row framed."""
        for row, weights in enumerate(attention.tolist()):
            most = max(range(len(weights)), key=weights.__getitem__)
            for column, weight in enumerate(weights):
                x, y = self._left + CELL * column, self._top + CELL * row
                if weight >= FAINTEST:
                    about = f"{self._rows[row]} ← {self._columns[column]}: {weight:.2f}"
                    yield _square("cell", x, y, weight, about)
                if column == most:
                    yield _square("most", x, y)

    def legend(self) -> Iterator[str]:
        """What a shade stands for."""
        for number, weight in enumerate(LEGEND):
            x, y = self._left + 2 * CELL * number, self._bottom + GAP
            yield _square("cell", x, y, weight, side=CELL // 2)
            yield _text(x + CELL // 2 + 4, y + 12, f"{weight:g}", "start")


def _square(css: str, x: float, y: float, weight: float = 1.0, about: str = "", side: int = CELL - 2) -> str:
    inside = f"<title>{escape(about)}</title>" if about else ""
    place = f'x="{x + 1}" y="{y + 1}" width="{side}" height="{side}"'
    return f'<rect class="{css}" {place} fill-opacity="{weight:.3f}">{inside}</rect>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _label(piece: str) -> str:
    """A piece as it can be read: cut where it is long, what cannot be drawn replaced."""
    drawable = "".join(character if character.isprintable() else "�" for character in piece)
    return drawable if len(drawable) <= LONGEST_LABEL else drawable[: LONGEST_LABEL - 1] + "…"
