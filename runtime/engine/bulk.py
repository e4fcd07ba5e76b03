"""Many texts, in order: a client of the engine that reads ahead and keeps its rows full."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator

from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import Decided
from kvx.runtime.engine.prepared import Prepared
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.supply import Supply
from kvx.runtime.engine.workers import Workers
from kvx.runtime.errors import own_copy

WINDOWS_AHEAD = 4
GROUPS_AHEAD = 2  # that wait for seats of a worker, so that none stays empty


class Bulk:
    """Requests of one call → the same, each when it is finished and those before it have been taken.

    A `window` of them is read ahead and submitted by falling length. Reading ends once `cancelled` has answered true,
    but for the first window.
    """

    reads_ahead = True

    def __init__(self, workers: Workers, prepared: Prepared, window: int, cancelled: Cancelled | None) -> None:
        plan, most = prepared.plan, workers.settings.workers
        self._workers = workers
        self._most_under_way = most * plan.seats + min(window, most * GROUPS_AHEAD * plan.group)
        self._window = window
        self._asked_for = cancelled
        self._stopped = False
        self._failure: BaseException | None = None
        self._held: deque[Request] = deque()
        self._sorted: deque[Request] = deque()
        self._news: queue.SimpleQueue[list[Request]] = queue.SimpleQueue()  # empty: there may be more to read
        self._under_way = 0  # targets
        self._begun = False

    @property
    def asked(self) -> bool:
        """See Owner."""
        return self._asked_for is not None

    def run(self, requests: Supply[Request]) -> Iterator[Request]:
        """The requests, in order. Raises, at once, what has gone wrong in decoding, and after those read before it an
        error in reading.
        """
        requests.tell = self._tell
        try:
            while True:
                self._read(requests)
                self._submit()
                yield from self._finished()
                if requests.exhausted and not self._held:
                    break
                if self._under_way:
                    self._hear()
        finally:
            self._stopped = True
            self._workers.withdraw(self)
            requests.rest()
        if requests.error is not None:
            raise requests.error

    def cancelled(self) -> bool:
        """See Owner: an answer that stays true once it was."""
        if not self._stopped and self._asked_for is not None and self._asked_for():
            self._stopped = True
            self._tell()
        return self._stopped

    def fail(self, error: BaseException) -> None:
        """See Owner."""
        self._failure, self._stopped = error, True
        self._tell()

    def decided(self, news: Decided) -> None:
        """See Owner: nobody follows."""

    def over(self, requests: list[Request]) -> None:
        """See Owner."""
        self._news.put(requests)

    def _tell(self) -> None:
        self._news.put([])

    def _read(self, requests: Supply[Request]) -> None:
        """Another window, where the last one is nearly submitted and not too many are held back by one slow text."""
        if requests.exhausted:
            return
        if self._begun and self.cancelled():
            self._take(requests.rest())
            return
        ahead = self._window * (WINDOWS_AHEAD - 1) if self._window > 1 else 0
        if not self._sorted and len(self._held) <= ahead:
            self._begun = True
            self._take(requests.take(self._window, wait=not self._held))

    def _take(self, window: list[Request]) -> None:
        self._held.extend(window)
        with_pieces = [request for request in window if request.ids]
        self._sorted.extend(sorted(with_pieces, key=_rank, reverse=True))

    def _submit(self) -> None:
        """As many as keep all rows busy for a while."""
        some: list[Request] = []
        while self._sorted and self._under_way < self._most_under_way:
            some.append(self._sorted.popleft())
            self._under_way += len(some[-1].targets)
        if some:
            self._workers.add(some)

    def _hear(self) -> None:
        """Waits for news, and takes all that there are."""
        self._note(self._news.get())
        while not self._news.empty():
            self._note(self._news.get())
        if self._failure is not None:
            raise own_copy(self._failure)

    def _note(self, requests: list[Request]) -> None:
        for request in requests:
            self._under_way -= len(request.targets)
            self._failure = self._failure or request.error

    def _finished(self) -> Iterator[Request]:
        while self._held and self._held[0].finished:
            yield self._held.popleft()


def _rank(request: Request) -> tuple[bool, int]:
    """Those of one lane together, longest first."""
    return request.lane.shortlisted, len(request.ids)
