"""Texts on their way to the decoder, with what is given of their translations, and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.rows import Source
from kvx.runtime.errors import InputError
from kvx.runtime.shortlist.candidates import Shortlist
from kvx.runtime.text.sources import SourceText
from kvx.runtime.translation import Translation

WINDOWS_AHEAD = 4

Text = TypeVar("Text")
Prefix = TypeVar("Prefix")


class Request(NamedTuple):
    """A text as the encoder takes it, and the target ids that are given."""

    text: SourceText
    prefix: tuple[int, ...]


def paired(texts: Iterable[Text], prefixes: Iterable[Prefix]) -> Iterator[tuple[Text, Prefix]]:
    """Each text with its prefix. Raises InputError where there are more of one than of the other."""
    given, nothing = iter(prefixes), object()
    for number, text in enumerate(texts, 1):
        prefix = next(given, nothing)
        if prefix is nothing:
            raise _miscounted(f"{number - 1} prefixes and more texts", number)
        yield text, prefix  # type: ignore[misc]  # no prefix is the object that stands for none
    if next(given, nothing) is not nothing:
        raise _miscounted("more prefixes than texts", None)


@dataclass(slots=True)
class RequestQueue:
    """Texts on their way to the decoder, longest first within a window, and their translations back in order.

    Each of them has so many `targets`; one without a piece is `nothing`. Those that a shortlist does not know come
    last, as they are not decoded beside the others.
    """

    requests: Iterator[Request]
    targets: int
    window: int
    nothing: Translation
    shortlist: Shortlist | None
    cancelled: Cancelled
    exhausted: bool = False
    error: InputError | None = None
    _under_way: dict[int, Request] = field(default_factory=dict)
    _targets: dict[int, dict[int, tuple[Translation, ...]]] = field(default_factory=dict)
    _finished: dict[int, Translation] = field(default_factory=dict)
    _read: int = 0
    _given: int = 0

    def sources(self) -> Iterator[Source]:
        """Sentences for the decoder. Ends early, so that what is finished can leave, after a window of nothing but
        empty texts, and where one slow sentence has kept back too many others.
        """
        while self._read - self._given <= self.window * (WINDOWS_AHEAD - 1) and (window := self._read_window()):
            sources = [
                Source(index, request.text.ids, (request.prefix,) * self.targets)
                for index, request in window
                if request.text.ids
            ]
            if not sources:
                return
            yield from sorted(sources, key=self._rank, reverse=True)

    def request(self, index: int) -> Request:
        """The text with this index, while it is under way."""
        return self._under_way[index]

    def finish(self, index: int, target: int, found: tuple[Translation, ...]) -> None:
        """Takes the translations of one target of text `index`."""
        targets = self._targets.setdefault(index, {})
        targets[target] = found
        if len(targets) == self.targets:
            first, *others = itertools.chain.from_iterable(targets[number] for number in sorted(targets))
            self._finished[index] = replace(first, others=tuple(others))
            del self._targets[index], self._under_way[index]

    def in_order(self) -> Iterator[Translation]:
        """The translations that are finished and whose turn it is."""
        while self._given in self._finished:
            yield self._finished.pop(self._given)
            self._given += 1

    def _rank(self, source: Source) -> tuple[bool, int]:
        return self.shortlist is None or self.shortlist.knows(source.ids), len(source.ids)

    def _read_window(self) -> list[tuple[int, Request]]:
        window: list[tuple[int, Request]] = []
        if self._read and self.cancelled():
            self.exhausted = True
            return window
        try:
            for request in itertools.islice(self.requests, self.window):
                window.append((self._read, request))
                self._read += 1
        except InputError as error:
            self.error = error
        self.exhausted = len(window) < self.window
        self._under_way.update((index, request) for index, request in window if request.text.ids)
        self._finished.update((index, self.nothing) for index, request in window if not request.text.ids)
        return window


def _miscounted(got: str, line: int | None) -> InputError:
    return InputError(got, expected="a prefix for each text", remedy="Check that both belong together.", line=line)
