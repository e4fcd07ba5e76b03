"""How much memory this process had resident at its peak."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the peak to what is resident now


def reset_peak() -> None:
    """Makes `peak_bytes` count from here on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def peak_bytes() -> int | None:
    """The largest resident set, in bytes, since the start or the last reset; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
