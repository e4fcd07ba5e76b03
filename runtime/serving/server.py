"""The server around the application: connections, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvx.runtime.errors import DeviceError, remedy_of
from kvx.runtime.serving.app import application
from kvx.runtime.serving.exchange import WHEN_GONE
from kvx.runtime.serving.models import Model
from kvx.runtime.serving.service import Service, reload

HEAD_BYTES = 2**19  # of a request line and headers: some clients send texts in the query string
REQUEST_SECONDS = 20.0  # in which a whole request has to come, its body included
IDLE_SECONDS = 30  # that a connection may stay open between two requests
LINGER_SECONDS = 10.0  # in which a client has to take something of what is left when its connection is closed
REFUSED_SECONDS = 1.0  # in which a client may take the answer that there are too many connections
BACKLOG = 512
OTHER_FILES = 256  # that the process opens beside its connections
FAILED = 70  # the exit code of a fault of ours
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n"
    b'connection: close\r\ncontent-length: 86\r\n\r\n{"title":"Service Unavailable","status":503,'
    b'"detail":"Too many connections are open."}'
)

_log = logging.getLogger("kvx")


def serve(service: Service, load: Callable[[], list[Model]], said: Callable[[str], None]) -> None:
    """Listens, loads the models meanwhile, and answers until SIGTERM or Ctrl-C. SIGHUP loads the models again.

    `said` is told where it listens once the models are there. Raises what `load` raises, and DeviceError where the
    address is not to be had.
    """
    _allow_files(service.options.connections + OTHER_FILES)
    with service.journal:
        asyncio.run(_Server(service, load, said).run())


def config(service: Service) -> uvicorn.Config:
    """How uvicorn serves the application of a service."""
    options = service.options
    return uvicorn.Config(
        application(service),
        host=options.host,
        port=options.port,
        http=_protocol(options.connections),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level=logging.CRITICAL,
        server_header=False,
        proxy_headers=bool(options.proxies),
        forwarded_allow_ips=list(options.proxies),
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=options.grace,  # type: ignore[arg-type]  # it is given to asyncio.wait_for
        h11_max_incomplete_event_size=HEAD_BYTES,
        backlog=BACKLOG,
    )


def _allow_files(count: int) -> None:
    """Raises the limit of open files of this process, as far as it may: every connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Server(uvicorn.Server):
    """uvicorn, with the signals and the end of the service."""

    def __init__(self, service: Service, load: Callable[[], list[Model]], said: Callable[[str], None]) -> None:
        super().__init__(config(service))
        self._service = service
        self._load = load
        self._said = said
        self._failure: BaseException | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._changed = False  # the bundles, since loading them began
        self._ended = asyncio.Event()

    async def run(self) -> None:  # type: ignore[override]  # in a loop that runs
        """Serves until it is told to end."""
        sockets = self._bound()
        loading = asyncio.create_task(self._load_models(sockets[0].getsockname()[1]))
        try:
            with self._signals():
                await self._serve(sockets)
        except Exception as error:
            self._failure = error
        if not loading.done():
            self._leave()
        await asyncio.to_thread(self._service.models.close, drain=False)
        self._service.calls.shutdown(wait=False, cancel_futures=True)
        if self._failure is not None:
            raise self._failure
        if self._reloading is not None and not self._reloading.done():
            self._leave()

    def _leave(self) -> NoReturn:
        """Ends the process while a bundle is being loaded, which takes long and cannot be called off."""
        if self._failure is not None:
            _log.error("the service has failed: %r", self._failure)
        self._service.journal.close()
        os._exit(0 if self._failure is None else FAILED)

    async def main_loop(self) -> None:
        """Waits for the end, and hardly ever wakes: once a second, for the date in answers."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 1.0)

    def _bound(self) -> list[Any]:
        """The socket that it listens at. Raises DeviceError."""
        options = self._service.options
        try:
            infos = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = infos[0]
            found = socket.socket(family, kind, protocol)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(BACKLOG)  # now, as another may listen here already
        except OSError as error:
            raise DeviceError(
                f"It is not possible to listen at {options.host} port {options.port} ({error.strerror or error})",
                expected="an address of this machine and a port that is free",
                remedy=remedy_of(error, "Choose another `port` or `host`."),
                option="port",
            ) from error
        return [found]

    async def _load_models(self, port: int) -> None:
        try:
            models = await asyncio.to_thread(self._load)
            self._service.take(models)
            await asyncio.to_thread(self._service.detector.load)
        except Exception as error:
            self._failure, self.should_exit = error, True
            self._ended.set()
            return
        if self._changed:
            self._reload()
        host = self._service.options.host
        self._said(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        wanted = {signal.SIGTERM: self._end, signal.SIGINT: self._end}
        if hasattr(signal, "SIGHUP"):
            wanted[signal.SIGHUP] = self._reload
        if sys.platform == "win32":  # its loops know no signals
            yield
            return
        before = {number: signal.getsignal(number) for number in wanted}
        for number, handle in wanted.items():
            loop.add_signal_handler(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self) -> None:
        """Accepts no more. A second time it waits for nothing."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._ended.set()
        self._service.admission.close()

    def _reload(self) -> None:
        """Loads the models again; after that once more, if it is told so meanwhile, as they may have changed."""
        self._changed = True
        idle = self._reloading is None or self._reloading.done()
        if idle and self._service.models.loaded:  # else once they are
            self._reloading = asyncio.get_running_loop().create_task(self._reload_models())

    async def _reload_models(self) -> None:
        while self._changed:
            self._changed = False
            await reload(self._service, self._load)

    def _log_started_message(self, listeners: Any) -> None:  # noqa: ANN401
        """Nothing: the service says itself when it is ready."""


def _protocol(connections: int) -> type[H11Protocol]:
    """HTTP/1.1 with a bound on connections and on the time in which a request has to come."""

    class Protocol(H11Protocol):
        """h11 beneath uvicorn, for the connections of one server."""

        _late: asyncio.TimerHandle | None = None
        _is_refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """A connection is there."""
            super().connection_made(_Together(transport, self.loop))  # type: ignore[arg-type]
            self.conn = _Strict(h11.SERVER, HEAD_BYTES)
            self._is_refused = len(self.connections) > connections
            if not self._is_refused:
                self._await_request()
                return
            transport.write(FULL)
            if len(self.connections) > 2 * connections:
                transport.close()
            else:  # its request is read for a moment: to close before that takes the answer away from many clients
                transport.write_eof()
                self._late = self.loop.call_later(REFUSED_SECONDS, transport.close)

        def data_received(self, data: bytes) -> None:
            """Some bytes have come."""
            if self._is_refused:
                return
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_request()

        def handle_events(self) -> None:
            """Some of a request is there, perhaps only now that the one before it is answered."""
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                if self.cycle.more_body:
                    self._await_request()
                else:
                    self._stop_waiting()

        def send_400_response(self, msg: str) -> None:
            """What has come is not HTTP."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:  # there is an answer already
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            """It is closed: whoever works for the client hears of it."""
            self._stop_waiting()
            self._call_off(slow=False)
            super().connection_lost(exc)

        def _await_request(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(REQUEST_SECONDS, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _too_slow(self) -> None:
            self._late = None
            if not self._call_off(slow=True) and not self.transport.is_closing():
                self.transport.close()

        def _call_off(self, *, slow: bool) -> bool:
            """Tells whoever works for the client that it is slow or gone; whether there is anybody."""
            if self.cycle is None or self.cycle.response_complete:
                return False
            when_gone = self.cycle.scope.get("state", {}).get(WHEN_GONE)
            if when_gone is not None:
                when_gone(slow)
            return when_gone is not None

    return Protocol


class _Strict(h11.Connection):
    """h11, but for requests whose length is told in two ways: a proxy may have gone by the other one, and what is the
    rest of a body to it would be another request here.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What has come. Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("The request has both Transfer-Encoding and Content-Length.")
        return event


class _Together:
    """A transport that sends what is written in one turn of the event loop together: head and body of an answer."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends it, soon."""
        if not data:
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Closes it after what was written, as long as the client takes some of it now and then."""
        self._flush()
        self._transport.close()
        self._drop_if_stuck(-1)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # all else is the transport's
        return getattr(self._transport, name)

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def _drop_if_stuck(self, before: int) -> None:
        left = self._transport.get_write_buffer_size()
        if left == before:
            self._transport.abort()
        elif left:
            self._loop.call_later(LINGER_SECONDS, self._drop_if_stuck, left)
