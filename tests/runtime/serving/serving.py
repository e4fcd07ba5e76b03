"""The real application on a real server, in a thread of its own, and a plain client of HTTP.

Who imports this is skipped where a package of the extra serve is missing.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("starlette")
pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("sentencex")
pytest.importorskip("langcodes")
pytest.importorskip("py3langid")
pytest.importorskip("uvicorn")

import uvicorn

from kvx import Translator
from kvx.runtime.serving.keys import Keys
from kvx.runtime.serving.models import Model
from kvx.runtime.serving.server import IDLE_SECONDS, config
from kvx.runtime.serving.service import Service
from kvx.runtime.serving.settings import ServeOptions

Json = dict[str, Any]

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def service(
    translators: Mapping[str, Translator],
    keys: Keys | None = None,
    **options: Any,  # noqa: ANN401  # those of ServeOptions
) -> Service:
    """Of translators by the names of their models; a name such as de-en says a pair."""
    models = [Model(name, translator) for name, translator in translators.items()]
    return Service(ServeOptions(port=0, quiet=True, **options), models, keys)


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The address of a server of this service, as `kvx serve` has it but for signals."""
    try:
        with listening(config(service)) as address:
            yield address
    finally:
        service.models.close(drain=False)


@contextmanager
def listening(config: uvicorn.Config) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive(), "the server did not start"
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    headers: Mapping[str, str]  # by their names in lower case
    body: bytes

    @property
    def kind(self) -> str:
        """Its content type."""
        return self.headers.get("content-type", "")

    @property
    def json(self) -> Any:  # noqa: ANN401
        """What it says."""
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Its server-sent events: the name and the data of each."""
        assert self.kind == "text/event-stream; charset=utf-8"
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        pairs = (dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks)
        return [(one["event"], json.loads(one["data"])) for one in pairs]


class Client:
    """Asks a server over one connection."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        self._last = time.monotonic()

    def get(self, path: str, body: bytes = b"", **headers: str) -> Reply:
        return self.send("GET", path, body, **headers)

    def post(self, path: str, form: Any, **headers: str) -> Reply:  # noqa: ANN401
        """Posts JSON."""
        return self.send("POST", path, json.dumps(form).encode(), **{"content-type": JSON, **headers})

    def post_form(self, path: str, **fields: Any) -> Reply:  # noqa: ANN401
        """Posts a form; a list is the field several times."""
        return self.send("POST", path, urlencode(fields, doseq=True).encode(), **{"content-type": FORM})

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """Sends a request as it is. Underscores in names of headers are dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if time.monotonic() - self._last > IDLE_SECONDS / 2:  # the server may have closed it
            self._connection.close()
        try:
            self._connection.request(method, path, body, named)
            answer = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        self._last = time.monotonic()
        return Reply(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read())
