"""The log of requests: lines in JSON, which no request waits for."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from typing import Any

import pytest

pytest.importorskip("msgspec")

from kvx.runtime.serving import journal
from kvx.runtime.serving.journal import Journal


class Blocking(io.StringIO):
    """A stream that takes nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()

    def write(self, text: str) -> int:
        assert self.opened.wait(20)
        return super().write(text)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_what_is_noted_is_written_in_order_with_its_time() -> None:
    stream = io.StringIO()
    with Journal(stream) as log:
        for number in range(100):
            log.note({"number": number, "text": "zwölf\n"})
    found = lines(stream)
    assert [one["number"] for one in found] == list(range(100))
    assert found[0]["text"] == "zwölf\n"
    assert next(iter(found[0])) == "time"
    assert [one["time"] for one in found] == sorted(one["time"] for one in found)


def test_what_is_noted_is_written_soon() -> None:
    stream = io.StringIO()
    with Journal(stream) as log:
        for number in range(3):
            log.note({"number": number})
            end = time.monotonic() + 10
            while len(lines(stream)) <= number:
                assert time.monotonic() < end
                time.sleep(0.01)


def test_without_a_stream_nothing_is_kept() -> None:
    with Journal(None) as log:
        log.note({"number": 1})
        assert not log._facts


def test_nobody_waits_for_a_reader_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SECONDS", 0.01)
    monkeypatch.setattr(journal, "MOST_LINES", 50)
    stream = Blocking()
    begun = time.monotonic()
    with Journal(stream) as log:
        log.note({"number": -1})
        time.sleep(0.1)  # by now it writes
        for number in range(1000):
            log.note({"number": number})
        assert time.monotonic() - begun < 5
        assert len(log._facts) == 50
        stream.opened.set()
    found = lines(stream)
    assert [one["number"] for one in found[:-1]] == [-1, *range(50)]
    assert found[-1]["dropped_lines"] == 950


def test_the_end_waits_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SECONDS", 0.01)
    stream = Blocking()
    begun = time.monotonic()
    with Journal(stream) as log:
        log.note({"number": 1})
    assert time.monotonic() - begun < 5
    stream.opened.set()


def test_a_reader_that_has_gone_away_is_no_trouble() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with Journal(stream) as log:
        for number in range(10):
            log.note({"number": number})
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_a_line_that_cannot_be_written_takes_no_other_with_it() -> None:
    stream = io.StringIO()
    with Journal(stream) as log:
        log.note({"text": "\ud800"})
        log.note({"number": 1})
    found = lines(stream)
    assert "unwritable" in found[0]
    assert found[1]["number"] == 1
