"""Runs of HTML: text and tags between two blocks → the sentences in which there are tags."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from kvx.runtime.text.passages import UNSPACED, Fits, sentence_spans
from kvx.runtime.text.wholes import Element, Place, Tag, Whole, is_of_word

INLINE_NAMES = "a abbr b bdi bdo big cite del dfn em font i ins label mark q s small span strong sub sup time tt u"
BREAK_NAMES = (
    "address article aside blockquote body br caption center col colgroup dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html iframe legend li main math "
    "menu nav noscript ol optgroup option p pre search section select summary svg table tbody td template tfoot th "
    "thead title tr ul"
)
INLINE = frozenset(INLINE_NAMES.split())
BREAKS = frozenset(BREAK_NAMES.split())  # tags that no sentence goes across
OTHER = -1  # the number of a tag that is of no flat element
RUN = re.compile(" {2,}")


class Stretch(NamedTuple):
    """Text of a run that belongs to a gap: from `start` to `end` of the run. The first character of its text node
    stands at `node` of the run, and `places` tells where each character is written in the markup, if there are
    entities. It begins at `written` of the text node and at `place` of the passage.
    """

    start: int
    end: int
    place: Place
    written: int
    node: int
    places: Sequence[int] | None

    def at(self, position: int) -> Place:
        """The place of a position of the run."""
        own = position - self.node
        return Place(self.place.gap, self.place.at + (self.places[own] if self.places else own) - self.written)


class Piece(NamedTuple):
    """The sentence of this number of a passage, in one text node, and where it stands in the run."""

    number: int
    start: int
    end: int


class Mark(NamedTuple):
    """A tag or other markup before this position of a run: of the element of this number, or of OTHER."""

    at: int
    element: int
    start: Place
    end: Place


class _Pair(NamedTuple):
    """An element without other markup in it: what its text without white space around it is of the run, and the number
    of its first mark.
    """

    start: int
    end: int
    mark: int


class Run:
    """What a browser shows as one text: text nodes and the tags between them, as they are read."""

    def __init__(self) -> None:
        self.size = 0
        self._lines: list[str] = []
        self._stretches: list[Stretch] = []
        self._pieces: list[Piece] = []
        self._marks: list[Mark] = []

    def add(self, line: str, stretches: Sequence[Stretch], pieces: Sequence[Piece]) -> None:
        """A text node. Its stretches are one more than its pieces."""
        self._lines.append(line)
        self._stretches += stretches
        self._pieces += pieces
        self.size += len(line)

    def mark(self, element: int, start: Place, end: Place) -> None:
        """A tag or other markup."""
        self._marks.append(Mark(self.size, element, start, end))

    def wholes(self, language: str | None, fits: Fits) -> Iterator[Whole]:
        """The sentences of several pieces whose elements are complete, not nested and not empty. There is no other
        markup in them.
        """
        text = "".join(self._lines)
        pairs = list(_pairs(text, self._marks))
        if pairs and len(self._pieces) > 1:
            finished = _Finished(text, self._stretches, self._pieces, self._marks, pairs)
            for start, end in sentence_spans(text, language, fits):
                whole = finished.whole(start, end)
                if whole is not None:
                    yield whole


def _pairs(text: str, marks: Sequence[Mark]) -> Iterator[_Pair]:
    for number, (opening, closing) in enumerate(itertools.pairwise(marks)):
        if opening.element == closing.element != OTHER:
            inside = text[opening.at : closing.at]
            if inside and not inside.isspace():
                start = closing.at - len(inside.lstrip())
                yield _Pair(start, start + len(inside.strip()), number)


Found = TypeVar("Found", Piece, _Pair)


@dataclass(frozen=True, slots=True)
class _Finished:
    """A run that is read, and what is looked up in it."""

    text: str
    stretches: Sequence[Stretch]
    pieces: Sequence[Piece]
    marks: Sequence[Mark]
    pairs: Sequence[_Pair]

    def whole(self, start: int, end: int) -> Whole | None:
        """The sentence from start to end, where it is one of those that `Run.wholes` gives."""
        pieces = self._within(self.pieces, start, end)
        pairs = self._within(self.pairs, start, end)
        if pieces is None or pairs is None or len(pieces) < 2 or not pairs or self._has_other(pairs, start, end):
            return None
        numbers = {(piece.start, piece.end): piece.number for piece in pieces}
        if any(pair[:2] not in numbers for pair in pairs) or self._has_two_spaces(pairs):
            return None
        first, last = pairs[0], pairs[-1]
        opening, closing = self.marks[first.mark], self.marks[last.mark + 1]
        return Whole(
            RUN.sub(" ", self.text[start:end]),
            opening.start if first.start == start else self._start(start),
            closing.end if last.end == end else self._end(end),
            tuple(Element(numbers[pair[:2]], *self._tags(pair, start, end)) for pair in pairs),
            " " if first.start == start > opening.at else "",
            " " if last.end == end < closing.at else "",
        )

    def _within(self, all_of_them: Sequence[Found], start: int, end: int) -> Sequence[Found] | None:
        """Those from start to end; None where one is only partly there."""
        first = bisect_left(all_of_them, start, key=lambda one: one.start)
        after = bisect_left(all_of_them, end, key=lambda one: one.start)
        is_cut = first > 0 and all_of_them[first - 1].end > start
        is_cut |= after > first and all_of_them[after - 1].end > end
        return None if is_cut else all_of_them[first:after]

    def _has_other(self, pairs: Sequence[_Pair], start: int, end: int) -> bool:
        """Whether there is a mark between start and end that is of none of these pairs."""
        first = bisect_right(self.marks, start, key=lambda mark: mark.at)
        after = bisect_left(self.marks, end, key=lambda mark: mark.at)
        own = [mark for pair in pairs for mark in self.marks[pair.mark : pair.mark + 2]]
        return after - first != sum(start < mark.at < end for mark in own)

    def _has_two_spaces(self, pairs: Sequence[_Pair]) -> bool:
        """Whether two elements meet with white space inside both: a browser shows one."""
        marks = self.marks
        return any(
            marks[left.mark + 1].at == marks[right.mark].at and left.end < marks[left.mark + 1].at < right.start
            for left, right in itertools.pairwise(pairs)
        )

    def _tags(self, pair: _Pair, start: int, end: int) -> tuple[Tag, Tag]:
        """Those of an element of the sentence from start to end."""
        text, opening, closing = self.text, self.marks[pair.mark], self.marks[pair.mark + 1]
        before = max([start, *(mark.at for mark in self.marks[max(0, pair.mark - 1) : pair.mark])])
        after = min([end, *(mark.at for mark in self.marks[pair.mark + 2 : pair.mark + 3])])
        first = Tag(
            *opening[2:],
            inside=opening.at < pair.start,
            outside=before < opening.at and text[opening.at - 1].isspace(),
            beside=_beside(text[pair.start], text[max(start, pair.start - 1) : pair.start]),
        )
        last = Tag(
            *closing[2:],
            inside=pair.end < closing.at,
            outside=closing.at < after and text[closing.at].isspace(),
            beside=_beside(text[pair.end - 1], text[pair.end : min(end, pair.end + 1)]),
        )
        return first, last

    def _start(self, position: int) -> Place:
        """Where what begins at this position of the run begins."""
        return self.stretches[bisect_right(self.stretches, position, key=lambda one: one.start) - 1].at(position)

    def _end(self, position: int) -> Place:
        """Where what ends at this position of the run ends."""
        return self.stretches[bisect_left(self.stretches, position, key=lambda one: one.end)].at(position)


def _beside(own: str, other: str) -> str:
    """The character next to one, where both are of one word."""
    is_word = bool(other) and is_of_word(own) and is_of_word(other)
    return other if is_word and UNSPACED.match(own) is None and UNSPACED.match(other) is None else ""
