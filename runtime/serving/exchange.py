"""One request and its answer: bodies within their limits, errors as answers, and an end where the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvx.runtime.errors import CapacityError, DeviceError, EngineClosed, KvxError
from kvx.runtime.serving.admission import Refused, TooLarge
from kvx.runtime.serving.keys import NOBODY, Key, Unauthorized

if TYPE_CHECKING:
    from kvx.runtime.serving.models import Route
    from kvx.runtime.serving.service import Service

WRITE_SECONDS = 30.0  # in which a client has to take an event
LAST_SECONDS = 5.0  # beyond the time of a request, in which it has to take the last ones
BEARER = "bearer "
FRAMES = 8  # of a fault that are told
WHEN_GONE = "kvx.when_gone"  # in a scope's state: what the server calls where the client goes away
GONE = 499  # how logs count a client that has gone away

_log = logging.getLogger("kvx")


class SlowBody(KvxError):  # noqa: N818
    """The body of a request did not come in time."""


class NotAcceptable(KvxError):  # noqa: N818
    """A request that this route does not understand: its content type or its form."""


WITHOUT_TEXTS = (Unauthorized, CapacityError, SlowBody, EngineClosed, DeviceError)  # errors that quote no request


@dataclass(slots=True)
class Exchange:
    """A request, and what is known of it by now. What is `held` is called after the answer was sent."""

    service: Service
    request: Request
    begun: float = field(default_factory=time.monotonic)
    key: Key = NOBODY
    gone: bool = False  # its client
    facts: dict[str, Any] = field(default_factory=dict)  # for the log
    slow: bool = False  # to send its request
    held: list[Callable[[], None]] = field(default_factory=list)

    @property
    def client(self) -> str:
        """The address that it comes from."""
        return self.request.client.host if self.request.client else "unknown"

    @property
    def key_in_head(self) -> str | None:
        """The API key in a header, if there is one."""
        headers = self.request.headers
        authorization = headers.get("authorization", "")
        bearer = authorization[len(BEARER) :] if authorization.lower().startswith(BEARER) else None
        return bearer or headers.get("x-api-key")

    @property
    def until(self) -> float:
        """The moment of time.monotonic by which everything has to be translated."""
        return self.begun + self.service.options.timeout

    async def body(self) -> bytes:
        """The whole body. Raises TooLarge."""
        most = self.service.options.body_bytes
        announced = self.request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise TooLarge(f"The body has {int(announced):,} bytes", most, "bytes", "body_bytes")
        found = bytearray()
        async for chunk in self.request.stream():
            found += chunk
            if len(found) > most:
                raise TooLarge("The body is too long", most, "bytes", "body_bytes")
        return bytes(found)

    def check_sizes(self, texts: int, characters: int) -> None:
        """Raises TooLarge where there are more than one request may have."""
        options, key = self.service.options, self.key
        for got, unit, own, usual in (
            (texts, "texts", key.texts, options.texts),
            (characters, "characters", key.characters, options.characters),
        ):
            most = own or usual
            if got > most:
                raise TooLarge(f"The request has {got:,} {unit}", most, unit, unit)
        self.facts |= {"texts": texts, "characters": characters}

    def note_error(self, error: BaseException) -> None:
        """For the log: an error, and what it says, unless that may be words of the client and these are not logged."""
        if isinstance(error, WITHOUT_TEXTS):
            told = error.got
        else:
            told = type(error).__name__ if not self.service.options.log_texts else repr(error)
        self.facts["error"] = told

    async def admit(self) -> None:
        """Waits until the request is let in. Raises Refused."""
        client = f"key {self.key.name}" if self.key.name else self.client
        service, metrics = self.service, self.service.metrics
        waited = await service.admission.enter(client, self.key.requests)
        self.held.append(partial(service.admission.leave, client))
        metrics.waited.observe(waited)
        metrics.characters.inc(self.facts.get("characters", 0))

    def use(self, route: Route) -> None:
        """The models of a route are there until the answer was sent."""
        self.held.extend(leg.model.use() for leg in route.legs)

    def end_when_gone(self) -> None:
        """Cancels this task as soon as the client has gone away, or is too slow: the server tells (see Protocol)."""
        task = asyncio.current_task()

        def end(slow: bool) -> None:
            self.gone, self.slow = not slow, slow
            if task is not None:
                task.cancel()

        self.request.scope.setdefault("state", {})[WHEN_GONE] = end


Answer = Callable[[Exchange], Awaitable[Response]]
Failed = Callable[[BaseException], Response]


class EventStream(Response):
    """Server-sent events, made while they are sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], until: float) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._until = until + LAST_SECONDS
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them. Raises TimeoutError where the client takes none for long, or not all in time."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]  # a generator
            async for event in events:
                async with asyncio.timeout(min(WRITE_SECONDS, self._until - time.monotonic())):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Endpoint:
    """A route of the service, as an ASGI application. `failed` makes answers of errors as its clients know them."""

    def __init__(self, service: Service, route: str, method: str, answer: Answer, failed: Failed) -> None:
        self.method = method
        self._service = service
        self._route = route
        self._answer = answer
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        sent, exchange = _Sent(send), Exchange(self._service, Request(scope, receive))
        exchange.end_when_gone()
        try:
            response = await self._response(exchange)
            await response(scope, receive, sent)
        except asyncio.CancelledError:
            if exchange.slow and not sent.status:
                await self._failed(_slow_body())(scope, receive, sent)
            elif exchange.gone or exchange.slow:
                sent.status = GONE
            elif sent.status:
                raise
            else:  # the service has ended
                await self._failed(_unfinished())(scope, receive, sent)
        except ClientDisconnect:  # before the body was there
            sent.status = GONE
        except TimeoutError:
            exchange.facts["error"] = "the client did not take the answer in time"
        finally:
            for leave in reversed(exchange.held):
                leave()
            self._note(exchange, sent.status or 500)

    async def _response(self, exchange: Exchange) -> Response:
        try:
            return await self._answer(exchange)
        except ClientDisconnect:
            raise
        except KvxError as error:
            if isinstance(error, Refused):
                self._service.metrics.refused.labels(error.reason).inc()
            exchange.note_error(error)
            return self._failed(error)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                note_failure(error, with_texts=self._service.options.log_texts)
            exchange.note_error(error)
            return self._failed(error)

    def _note(self, exchange: Exchange, status: int) -> None:
        seconds = time.monotonic() - exchange.begun
        if status == GONE:
            self._service.metrics.cancelled.inc()
        self._service.metrics.note(self._route, status, seconds, exchange.facts.get("tokens", 0))
        known = {"route": self._route, "status": status, "ms": round(1000 * seconds, 1), "client": exchange.client}
        named = {"key": exchange.key.name} if exchange.key.name else {}
        self._service.journal.note(known | named | exchange.facts)


def note_failure(error: BaseException, *, with_texts: bool) -> None:
    """Logs a fault of ours: what it is and where; what it says may be words of a client."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(frames))
    _log.error("a request failed: %s at %s", repr(error) if with_texts else type(error).__name__, places)


def _slow_body() -> SlowBody:
    return SlowBody("The request did not come in time", expected="a whole request", remedy="Send it again.")


def _unfinished() -> Refused:
    return Refused("The service ended before this was done", reason="closing", retry_after=1)


class _Sent:
    """Sends, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self._send = send

    async def __call__(self, message: Any) -> None:  # noqa: ANN401  # as ASGI has it
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
