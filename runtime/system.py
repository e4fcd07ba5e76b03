"""What the machine offers, and how much of its memory this process takes."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
WIDE_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # add products of bytes in 32 bits
CGROUP = Path("/sys/fs/cgroup")
CFS = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
RESET_PEAK = "5"  # proc(5): resets the peak to what is resident now


def reset_peak() -> None:
    """Makes `peak_bytes` count from here on, on systems that can (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def peak_bytes() -> int | None:
    """The largest resident set, in bytes, since the start or the last reset; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def available_threads(cgroup: Path = CGROUP) -> int:
    """The cores that this process may use: those of its affinity mask, but no more than its container's quota has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """How many cores' time a container may take: cpu.max of cgroup v2, cpu.cfs_quota_us of v1; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else float(limit) / float(period)
    with contextlib.suppress(OSError, ValueError):
        limit, period = ((cgroup / "cpu" / name).read_text(encoding="ascii") for name in CFS)
        return None if float(limit) < 0 else float(limit) / float(period)
    return None


def bytes_saturate(cpuinfo: Path = CPUINFO) -> bool:
    """Whether pairs of products of an unsigned and a signed byte may overflow 16 bits here: on x86 without VNNI, and
    where nothing tells.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return WIDE_PRODUCTS.isdisjoint(flags)


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The name that the CPU gives itself, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(\S.*?)\s*$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1] if found else platform.processor() or platform.machine() or "unknown CPU"
