"""Sentences with elements in them: where the elements go in a translation that was made without them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # written without spaces between words
SHORTEST_HAN = 2  # characters of a word of Han that is certainly the same word


class Place(NamedTuple):
    """Before this character of this gap of a passage, both from 0. Sentence n stands between gaps n and n + 1."""

    gap: int
    at: int


class Tag(NamedTuple):
    """A tag from its start to its end. White space is `inside` the element beside it, `outside`, both or neither.
    `beside`: the letter of the same word on its other side, if the tag stands within a word.
    """

    start: Place
    end: Place
    inside: bool = False
    outside: bool = False
    beside: str = ""


class Element(NamedTuple):
    """An element around the sentence of this number of a passage."""

    number: int
    opening: Tag
    closing: Tag


class _Placed(NamedTuple):
    start: int
    end: int
    element: Element


@dataclass(frozen=True, slots=True)
class Whole:
    """A sentence without the tags in it. It stands from `start` to `end`, and contains these elements, one after the
    other. `before` and `after`: white space at its ends that is inside of an element.
    """

    text: str
    start: Place
    end: Place
    elements: tuple[Element, ...]
    before: str = ""
    after: str = ""

    def written(
        self,
        translation: str,
        sentences: Sequence[str],
        translations: Sequence[str],
        between: Callable[[Place, Place], str],
        escape: Callable[[str], str],
    ) -> str | None:
        """Its translation with the elements in it, or None where their places are not certain.

        A place is certain where the translation of the element's own text, one of the `translations` of all
        `sentences`, occurs once in that of the whole. White space and punctuation at its end do not count, nor does
        case. `between` gives the markup between two places.
        """
        text = f"{self.before}{translation}{self.after}"
        places = self._places(text, sentences, translations)
        if places is None:
            return None
        parts, at = list[str](), 0
        for start, end, element in places:
            opening, closing = element.opening, element.closing
            first = start - 1 if opening.inside and start > at and text[start - 1].isspace() else start
            parts += escape(text[at:first]), text[first:start] if opening.outside else ""
            at = end + 1 if closing.inside and text[end : end + 1].isspace() else end
            parts += between(opening.start, opening.end), escape(text[first:at]), between(closing.start, closing.end)
            parts.append(text[end:at] if closing.outside else "")
        return "".join((*parts, escape(text[at:])))

    def _places(self, text: str, sentences: Sequence[str], translations: Sequence[str]) -> list[_Placed] | None:
        """Where each element begins and ends in a translation, in the order of the translation."""
        folded, found = _folded(text), list[_Placed]()
        for element in self.elements:
            span = _span(text, folded, element, sentences[element.number], translations[element.number])
            if span is None:
                return None
            found.append(_Placed(*span, element))
        found.sort(key=lambda one: (one.start, one.end))
        return found if all(left.end <= right.start for left, right in itertools.pairwise(found)) else None


def _span(text: str, folded: str, element: Element, sentence: str, translation: str) -> tuple[int, int] | None:
    """The only place of an element's translation in a text; None where there is none or another one."""
    words = translation.strip()
    core = _without_end(words)
    if not core:
        return None
    left, right = element.opening.beside, element.closing.beside
    needle, found, at = _folded(f"{left}{core}{right}"), list[int](), -1
    while (at := folded.find(needle, at + 1)) >= 0:
        end = at + len(needle)
        if (left or _is_edge(text, at, core)) and (right or _is_edge(text, end, core)):
            if found:
                return None
            found.append(at)
    if not found:
        return None
    start = found[0] + len(left)
    end = start + len(core)
    return start, end + _common(text[end:], words[len(core) :]) if _without_end(sentence) != sentence else end


def _without_end(text: str) -> str:
    """A text without the punctuation and white space at its end."""
    size = len(text)
    while size and not is_of_word(text[size - 1]):
        size -= 1
    return text[:size]


def _common(text: str, tail: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, tail, strict=False)))


def _is_edge(text: str, at: int, core: str) -> bool:
    """Whether a word begins or ends here."""
    left, right = text[at - 1 : at] if at else "", text[at : at + 1]
    if not (left and right and is_of_word(right) and (is_of_word(left) or _is_mark(right))):
        return True
    return len(core) >= SHORTEST_HAN and not _is_mark(right) and any(map(HAN.match, (left, right)))


def is_of_word(character: str) -> bool:
    """Whether it is a letter, a digit, or a mark on one."""
    return character.isalnum() or _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _folded(text: str) -> str:
    """Without case, character by character."""
    return "".join(folded if len(folded := one.casefold()) == 1 else one for one in text)
