"""What comes over a socket, however slow, wrong or hostile it is: the service answers or closes, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("sentencex")
pytest.importorskip("py3langid")
pytest.importorskip("langcodes")

from kvx.runtime.serving import exchange, server
from kvx.runtime.serving.service import Service
from kvx.testing import FakeTranslator
from kvx.tests.runtime.serving.serving import Client, running, service

PATIENCE = 20.0
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
LONG = "many words " * 300  # 3300 steps of the slow model


@pytest.fixture(scope="module")
def fake() -> FakeTranslator:
    return FakeTranslator(rows=64)


@pytest.fixture(scope="module")
def slow() -> FakeTranslator:
    return FakeTranslator(step_seconds=0.005, rows=64)


@pytest.fixture(autouse=True)
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing may reach the logs of the event loop or of a failed request."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


@contextlib.contextmanager
def served(translator: FakeTranslator, **options: Any) -> Iterator[tuple[Service, str]]:  # noqa: ANN401
    """A service of this translator, at an address. The translator stays open."""
    serving = service({"de-en": translator}, **{"grace": 0.0, **options})
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(serving.models, "close", lambda **_: None)
    try:
        with running(serving) as address:
            yield serving, address
    finally:
        monkeypatch.undo()


@pytest.fixture(scope="module")
def shared(fake: FakeTranslator) -> Iterator[tuple[Service, str]]:
    with served(fake) as found:
        yield found


@pytest.fixture
def address(shared: tuple[Service, str]) -> Iterator[str]:
    """Of a service that still answers after the test, without an error of its own."""
    serving, address = shared
    yield address
    assert_answers(address)
    assert 'status="500"' not in serving.metrics.page().decode()


def assert_answers(address: str) -> None:
    answer = Client(address).post("/v1/translate", {"texts": "hello", "target_language": "en", "source_language": "de"})
    assert (answer.status, answer.json["translations"][0]["text"]) == (200, "HELLO")


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    assert parts.hostname
    assert parts.port
    return socket.create_connection((parts.hostname, parts.port), PATIENCE)


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/translate") -> bytes:
    """A request, with a content length unless there are headers."""
    lengths = headers or (b"content-length: %d" % len(body),)
    lines = (b"POST " + path + b" HTTP/1.1", b"host: x", b"content-type: application/json", *lengths)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def form(text: str = "hello", **more: Any) -> bytes:  # noqa: ANN401
    return json.dumps({"texts": text, "source_language": "de", "target_language": "en", **more}).encode()


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            found += part
    return found


def exchanged(address: str, sent: bytes, first: float = PATIENCE, pause: float = 0.1) -> bytes:
    """What is answered to these bytes until it is closed, or nothing more comes for a while."""
    with connect(address) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        connection.settimeout(first)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(2**16):
                found += part
                connection.settimeout(pause)
        return found


def statuses(answers: bytes) -> list[int]:
    return [int(one) for one in STATUS.findall(answers)]


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def rows(translator: FakeTranslator) -> int:
    load = translator.engine.busy_with
    return load.rows + load.waiting


def steps_stand_still(translator: FakeTranslator) -> bool:
    before = translator.engine.stats.row_steps
    time.sleep(0.1)
    return translator.engine.stats.row_steps == before


def cancelled(serving: Service) -> float:
    found = re.search(r"^kvx_cancelled_total (\S+)$", serving.metrics.page().decode(), re.MULTILINE)
    assert found
    return float(found[1])


# slow clients


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"", [], id="nothing"),
        pytest.param(b"POST /v1/translate HTTP/1.1\r\nhost:", [], id="half a head"),
        pytest.param(post(b'{"texts"', b"content-length: 100"), [408], id="half a body"),
        pytest.param(post(b"5\r\nab", b"transfer-encoding: chunked"), [408], id="half a chunk"),
        pytest.param(post(b"", b"content-length: 100", path=b"/health"), [405], id="no body for who needs none"),
        pytest.param(post(form()) + post(b"{", b"content-length: 100"), [200, 408], id="half a pipelined body"),
    ],
)
def test_who_does_not_send_the_rest_of_a_request_is_not_waited_for(
    address: str, monkeypatch: pytest.MonkeyPatch, sent: bytes, status: list[int]
) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    with connect(address) as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        assert statuses(read_all(connection)) == status
        assert time.monotonic() - begun < PATIENCE / 2


def test_bytes_that_trickle_do_not_prolong_the_time_of_a_request(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with connect(address) as connection:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in post(form())[:-1]:
                connection.sendall(bytes([byte]))
                time.sleep(0.01)
                assert time.monotonic() - begun < PATIENCE / 2
        assert statuses(read_all(connection)) in ([], [408])


def test_a_request_in_single_bytes_is_a_request(address: str) -> None:
    with connect(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(form()):
            connection.sendall(bytes([byte]))
        assert b"HELLO" in connection.recv(2**16)


def test_a_translation_may_take_longer_than_a_request_may_take_to_come(
    slow: FakeTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.05)
    with served(slow) as (_, address), connect(address) as connection:
        connection.sendall(post(form("hello " * 10)))
        assert statuses(connection.recv(2**16)) == [200]


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of what nobody reads, and connections are given up soon."""

    class Small(server._Together):
        def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().__init__(transport, loop)

    monkeypatch.setattr(server, "_Together", Small)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(exchange, "WRITE_SECONDS", 0.2)


def connect_without_reading(address: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((urlsplit(address).hostname, urlsplit(address).port))
    return connection


def was_dropped(connection: socket.socket) -> bool:
    """Whether the other side has given the connection up, though nothing was read."""
    try:
        connection.send(b" ")
    except ConnectionError:
        return True
    return False


@pytest.mark.usefixtures("small_buffers")
def test_who_does_not_take_a_stream_is_dropped_and_his_rows_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Mapping[str, Any]] = []
    slow = FakeTranslator(step_seconds=0.0005, rows=64)
    with slow.engine, served(slow) as (serving, address), connect_without_reading(address) as connection:
        monkeypatch.setattr(serving.journal, "note", noted.append)
        connection.sendall(post(json.dumps({"texts": [LONG] * 14, "model": "de-en", "stream": True}).encode()))
        wait_until(lambda: bool(noted))
        assert noted[0]["error"] == "the client did not take the answer in time"
        wait_until(lambda: rows(slow) == 0, 2.0)
        assert steps_stand_still(slow)
        wait_until(lambda: was_dropped(connection), 3.0)
        assert_answers(address)


@pytest.mark.usefixtures("small_buffers")
def test_who_does_not_take_a_large_answer_does_not_keep_its_connection(
    fake: FakeTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Mapping[str, Any]] = []
    body = json.dumps({"texts": ["word " * 200] * 20, "model": "de-en", "scores": True}).encode()
    with served(fake) as (serving, address), connect_without_reading(address) as connection:
        monkeypatch.setattr(serving.journal, "note", noted.append)
        connection.sendall(post(body, b"connection: close", b"content-length: %d" % len(body)))
        wait_until(lambda: bool(noted))
        assert noted[0]["status"] == 200
        wait_until(lambda: was_dropped(connection), 3.0)


@pytest.mark.usefixtures("small_buffers")
def test_who_takes_a_large_answer_slowly_gets_all_of_it(fake: FakeTranslator) -> None:
    body = json.dumps({"texts": ["word " * 200] * 5, "model": "de-en", "scores": True}).encode()
    with served(fake) as (_, address), connect_without_reading(address) as connection:
        connection.sendall(post(body, b"connection: close", b"content-length: %d" % len(body)))
        found = b""
        while part := connection.recv(4096):
            found += part
            time.sleep(0.01)
        head, _, answer = found.partition(b"\r\n\r\n")
        assert b"content-length: %d" % len(answer) in head
        assert len(json.loads(answer)["translations"]) == 5


# clients that go away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_the_row_of_a_client_that_goes_away_is_free_at_the_next_step(
    slow: FakeTranslator, stream: bool, reset: bool
) -> None:
    with served(slow) as (serving, address):
        connection = connect(address)
        connection.sendall(post(form(LONG, stream=stream)))
        wait_until(lambda: slow.engine.busy_with.rows == 1)
        if stream:
            assert connection.recv(100)
        before = cancelled(serving)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        wait_until(lambda: rows(slow) == 0, 2.0)
        assert steps_stand_still(slow)
        wait_until(lambda: cancelled(serving) == before + 1)
        assert (serving.admission.active, serving.admission.waiting) == (0, 0)


def test_all_sentences_of_a_client_that_goes_away_are_called_off(slow: FakeTranslator) -> None:
    with served(slow) as (serving, address):
        for stream in (False, True):
            connection = connect(address)
            body = json.dumps({"texts": [LONG] * 14, "model": "de-en", "stream": stream}).encode()
            connection.sendall(post(body))
            wait_until(lambda: rows(slow) == 14)
            connection.close()
            wait_until(lambda: rows(slow) == 0, 2.0)
            assert steps_stand_still(slow)
            wait_until(lambda: serving.admission.active == 0)


def test_a_client_that_goes_away_while_it_waits_is_never_translated(slow: FakeTranslator) -> None:
    with served(slow, requests=1, patience=30) as (serving, address):
        first, second = connect(address), connect(address)
        first.sendall(post(form(LONG)))
        wait_until(lambda: rows(slow) == 1)
        second.sendall(post(form(LONG)))
        wait_until(lambda: serving.admission.waiting == 1)
        second.close()
        wait_until(lambda: serving.admission.waiting == 0)
        assert rows(slow) == 1
        first.close()
        wait_until(lambda: serving.admission.active == 0)
        wait_until(lambda: rows(slow) == 0)
        wait_until(lambda: cancelled(serving) == 2)


def test_clients_that_go_away_at_any_moment_leave_nothing_behind(slow: FakeTranslator) -> None:
    chance = random.Random(1)
    with served(slow, requests=4, waiting=4, patience=0.05) as (serving, address):

        def client(number: int) -> None:
            body = form("some words", stream=number % 2 == 0)
            whole = post(body)
            with connect(address) as connection:
                connection.sendall(whole[: chance.choice((len(whole), len(whole), len(whole) - 5, 30))])
                time.sleep(chance.random() * 0.06)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(client, range(150)))
        wait_until(lambda: rows(slow) == 0)
        wait_until(lambda: (serving.admission.active, serving.admission.waiting) == (0, 0))
        assert {**serving.admission._inside, **serving.admission._outside} == {}
        assert serving.models._models["de-en"]._users == 0
        assert_answers(address)


# HTTP


def test_pipelined_requests_are_answered_in_their_order(address: str) -> None:
    sent = b"".join(post(form(f"word {number}")) for number in range(20))
    found = exchanged(address, sent)
    assert statuses(found) == [200] * 20
    assert [int(one) for one in re.findall(rb'"text":"WORD (\d+)"', found)] == list(range(20))


def test_after_an_answer_that_came_before_the_body_the_next_request_is_understood(address: str) -> None:
    refused = b"POST /v1/translate HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: 30000\r\n\r\n"
    sent = refused + b"x" * 30000 + post(form())
    assert statuses(exchanged(address, sent)) == [415, 200]


def test_a_body_that_is_too_large_is_refused_and_its_sender_hears_why(address: str) -> None:
    body = form("x" * 3 * 2**20)
    assert Client(address).send("POST", "/v1/translate", body, content_type="application/json").status == 413
    chunks = b"".join(b"10000\r\n" + b"x" * 0x10000 + b"\r\n" for _ in range(40)) + b"0\r\n\r\n"
    assert statuses(exchanged(address, post(chunks, b"transfer-encoding: chunked"))) == [413]


def test_who_waits_for_leave_to_send_gets_it(address: str) -> None:
    body = form()
    with connect(address) as connection:
        connection.sendall(post(b"", b"content-length: %d" % len(body), b"expect: 100-continue"))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert b"HELLO" in connection.recv(2**16)


BODY = form()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = b"content-length: %d" % len(BODY)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(post(CHUNKED, b"content-length: 6", b"transfer-encoding: chunked"), id="length and chunks"),
        pytest.param(post(CHUNKED, b"transfer-encoding: chunked", b"content-length: 6"), id="chunks and length"),
        pytest.param(post(BODY, LENGTH, b"content-length: 0"), id="two lengths"),
        pytest.param(post(BODY, b"content-length: 0", LENGTH), id="two lengths, the other way round"),
        pytest.param(post(BODY, LENGTH + b", 0"), id="a list of lengths"),
        pytest.param(post(BODY, b"content-length: +%d" % len(BODY)), id="a plus sign"),
        pytest.param(post(BODY, b"content-length: -1"), id="a minus sign"),
        pytest.param(post(BODY, b"content-length: 0x20"), id="hexadecimal length"),
        pytest.param(post(BODY, b"content-length: 1_0"), id="underscore"),
        pytest.param(post(BODY, b"content-length: " + b"9" * 30), id="a huge length"),
        pytest.param(post(BODY, b"content-length : %d" % len(BODY)), id="space before the colon"),
        pytest.param(post(BODY, b" " + LENGTH), id="space before the name"),
        pytest.param(post(BODY, b"x: y\r\n " + LENGTH), id="a folded line"),
        pytest.param(post(CHUNKED, b"transfer-encoding: xchunked"), id="unknown coding"),
        pytest.param(post(CHUNKED, b"transfer-encoding: gzip, chunked"), id="two codings"),
        pytest.param(post(CHUNKED, b"transfer-encoding: chunked, identity"), id="chunked is not last"),
        pytest.param(post(CHUNKED, b"transfer-encoding:\x0bchunked"), id="vertical tab"),
        pytest.param(post(CHUNKED, b"transfer-encoding: chunked", b"transfer-encoding: identity"), id="two encodings"),
        pytest.param(post(CHUNKED, b"transfer_encoding: chunked", LENGTH), id="an underscore in a name"),
        pytest.param(post(b"+5\r\nabcde\r\n0\r\n\r\n", b"transfer-encoding: chunked"), id="a chunk with a plus"),
        pytest.param(post(b"0x5\r\nabcde\r\n0\r\n\r\n", b"transfer-encoding: chunked"), id="a chunk with 0x"),
        pytest.param(post(b"zz\r\nabcde\r\n0\r\n\r\n", b"transfer-encoding: chunked"), id="a chunk without a size"),
        pytest.param(post(b"5\r\nabcdeXX0\r\n\r\n", b"transfer-encoding: chunked"), id="a chunk without an end"),
        pytest.param(post(b"5;\nGET\r\nabcde\r\n0\r\n\r\n", b"transfer-encoding: chunked"), id="LF in an extension"),
        pytest.param(post(b"f" * 40 + b"\r\nabcde\r\n", b"transfer-encoding: chunked"), id="a huge chunk"),
        pytest.param(post(BODY).replace(b"\r\n", b"\n"), id="bare LF"),
        pytest.param(post(BODY).replace(b"\r\n", b"\r"), id="bare CR"),
        pytest.param(post(BODY, LENGTH, b"x: a\x00b"), id="NUL in a header"),
        pytest.param(post(BODY, LENGTH, b"x: a\rb: c"), id="CR in a header"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
    ],
)
def test_a_request_of_doubtful_length_hides_no_other(address: str, sent: bytes) -> None:
    found = exchanged(address, sent + SMUGGLED, 0.5)
    assert max(statuses(found), default=0) < 500
    if statuses(found) != [200, 404]:  # it was one request, and the other is one that anybody may send
        assert b"/smuggled" not in found


@pytest.mark.parametrize(
    "lengths", [(b"content-length: 6", b"transfer-encoding: chunked"), (LENGTH, b"content-length: 0")]
)
def test_a_request_with_two_lengths_is_refused_and_closed(address: str, lengths: tuple[bytes, ...]) -> None:
    with connect(address) as connection:
        connection.sendall(post(CHUNKED, *lengths) + SMUGGLED)
        assert statuses(read_all(connection)) == [400]


def test_what_is_wrong_in_a_body_that_was_already_answered_closes_quietly(address: str) -> None:
    head = b"POST /v1/translate HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n"
    with connect(address) as connection:
        connection.sendall(head)
        assert statuses(connection.recv(2**16)) == [415]
        connection.sendall(b"no chunk\r\n\r\n" + SMUGGLED)
        assert read_all(connection) == b""


def test_a_head_is_bounded(address: str) -> None:
    for sent in (
        b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"y" * 2**20 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 200_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x" * 2**20,
    ):
        assert statuses(exchanged(address, sent)) in ([400], [])


def test_a_text_in_the_query_string_may_be_long(address: str) -> None:
    head = b"POST /translate?source=de&target=en&q=a" + b"%20" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"
    assert statuses(exchanged(address, head)) == [200]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /nothing HTTP/1.1\r\nhost: [\r\n\r\n",
        b"GET /nothing/ HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET /v1/models/ HTTP/1.1\r\nhost: [::1\r\n\r\n",
        b"GET //[ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /%00%ff%fe/.. HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://[/x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
        b"OPTIONS /v1/translate HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/translate HTTP/1.1\r\nhost: x\r\n\r\n",
        b"QUIT / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\n\r\n",
    ],
)
def test_odd_requests_are_answered(address: str, head: bytes) -> None:
    found = statuses(exchanged(address, head))
    assert len(found) == 1
    assert found[0] in (200, 307, 400, 404, 405)


# bodies


@pytest.mark.parametrize("path", [b"/v1/translate", b"/v1/alternatives", b"/v1/score", b"/translate", b"/detect"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="nested arrays"),
        pytest.param(b'{"texts":' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="nested texts"),
        pytest.param(b'{"q":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, id="nested objects"),
        pytest.param(b'{"texts": "\\ud800", "text": "\\ud800", "q": "\\ud800"}', id="a lone surrogate"),
        pytest.param(b'{"texts": "\xed\xa0\x80", "q": "\xed\xa0\x80"}', id="a surrogate in UTF-8"),
        pytest.param(b'{"texts": "\xff\xfe", "q": "\xff"}', id="no UTF-8"),
        pytest.param(b'{"texts": 1e999, "q": NaN}', id="no number"),
        pytest.param(b'{"texts": ' + b"9" * 100_000 + b"}", id="a huge number"),
        pytest.param(b'{"texts": [null], "text": null, "q": [null]}', id="null"),
        pytest.param(b'{"texts": [[-1, 99999999999999999999]], "q": {}}', id="ids that are none"),
        pytest.param(b"\x00" * 1000, id="NUL"),
        pytest.param(b"\xef\xbb\xbf{}", id="a mark of byte order"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_body_that_is_wrong_is_refused_as_wrong(address: str, path: bytes, body: bytes) -> None:
    found = exchanged(address, post(body, path=path), pause=0.01)
    assert statuses(found) == [400]
    assert b"Traceback" not in found


@pytest.mark.parametrize(
    "text",
    ["\0", "a\0b", "\u2028", "\ufffe", "\U0010ffff", "e" + "\u0301" * 500, "\u202e\u202d", " ", "\r\n\t", "￼" * 50],
)
@pytest.mark.parametrize("form", ["sentence", "text", "html"])
def test_odd_characters_are_translated(address: str, text: str, form: str) -> None:
    asked = {"texts": text, "source_language": "de", "target_language": "en", "format": form}
    assert Client(address).post("/v1/translate", asked).status == 200
    asked = {"q": text, "source": "de", "target": "en", "format": form.replace("sentence", "text")}
    assert Client(address).post("/translate", asked).status == 200


def test_random_requests_are_no_trouble(address: str) -> None:
    chance = random.Random(20)
    valid = [
        post(form("hello", stream=True)),
        post(form("a. b. c.", format="text", beam_size=2)),
        post(form("<b>a</b>", format="html", source_language="auto")),
        post(CHUNKED, b"transfer-encoding: chunked"),
        post(b'{"text":"a","prefix":"A","count":2}', path=b"/v1/alternatives"),
        post(b'{"texts":["a"],"translations":["A"]}', path=b"/v1/score"),
        post(b'{"q":["a"],"source":"auto","target":"en","alternatives":2}', path=b"/translate"),
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /languages HTTP/1.1\r\nhost: x\r\n\r\n",
    ]

    def damaged(whole: bytes) -> bytes:
        found = bytearray(whole)
        for _ in range(chance.choice((0, 1, 1, 2, 8))):
            place = chance.randrange(len(found) + 1)
            end = place + chance.choice((1, 1, 5, 40))
            found[place:end] = chance.choice(
                (chance.randbytes(3), b"", found[place:end] * 2, b'"', b"{", b"\r\n", b"-1", b"null", b"\\ud800")
            )
        return bytes(found)

    requests = [damaged(chance.choice(valid)) if number % 10 else chance.randbytes(200) for number in range(300)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: exchanged(address, one, 0.3), requests))
    assert max((status for one in answers for status in statuses(one)), default=0) < 500
    assert not any(b"Traceback" in one or b"Internal" in one for one in answers)
    assert sum(statuses(one) == [200] for one in answers) > 10


# many at a time


def test_connections_are_bounded_and_the_rest_hear_so(fake: FakeTranslator) -> None:
    with served(fake, connections=20) as (_, address):
        opened = [connect(address) for _ in range(20)]
        refused = [connect(address) for _ in range(80)]
        for one in refused:
            found = read_all(one)
            assert statuses(found) == [503]
            head, body = found.split(b"\r\n\r\n")
            assert b"retry-after: 1" in head
            assert json.loads(body)["status"] == 503
            one.close()
        opened[0].sendall(post(form()))
        assert b"HELLO" in opened[0].recv(2**16)
        for one in opened:
            one.close()
        wait_until(lambda: statuses(exchanged(address, post(form()))) == [200])


def test_who_is_one_too_many_hears_so_though_its_request_was_sent(fake: FakeTranslator) -> None:
    with served(fake, connections=60) as (_, address):
        opened = [connect(address) for _ in range(60)]
        refused = [connect(address) for _ in range(50)]
        for one in refused:
            one.sendall(post(form()))
        time.sleep(0.1)
        for one in refused:
            assert statuses(one.recv(2**16)) == [503]
            assert one.recv(1) == b""
            one.close()
        for one in opened:
            one.close()


def test_many_connections_that_say_nothing_let_others_in(fake: FakeTranslator) -> None:
    with served(fake, connections=900) as (_, address):
        opened = []
        try:
            for _ in range(400):
                opened.append(connect(address))
        finally:
            assert_answers(address)
            for one in opened:
                one.close()


def flood(address: str, count: int, **more: Any) -> list[tuple[int, str | None]]:  # noqa: ANN401
    """The status and the Retry-After of so many requests at a time."""
    barrier = threading.Barrier(count)

    def one(number: int) -> tuple[int, str | None]:
        barrier.wait()
        asked = {"texts": f"text {number}", "source_language": "de", "target_language": "en", **more}
        answer = Client(address).post("/v1/translate", asked)
        if answer.status == 200:
            assert answer.json["translations"][0]["text"] == f"TEXT {number}"
        else:
            assert answer.kind == "application/problem+json"
        return answer.status, answer.headers.get("retry-after")

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_overload_is_refused_soon_and_says_when_to_come_back(slow: FakeTranslator) -> None:
    with served(slow, requests=2, waiting=2, patience=0.02) as (serving, address):
        begun = time.monotonic()
        found = flood(address, 24)
        assert time.monotonic() - begun < PATIENCE / 2
        assert {status for status, _ in found} == {200, 503}
        assert sum(status == 200 for status, _ in found) >= 2
        for status, after in found:
            assert (after is not None) == (status == 503)
            assert status == 200 or 1 <= int(after or 0) <= 60
        page = serving.metrics.page().decode()
        assert 'kvx_refused_total{reason="full"}' in page
        assert (serving.admission.active, serving.admission.waiting) == (0, 0)
        assert_answers(address)


def test_with_patience_all_are_served(slow: FakeTranslator) -> None:
    with served(slow, requests=2, waiting=100, patience=60) as (_, address):
        assert {status for status, _ in flood(address, 24)} == {200}


def test_too_many_requests_of_one_client_are_its_own_fault(slow: FakeTranslator) -> None:
    with served(slow, requests=50, client_requests=3) as (serving, address):
        found = flood(address, 24)
        assert {status for status, _ in found} == {200, 429}
        assert all(after is not None for status, after in found if status == 429)
        assert 'kvx_refused_total{reason="client"}' in serving.metrics.page().decode()
        assert_answers(address)
