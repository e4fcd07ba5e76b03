"""Who is let in: the one place where requests are counted, before anything of them is read by a tokenizer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

from kvx.runtime.errors import CapacityError, Overloaded
from kvx.runtime.serving.settings import ServeOptions

Refusal = Literal["closing", "loading", "client", "full", "patience"]

SMOOTHING = 0.05  # of the mean time between two requests that are over
LESS = "Send less at a time, in several requests."
LEAST_RETRY, MOST_RETRY = 1.0, 60.0  # seconds


class Refused(Overloaded):
    """A request is not let in now. `reason` says why; `retry_after` is in seconds."""

    def __init__(self, got: str, *, reason: Refusal, retry_after: float) -> None:
        super().__init__(
            got,
            expected="fewer requests at a time",
            remedy=f"Send it again in {retry_after:g} s.",
            retry_after=retry_after,
        )
        self.reason: Refusal = reason


@dataclass(slots=True, eq=False)
class _Waiter:
    client: str
    most: int
    let_in: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Lets up to a number of requests in at a time, and up to a number of each client, first come first served. Others
    wait, for a while, or are refused.

    Of one event loop, in whose thread all is called.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._inside: Counter[str] = Counter()  # requests of each client
        self._outside: Counter[str] = Counter()  # that wait
        self._line: deque[_Waiter] = deque()
        self._between = 0.0  # seconds, the mean between two requests that are over
        self._last_over = 0.0
        self.active = 0
        self.closing = False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    async def enter(self, client: str, most: int | None = None) -> float:
        """Returns once a request of this client is let in → the seconds that it has waited. `leave` must follow.

        `most` is the client's own number of requests at a time; as many more may wait. Raises Refused.
        """
        begun = time.monotonic()
        waiter = _Waiter(client, most or self._options.client_requests)
        if self.closing:
            raise self._refused("The service is ending", "closing")
        if self._has_room(waiter):
            self._let_in(waiter)
            return 0.0
        self._check_line(waiter)
        await self._wait(waiter)
        return time.monotonic() - begun

    def leave(self, client: str) -> None:
        """A request of this client is over: others come in."""
        _subtract(self._inside, client)
        self.active -= 1
        now = time.monotonic()
        if self._last_over:
            self._between += SMOOTHING * (min(now - self._last_over, 1.0) - self._between)
        self._last_over = now
        for waiter in list(self._line):
            if self.active >= self._options.requests:
                return
            if not waiter.let_in.done() and self._has_room(waiter):
                self._forget(waiter)
                self._let_in(waiter)

    def close(self) -> None:
        """Refuses whoever comes from now on. Who waits may still come in."""
        self.closing = True

    def _has_room(self, waiter: _Waiter) -> bool:
        return self.active < self._options.requests and self._inside[waiter.client] < waiter.most

    def _let_in(self, waiter: _Waiter) -> None:
        self.active += 1
        self._inside[waiter.client] += 1
        waiter.let_in.set_result(None)

    def _check_line(self, waiter: _Waiter) -> None:
        """Raises Refused where no more may wait."""
        waiting = self._outside[waiter.client]
        if waiting >= waiter.most:
            raise self._refused(f"{waiting} requests of this client wait already, and no more may", "client")
        if len(self._line) >= self._options.waiting:
            raise self._refused(f"{len(self._line)} requests wait already, and no more may", "full")

    async def _wait(self, waiter: _Waiter) -> None:
        self._line.append(waiter)
        self._outside[waiter.client] += 1
        try:
            async with asyncio.timeout(self._options.patience):
                await waiter.let_in
        except BaseException as error:
            if waiter in self._line:
                self._forget(waiter)
            else:
                self.leave(waiter.client)  # it was let in at this very moment
            if isinstance(error, TimeoutError):
                own = self._inside[waiter.client] >= waiter.most
                got = f"The request has waited {self._options.patience:g} s for others to be over"
                raise self._refused(got, "client" if own else "patience") from None
            raise

    def _forget(self, waiter: _Waiter) -> None:
        self._line.remove(waiter)
        _subtract(self._outside, waiter.client)

    def _refused(self, got: str, reason: Refusal) -> Refused:
        seconds = self._between * (len(self._line) + 1)
        return Refused(got, reason=reason, retry_after=round(min(max(LEAST_RETRY, seconds), MOST_RETRY)))


def _subtract(counts: Counter[str], client: str) -> None:
    counts[client] -= 1
    if not counts[client]:
        del counts[client]


class TooLarge(CapacityError):  # noqa: N818
    """A request is larger than a limit of the service: `most` of a unit."""

    def __init__(self, got: str, most: int, unit: str, option: str, remedy: str = LESS) -> None:
        super().__init__(got, expected=f"at most {most:,} {unit}", remedy=remedy, option=option)
        self.most = most
