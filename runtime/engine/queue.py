"""Requests on their way to the decoder, longest first within a window, and back in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvx.runtime.decoding.backend import Candidates
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.engine.request import Request
from kvx.runtime.errors import InputError

WINDOWS_AHEAD = 4


@dataclass(slots=True)
class RequestQueue:
    """Reads `requests` a `window` at a time and holds them, in order, until they are finished and taken.

    Those that the `candidates` do not know come last in their window, as they are not decoded beside the others.
    Nothing is read once `cancelled` has answered true, but for the first window. An `error` in reading ends it.
    """

    requests: Iterator[Request]
    window: int
    candidates: Candidates | None
    cancelled: Cancelled
    exhausted: bool = False
    error: InputError | None = None
    _held: deque[Request] = field(default_factory=deque)
    _begun: bool = False

    def sentences(self) -> Iterator[Request]:
        """Requests for the decoder. Ends early, so that what is finished can leave, after a window of nothing but empty
        texts, and where one slow sentence has kept back too many others.
        """
        while len(self._held) <= self.window * (WINDOWS_AHEAD - 1) and (window := self._read_window()):
            with_pieces = [request for request in window if request.ids]
            if not with_pieces:
                return
            yield from sorted(with_pieces, key=self._rank, reverse=True)

    def finished(self) -> Iterator[Request]:
        """The requests that are finished and whose turn it is."""
        while self._held and self._held[0].finished:
            yield self._held.popleft()

    def _rank(self, request: Request) -> tuple[bool, int]:
        return self.candidates is None or self.candidates.knows(request.ids), len(request.ids)

    def _read_window(self) -> list[Request]:
        window: list[Request] = []
        if self._begun and self.cancelled():
            self.exhausted = True
            return window
        self._begun = True
        try:
            for request in itertools.islice(self.requests, self.window):
                window.append(request)
        except InputError as error:
            self.error = error
        self.exhausted = len(window) < self.window
        self._held.extend(window)
        return window
