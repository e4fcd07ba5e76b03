"""Requests on their way to the decoder, longest first within a window, and back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvx.runtime.decoding.backend import Candidates
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.supply import Supply

WINDOWS_AHEAD = 4


@dataclass(slots=True)
class RequestQueue:
    """Reads requests from a `supply`, a `window` at a time, and holds them in order until they are finished and taken.

    Those that the `candidates` do not know come last in their window, as they are not decoded beside the others.
    Nothing more is read once `cancelled` has answered true, but for the first window.
    """

    supply: Supply[Request]
    window: int
    candidates: Candidates | None
    cancelled: Cancelled
    exhausted: bool = False
    _held: deque[Request] = field(default_factory=deque)
    _begun: bool = False

    def sentences(self) -> Iterator[Request]:
        """Requests for the decoder, after waiting for the first. Ends early, so that what is finished can leave: where
        no more are at hand, after a window of nothing but empty texts, and where one slow sentence has kept back too
        many others.
        """
        window = self._read_window(wait=True)
        while window:
            with_pieces = [request for request in window if request.ids]
            if not with_pieces:
                return
            yield from sorted(with_pieces, key=self._rank, reverse=True)
            full = len(self._held) > self.window * (WINDOWS_AHEAD - 1)
            window = [] if full else self._read_window(wait=False)

    def finished(self) -> Iterator[Request]:
        """The requests that are finished and whose turn it is."""
        while self._held and self._held[0].finished:
            yield self._held.popleft()

    def _rank(self, request: Request) -> tuple[bool, int]:
        return self.candidates is None or self.candidates.knows(request.ids), len(request.ids)

    def _read_window(self, *, wait: bool) -> list[Request]:
        over = self._begun and self.cancelled()
        self._begun = True
        window = self.supply.rest() if over else self.supply.take(self.window, wait=wait)
        self.exhausted = self.supply.exhausted
        self._held.extend(window)
        return window
