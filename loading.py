"""While the modules of the `kvx` command load, Ctrl-C ends it at once and quietly: there is nothing to clean up yet.

The package imports this first, because importing the rest takes most of the time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process without a traceback: a handler for Ctrl-C."""
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    """Whether this process is `kvx` or `python -m kvx`, and not a program that imports the package."""
    if sys.argv[:1] == ["-m"]:  # the package of `python -m` is being imported
        return "kvx" in {sys.orig_argv[place + 1] for place, one in enumerate(sys.orig_argv[:-1]) if one == "-m"}
    return Path(sys.argv[0] if sys.argv else "").stem in ("kvx", "kvx-script")


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and _is_command()
):
    signal.signal(signal.SIGINT, end)
