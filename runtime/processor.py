"""What the processor has to offer."""

from __future__ import annotations

import os
import platform
from pathlib import Path

WIDE_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # add products of bytes in 32 bits


def available_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether pairs of products of an unsigned and a signed byte may overflow here, in 16 bits: on x86 without VNNI,
    and where nothing tells.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return WIDE_PRODUCTS.isdisjoint(flags)
