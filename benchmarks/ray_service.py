"""What Ray Serve adds to the service: its start, its memory, and a file sent line by line to it and to `kvx serve`.

    python benchmarks/ray_service.py artifacts/my-model --text lines.txt

Both run beside each other with the same threads, and are sent the file in turns. The clients are a process of their own
on the same cores. Ray is started by `serve run`, on this machine alone, with one replica.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import ray

from kvx.benchmarks.service import send, start
from kvx.runtime.system import cpu_model
from kvx.scripts.ray_nodes import children

PORT = 8000  # of Ray Serve
APPLICATION = "kvx.runtime.serving.ray_app:app"
PSS = re.compile(r"Pss:\s+(\d+) kB")
PATIENCE = 180.0


def start_ray(bundle: Path) -> subprocess.Popen[bytes]:
    """A replica of `serve run`, ready to answer."""
    command = [str(Path(sys.executable).with_name("serve")), "run", APPLICATION, f"bundles={bundle}", "quiet=1"]
    log = Path(tempfile.mkdtemp()) / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5) as answer:
            if answer.status == 200:
                return server
        time.sleep(0.05)
    raise RuntimeError(log.read_text(encoding="utf-8"))


def mebibytes(root: int) -> float:
    """The proportional share of memory of a process and all that it has started."""
    return sum(_pss(process) for process in _family(root)) / 1024


def cpu_seconds(root: int) -> float:
    """What a process and all that it has started have computed so far."""
    return sum(_ticks(process) for process in _family(root)) / os.sysconf("SC_CLK_TCK")


def _family(root: int) -> Iterator[int]:
    yield root
    for child in children(root):
        yield from _family(child)


def _pss(process: int) -> int:
    with contextlib.suppress(OSError):
        found = PSS.search(Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii"))
        return int(found[1]) if found else 0
    return 0


def _ticks(process: int) -> int:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def sent(port: int, root: int, lines: list[str], clients: int) -> tuple[float, float, list[str]]:
    """All lines, one request each → seconds, milliseconds of CPU of the server for each, and the translations."""
    before = cpu_seconds(root)
    seconds, found = asyncio.run(send(port, lines, clients, {}))
    return seconds, 1000 * (cpu_seconds(root) - before) / len(lines), found


def main() -> None:
    """Prints what the starts took, a line a round, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    lines = given.text.read_text(encoding="utf-8").splitlines()
    print(f"{cpu_model()}, {os.cpu_count()} cores, Ray {ray.__version__}; {given.bundle}; {given.clients} clients")
    begun = time.perf_counter()
    own, port = start(given.bundle, "--quiet")
    print(f"kvx serve is ready after {time.perf_counter() - begun:.1f} s, {mebibytes(own.pid):.0f} MiB")
    begun = time.perf_counter()
    on_ray = start_ray(given.bundle)
    print(f"serve run is ready after {time.perf_counter() - begun:.1f} s, {mebibytes(on_ray.pid):.0f} MiB", flush=True)
    ratios = []
    try:
        for number in range(given.rounds + 1):
            first, cost, there = sent(port, own.pid, lines, given.clients)
            second, cost_on_ray, here = sent(PORT, on_ray.pid, lines, given.clients)
            same = sum(one == other for one, other in zip(there, here, strict=True))
            if number:  # the first one warms both up
                ratios.append(first / second)
                print(
                    f"kvx serve {len(lines) / first:.1f} lines/s, {cost:.1f} ms of CPU each; Ray Serve "
                    f"{len(lines) / second:.1f} lines/s, {cost_on_ray:.1f} ms; ratio {ratios[-1]:.2f}, {same} the same",
                    flush=True,
                )
        print(f"after it: kvx serve {mebibytes(own.pid):.0f} MiB, Ray {mebibytes(on_ray.pid):.0f} MiB")
    finally:
        own.send_signal(signal.SIGTERM)
        on_ray.send_signal(signal.SIGINT)
        print(f"they ended with {own.wait(60)} and {on_ray.wait(60)}")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
