"""`kvx serve` as a process: it starts, answers, loads again, and ends as it should."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("msgspec")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("sentencex")
pytest.importorskip("py3langid")
pytest.importorskip("langcodes")

from kvx.runtime.serving.keys import Keys
from kvx.tests.commands.running import ENVIRONMENT, KVX, PATIENCE, Outcome, Run, invoke, refused, refused_usage

LISTENS = re.compile(r"kvx: http://127\.0\.0\.1:(\d+) \(page\)")
JSON = {"content-type": "application/json"}
LONG = " ".join(["nine hundred and ninety-nine thousand nine hundred and ninety-nine"] * 2)
SECRET = "Geheimnis"
PAUSED = """
import importlib.abc, pathlib, sys, time

class Pausing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            while not pathlib.Path({go!r}).exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Pausing())
"""

Texts = Sequence[str] | str


@dataclass(slots=True)
class Server:
    """A `kvx serve` that runs."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def err(self) -> str:
        """What it has said by now."""
        return "".join(self.said)

    @property
    def journal(self) -> list[dict[str, Any]]:
        """The requests that it has logged."""
        return [json.loads(line) for line in self.said if line.startswith("{")]

    def await_line(self, pattern: str | re.Pattern[str], since: int = 0) -> re.Match[str]:
        """What it says, once it says it, after so many lines."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, "".join(self.said[since:]))) is None:
            assert self.process.poll() is None, self.err
            assert time.monotonic() < end, self.err
            time.sleep(0.01)
        return found

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = JSON) -> tuple[int, Any]:
        """A request → its status and its answer in JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def translate(self, texts: Texts, headers: Mapping[str, str] = JSON, **more: Any) -> tuple[int, Any]:  # noqa: ANN401
        body = json.dumps({"texts": texts, **more}).encode()
        status, found = self.ask("POST", "/v1/translate", body, headers)
        return status, [one["text"] for one in found["translations"]] if status == 200 else found

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def end(self, number: signal.Signals = signal.SIGTERM) -> Outcome:
        """Ends it, by a signal."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> Outcome:
        code = self.process.wait(PATIENCE)
        time.sleep(0.05)
        assert "Traceback" not in self.err, self.err
        return Outcome(code, "", self.err)


Start = Callable[..., Server]


def started(folder: Path, *arguments: str | Path, wait: bool = True, **environment: str) -> Server:
    line = [*KVX, "serve", *map(str, arguments)]
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder, env=ENVIRONMENT | environment
    )
    server = Server(process)
    assert process.stderr
    threading.Thread(target=server.said.extend, args=[iter(process.stderr.readline, "")], daemon=True).start()
    if wait:
        server.port = int(server.await_line(LISTENS)[1])
    return server


@pytest.fixture(scope="module")
def module_servers() -> Iterator[list[Server]]:
    servers: list[Server] = []
    yield servers
    for one in servers:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def start(tmp_path: Path, module_servers: list[Server]) -> Start:
    """Starts services, at free ports."""

    def start(*arguments: str | Path, wait: bool = True, **environment: str) -> Server:
        ports = () if "--port" in arguments or "KVX_PORT" in environment else ("--port", "0")
        module_servers.append(started(tmp_path, *arguments, *ports, wait=wait, **environment))
        return module_servers[-1]

    return start


@pytest.fixture(scope="module")
def server(
    numbers_bundle: Path, tmp_path_factory: pytest.TempPathFactory, module_servers: list[Server]
) -> Iterator[Server]:
    """One for all tests that do not end it, which ends well after them."""
    server = started(tmp_path_factory.mktemp("serve"), f"en-de={numbers_bundle}", "--port", "0", "--requests", "8")
    module_servers.append(server)
    yield server
    assert server.end().code == 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Load:
    """Clients that send requests one after the other until they are stopped."""

    def __init__(self, server: Server, clients: int = 4, text: str = LONG) -> None:
        self.statuses: list[int] = []
        self.refused = 0
        self.failed: list[BaseException] = []
        self._server = server
        self._text = text
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def await_answers(self, count: int) -> None:
        end = time.monotonic() + PATIENCE
        while len(self.statuses) < count:
            assert time.monotonic() < end
            assert not self.failed
            time.sleep(0.005)

    def _ask(self) -> None:
        while not self._stopped.is_set():
            try:
                self.statuses.append(self._server.translate(self._text)[0])
            except ConnectionRefusedError:
                self.refused += 1
                time.sleep(0.02)
            except (http.client.RemoteDisconnected, ConnectionResetError) as error:
                self.failed.append(error)
                time.sleep(0.02)


# answers


def test_a_served_translation_is_that_of_the_command(server: Server, run: Run, numbers_bundle: Path) -> None:
    texts = ["one", "twelve", "nine hundred and five", "three thousand"]
    line = ["translate", "--model", numbers_bundle, "--device", "cpu"]
    own = run(*line, stdin="\n".join(texts).encode()).out.splitlines()
    assert server.translate(texts) == (200, own)
    body = json.dumps({"q": texts, "source": "en", "target": "de"}).encode()
    assert server.ask("POST", "/translate", body) == (200, {"translatedText": own})


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_an_answer(server: Server) -> None:
    line = ["curl", "-s", f"http://127.0.0.1:{server.port}/v1/translate", "--json", '{"texts": "twelve"}']
    done = subprocess.run(line, capture_output=True, check=True, timeout=PATIENCE)
    assert json.loads(done.stdout)["translations"][0]["text"] == "zwölf"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_a_stream_of_events(server: Server) -> None:
    form = '{"texts": "nine hundred\\n\\ntwelve", "format": "text", "stream": true}'
    line = ["curl", "-sN", f"http://127.0.0.1:{server.port}/v1/translate", "--json", form]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=True)
    events = [dict(row.split(": ", 1) for row in block.split("\n")) for block in done.stdout.strip().split("\n\n")]
    tokens = [json.loads(one["data"])["text"] for one in events if one["event"] == "token"]
    assert [one["event"] for one in events[-2:]] == ["result", "end"]
    assert "".join(tokens) == json.loads(events[-2]["data"])["translation"]["text"] == "neunhundert\n\nzwölf"


def test_it_says_where_it_listens_once_it_is_ready(server: Server) -> None:
    lines = [line for line in server.said if not line.startswith("{")]
    assert re.fullmatch(r"kvx: loaded \S+ on onnx, .*\n", lines[0])
    assert LISTENS.match(lines[1])
    assert len(lines) == 2
    assert server.ask("GET", "/ready")[0] == 200


@pytest.fixture
def loading(start: Start, numbers_bundle: Path, tmp_path: Path) -> Server:
    """One that answers, and loads until there is a file `go`."""
    (tmp_path / "sitecustomize.py").write_text(
        PAUSED.format(module="kvx.runtime.backends.onnx", go=str(tmp_path / "go"))
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    port = free_port()
    server = start(numbers_bundle, "--port", str(port), wait=False, PYTHONPATH=path)
    server.port = port
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            assert server.ask("GET", "/health") == (200, {"status": "ok"})
            return server
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_ends_at_once_while_it_loads(loading: Server) -> None:
    assert loading.end().code == 0


def test_it_answers_while_it_loads(loading: Server, tmp_path: Path) -> None:
    server = loading
    assert server.ask("GET", "/ready")[0] == 503
    status, problem = server.translate("one")
    assert (status, problem["status"]) == (503, 503)
    assert "loaded" in problem["detail"]
    (tmp_path / "go").touch()
    server.await_line(LISTENS)
    assert server.translate("one") == (200, ["eins"])
    assert server.end().code == 0


# ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_after_the_requests_that_it_has(start: Start, numbers_bundle: Path, number: signal.Signals) -> None:
    server = start(numbers_bundle)
    with Load(server) as load:
        load.await_answers(5)
        assert server.end(number).code == 0
        time.sleep(0.1)
    assert set(load.statuses) <= {200, 503}
    assert load.refused > 0
    assert len(load.failed) <= 4  # connections that nobody had accepted, one of each client
    assert [one["status"] for one in server.journal].count(200) == load.statuses.count(200)


def test_a_request_that_takes_longer_than_the_grace_does_not_keep_it(start: Start, numbers_bundle: Path) -> None:
    server = start(numbers_bundle, "--grace", "0.5", "--texts", "100000", "--characters", "9000000")
    answers: list[tuple[int, Any]] = []
    asked = threading.Thread(target=lambda: answers.append(server.translate([LONG] * 4000)))
    asked.start()
    while not server.metric("kvx_active_requests"):
        time.sleep(0.01)
    begun = time.monotonic()
    assert server.end().code == 0
    assert time.monotonic() - begun < 8
    asked.join(PATIENCE)
    assert [status for status, _ in answers] == [503]


def test_while_nothing_takes_its_log_it_answers_and_ends(numbers_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    with subprocess.Popen([*KVX, "serve", numbers_bundle, "--port", str(port)], stderr=subprocess.PIPE) as process:
        server = Server(process, port=port)  # type: ignore[arg-type]
        assert process.stderr
        while not LISTENS.search(process.stderr.readline().decode()):
            assert process.poll() is None
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
            for _ in range(1500):  # lines of 130 bytes: more than a pipe holds
                connection.request("GET", "/v1/models")
                assert connection.getresponse().read()
        assert server.translate("one") == (200, ["eins"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_another_may_take_the_port_of_one_that_was_killed_at_once(start: Start, numbers_bundle: Path) -> None:
    server = start(numbers_bundle)
    with Load(server) as load:
        load.await_answers(3)
        server.process.kill()
        server.process.wait()
        again = start(numbers_bundle, "--port", str(server.port))
        assert again.port == server.port
        load.failed.clear()
        load.await_answers(len(load.statuses) + 3)
    assert again.end().code == 0


# loads again


def test_it_loads_its_bundles_again_while_requests_go_on(
    start: Start, numbers_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(numbers_bundle, tmp_path / "en-de"))
    server = start(folder, KVX_GRACE="5")
    before = server.translate("twelve")
    assert before == (200, ["zwölf"])
    with Load(server, text="twelve") as load:
        load.await_answers(2)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.01)  # it begins to load
        swap(folder, tiny_bundle)
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + PATIENCE
        while server.translate("twelve") == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        steps = server.metric("kvx_steps_total")
        (folder / "manifest.json").write_text("{}")
        since = len(server.said)
        server.process.send_signal(signal.SIGHUP)
        said = server.await_line(r"kvx: the models could not be loaded again, and the old ones stay: (.*)\n", since)[1]
        assert ". Expected " in said
        load.await_answers(len(load.statuses) + 4)
        assert server.metric("kvx_steps_total") >= steps
    assert set(load.statuses) == {200}
    assert load.failed == []
    assert server.end().code == 0


def swap(folder: Path, other: Path) -> None:
    """Puts another bundle in the place of one, as a deployment would."""
    folder.rename(folder.with_name("old"))
    shutil.copytree(other, folder)


# settings


def test_settings_come_from_the_environment(start: Start, numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(made_key(tmp_path)[1])
    port = free_port()
    server = start(
        KVX_BUNDLES=f"en-de={numbers_bundle}",
        KVX_PORT=str(port),
        KVX_KEYS=str(tmp_path / "keys"),
        KVX_TEXTS="2",
        KVX_QUIET="1",
        KVX_THREADS="1",
        KVX_BODY_KB="1",
    )
    assert server.port == port
    assert server.translate("one")[0] == 401
    assert server.end().code == 0
    assert server.journal == []


def made_key(folder: Path) -> tuple[str, str]:
    """What `kvx key alice` gives: the key, and lines for the file."""
    made = invoke("key", "alice")
    assert made.code == 0
    return re.fullmatch(r"kvx: the key of alice: (\S+)\n", made.err)[1], made.out  # type: ignore[index]


def test_a_key_opens_the_service_to_its_owner_alone(start: Start, numbers_bundle: Path, tmp_path: Path) -> None:
    key, lines = made_key(tmp_path)
    other, _ = made_key(tmp_path)
    (tmp_path / "keys").write_text(lines)
    assert len(Keys.read(tmp_path / "keys")._keys) == 1
    assert key not in lines
    server = start(numbers_bundle, "--keys", "keys", "--host", "0.0.0.0", wait=False)
    server.port = int(server.await_line(r"http://0\.0\.0\.0:(\d+)")[1])
    assert "warning" not in server.err
    assert server.translate("one", JSON | {"authorization": f"Bearer {key}"}) == (200, ["eins"])
    assert server.translate("one", JSON | {"x-api-key": key})[0] == 200
    assert server.translate("one")[0] == 401
    assert server.translate("one", JSON | {"x-api-key": other})[0] == 401
    assert server.end().code == 0
    assert [one.get("key") for one in server.journal] == ["alice", "alice", None, None]
    assert key not in server.err
    assert other not in server.err


def test_it_warns_where_others_can_reach_it_without_a_key(start: Start, numbers_bundle: Path) -> None:
    server = start(numbers_bundle, "--host", "0.0.0.0", wait=False)
    server.await_line(r"kvx: warning: 0\.0\.0\.0 can be reached by others, and nobody needs a key \(--keys\)\n")
    server.await_line(r"http://0\.0\.0\.0:\d+")
    assert server.end().code == 0


# what cannot be served


def test_what_is_no_bundle_is_refused(run: Run, bundle: Path, tmp_path: Path) -> None:
    refused(invoke("serve", tmp_path / "nothing"), "nothing")
    (tmp_path / "empty").mkdir()
    refused(invoke("serve", tmp_path / "empty"), "empty")
    refused(invoke("serve", bundle, f"en-de={bundle}"), "several bundles", "bundle")
    (bundle / "encoder.onnx").write_bytes(b"damaged")
    refused(run("serve", bundle, "--port", "0"), "encoder.onnx")


def test_without_a_bundle_it_says_how_it_is_used() -> None:
    refused_usage(invoke("serve"), "Missing argument 'bundles'")


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (("--port", "70000"), "--port"),
        (("--requests", "0"), "--requests"),
        (("--patience", "-1"), "--patience"),
        (("--timeout", "nan"), "--timeout"),
        (("--cors", "example.org"), "--cors"),
        (("--log-texts", "--quiet"), "--log-texts"),
        (("--body-kb", "0"), "--body-kb"),
        (("--keys", "nowhere"), "nowhere"),
        (("--host", "no such host"), "no such host"),
        (("--host", "203.0.113.7", "--port", "0"), "203.0.113.7"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    numbers_bundle: Path, arguments: tuple[str, ...], mention: str
) -> None:
    refused(invoke("serve", numbers_bundle, *arguments), mention)


def test_what_is_no_number_is_refused_with_the_usage(numbers_bundle: Path) -> None:
    refused_usage(invoke("serve", numbers_bundle, "--port", "http"), "--port")


def test_a_file_of_keys_that_is_none_is_refused(numbers_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for text in ("no toml", '["a"]\nsha256 = "0"', "a = 1", f'["a"]\nsha256 = "{"0" * 64}"\nrequests = 0'):
        keys.write_text(text)
        refused(invoke("serve", numbers_bundle, "--keys", keys))


def test_a_port_that_another_has_is_refused(server: Server, numbers_bundle: Path) -> None:
    refused(invoke("serve", numbers_bundle, "--port", str(server.port)), str(server.port), "--port")


# logs


def bad_requests(server: Server) -> None:
    """Requests whose texts, in any field, would be told in an error."""
    forms: list[dict[str, Any]] = [
        {"texts": SECRET, "source_language": SECRET, "target_language": "de"},
        {"texts": SECRET, "target_language": SECRET},
        {"texts": SECRET, "model": SECRET},
        {"texts": SECRET, SECRET: 1},
        {"texts": SECRET, "format": SECRET},
        {"texts": SECRET, "beam_size": SECRET},
        {"texts": SECRET, "prefix": f"{SECRET} \u3042\U0001f600"},
        {"texts": [SECRET * 200], "on_long": "refuse"},
        {"texts": [[999_999]], "never": [SECRET]},
        {"texts": SECRET, "text_prefix": SECRET, "stream": True, "on_long": "error"},
        {"texts": f"{SECRET} " * 100, "stream": True},
    ]
    for form in forms:
        with contextlib.suppress(json.JSONDecodeError):
            server.ask("POST", "/v1/translate", json.dumps(form).encode())
    for body in (
        {"q": SECRET, "source": SECRET, "target": "de"},
        {"q": SECRET, "source": "en", "target": SECRET},
        {"q": SECRET, "source": "en", "target": "de", "format": SECRET},
        {"q": SECRET * 500, "source": "en", "target": "de"},
    ):
        server.ask("POST", "/translate", json.dumps(body).encode())
    server.ask("POST", "/v1/score", json.dumps({"texts": [SECRET], "translations": [SECRET, SECRET]}).encode())
    server.ask("POST", "/v1/alternatives", json.dumps({"text": SECRET, "prefix": SECRET * 200}).encode())
    server.ask("POST", "/v1/translate", SECRET.encode())
    server.ask("POST", "/v1/translate", b"{}", {"content-type": SECRET})
    server.ask("GET", f"/{SECRET}?{SECRET}")
    server.ask("POST", f"/translate?q={SECRET}&source={SECRET}&target=de", b"")


def test_each_request_is_a_line_of_the_log_without_its_texts(start: Start, numbers_bundle: Path) -> None:
    server = start(f"en-de={numbers_bundle}")
    assert server.translate(["one", "twelve"])[0] == 200
    bad_requests(server)
    assert server.end().code == 0
    assert SECRET not in server.err
    assert "twelve" not in server.err
    first = server.journal[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert first["ms"] > 0
    assert {name: value for name, value in first.items() if name not in ("time", "ms", "tokens")} == {
        "route": "/v1/translate",
        "status": 200,
        "client": "127.0.0.1",
        "texts": 2,
        "characters": 9,
        "model": numbers_bundle.name,
    }
    assert len(server.journal) == 21
    assert {one["status"] for one in server.journal} <= {200, 400, 413, 415}
    assert all(one.get("error") for one in server.journal if one["status"] != 200)


def test_texts_are_logged_where_that_is_wanted(start: Start, numbers_bundle: Path) -> None:
    server = start(f"en-de={numbers_bundle}", "--log-texts")
    assert server.translate(["one", "twelve"])[0] == 200
    bad_requests(server)
    assert server.end().code == 0
    assert server.journal[0]["given"] == ["one", "twelve"]
    assert sum(SECRET in one.get("error", "") for one in server.journal) >= 5
