"""Signals that end a command: it cleans up what it has begun to write, whichever signal it is."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from kvx import loading

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
OFFSET = 128  # shells tell of a signal by its number and this


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP end the process with exit code 128 + n after what has been begun is undone, as
    Ctrl-C does with 130. Those that are ignored, as by nohup, stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: _end for number in ENDING if signal.getsignal(number) is signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if signal.getsignal(signal.SIGINT) is loading.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """Others that follow, as they do when a session ends, must not cut the cleaning up short."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(OFFSET + number)
