"""The log of requests: a JSON object a line, written beside the requests, which never wait for whoever reads it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self, TextIO

import msgspec

SECONDS = 0.2  # between two writes
MOST_LINES = 10_000  # that wait to be written; further ones are dropped, and counted


class Journal:
    """Writes what is noted to a stream, in a thread of its own, within `with`. None writes nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._facts: deque[tuple[float, Mapping[str, Any]]] = deque()
        self._dropped = 0
        self._ended = threading.Event()
        self._there = threading.Event()  # is something to write, or the end
        self._writer = threading.Thread(target=self._write, name="kvx journal", daemon=True)

    def note(self, facts: Mapping[str, Any]) -> None:
        """A line, soon."""
        if self._stream is None:
            return
        if len(self._facts) < MOST_LINES:
            self._facts.append((time.time(), facts))
        else:
            self._dropped += 1
        if not self._there.is_set():
            self._there.set()

    def __enter__(self) -> Self:
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Writes what is left, unless nobody takes it. It may be called again."""
        self._ended.set()
        self._there.set()
        self._writer.join(5 * SECONDS)

    def _write(self) -> None:
        ended = False
        while not ended:
            self._there.wait()
            ended = self._ended.wait(SECONDS)
            self._there.clear()  # before anything is taken: what comes later sets it again
            lines = [_line(*self._facts.popleft()) for _ in range(len(self._facts))]
            if self._dropped:
                lines.append(_line(time.time(), {"dropped_lines": self._dropped}))
                self._dropped = 0
            if lines and self._stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._stream.write("".join(lines))
                    self._stream.flush()


def _line(moment: float, facts: Mapping[str, Any]) -> str:
    told = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(1000 * (moment % 1)):03d}Z"
    try:
        return msgspec.json.encode({"time": told, **facts}).decode() + "\n"
    except (TypeError, ValueError) as error:
        return msgspec.json.encode({"time": told, "unwritable": type(error).__name__}).decode() + "\n"
