"""Whether the service stays itself under twice what it can do: kvx serve, overloaded for ten minutes.

    python benchmarks/soak.py artifacts/my-model --text lines.txt

It first measures how many requests the service answers a second. Then requests come at twice that rate, at random
moments, whether others are answered or not: single texts, streams and paragraphs, each on one of many connections that
stay open. The client is a process of its own on the same cores. Exits with 1 where a status is none of 200, 429 and
503, where memory grows, where the idle service is busy, or where it does not end well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvx.benchmarks.service import start
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.system import cpu_model

ALLOWED = (200, 429, 503)
KINDS = {"single": 0.7, "stream": 0.2, "paragraph": 0.1}  # shares of the requests
SENTENCES = 5  # of a paragraph
GROWTH = 1.05  # of memory, from the first third to the last
IDLE_SECONDS = 10.0
UNUSED_SECONDS = 15.0  # of a connection
IDLE_SHARE = 0.005  # of a core: what the idle service may take
WARM_SECONDS = 30.0  # of overload before anything is counted: until then memory grows
CLOSED_CLIENTS = 64
CLIENT_REQUESTS = 1000  # more than are let in and wait: not this one client is to blame, but all together
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Found:
    """What came of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, a value a second


@dataclass(slots=True)
class Connections:
    """Connections that stay open, each for one request at a time."""

    port: int
    idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)  # and since when

    @asynccontextmanager
    async def one(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """One of them, or a new one. It is closed after an error, and after a while, before the service does so."""
        while self.idle and time.perf_counter() - self.idle[0][0] > UNUSED_SECONDS:
            self.idle.pop(0)[2].close()
        found = self.idle.pop()[1:] if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield found
        except BaseException:
            found[1].close()
            raise
        if not found[1].is_closing():
            self.idle.append((time.perf_counter(), *found))

    def close(self) -> None:
        """Closes those that are idle."""
        for _, _, writer in self.idle:
            writer.close()
        self.idle.clear()


async def ask(connections: Connections, kind: str, texts: list[str]) -> int:
    """One request → its status. Raises RuntimeError where the answer is not whole."""
    form: dict[str, Any] = {"texts": texts[:1], "stream": kind == "stream"}
    if kind == "paragraph":
        form = {"texts": " ".join(texts), "format": "text"}
    body = json.dumps(form).encode()
    head = f"POST /v1/translate HTTP/1.1\r\nhost: kvx\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    async with connections.one() as (reader, writer):
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(answer)
        found = await reader.readexactly(int(length[1])) if length is not None else await _chunks(reader)
        if b"connection: close" in answer:
            writer.close()
    status = int(answer.split(b" ", 2)[1])
    if status == 200 and not (found.endswith(b"event: end\ndata: {}\n\n") if kind == "stream" else b'"text"' in found):
        raise RuntimeError(f"the answer is not whole: {found[-200:]!r}")
    if status != 200 and b"retry-after: " not in answer:
        raise RuntimeError(f"{status} without Retry-After")
    return status


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while size := int(await reader.readline(), 16):
        found += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return found


def mixed(lines: list[str], chance: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Requests without end: a kind, and texts."""
    while True:
        [kind] = chance.choices(list(KINDS), list(KINDS.values()))
        yield kind, chance.sample(lines, SENTENCES)


async def saturated(port: int, lines: list[str], seconds: float) -> float:
    """Answers a second, where each client sends a request as soon as it has an answer."""
    connections, requests, done = Connections(port), mixed(lines, random.Random(1)), 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            kind, texts = next(requests)
            status = await ask(connections, kind, texts)
            done += status == 200

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLOSED_CLIENTS)))
    connections.close()
    return done / (time.perf_counter() - begun)


async def overload(port: int, pid: int, lines: list[str], rate: float, seconds: float) -> Found:
    """Requests at this rate, for so long, and what came of them."""
    chance, found, connections = random.Random(2), Found(), Connections(port)
    running: set[asyncio.Task[None]] = set()

    async def one(kind: str, texts: list[str]) -> None:
        begun = time.perf_counter()
        try:
            status = await ask(connections, kind, texts)
        except Exception as error:
            found.statuses[type(error).__name__] += 1
            found.wrong.append(repr(error))
            return
        found.statuses[str(status)] += 1
        if status == 200:
            found.seconds[kind].append(time.perf_counter() - begun)

    async def watch() -> None:
        while True:
            found.memory.append(memory_of(pid))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    due = begun = time.perf_counter()
    for kind, texts in mixed(lines, chance):
        due += chance.expovariate(rate)
        if due > begun + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.add(task := asyncio.create_task(one(kind, texts)))
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    watching.cancel()
    connections.close()
    return found


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_of(pid: int) -> float:
    """Seconds that a process has computed for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def tables(found: Found) -> Iterator[str]:
    """Statuses, times and memory."""
    yield from markdown_table(("status", "requests"), sorted(found.statuses.items()))
    yield ""
    every = {**found.seconds, "all": [one for times in found.seconds.values() for one in times]}
    rows = []
    for kind, times in every.items():
        cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [0.0] * 99
        rows.append((kind, len(times), *(f"{cuts[percent - 1]:.2f}" for percent in (50, 95, 99))))
    yield from markdown_table(("accepted", "requests", "p50, s", "p95, s", "p99, s"), rows)


def main() -> None:
    """Prints tables, and what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--measure-seconds", type=float, default=15)
    given = parser.parse_args()
    lines = [line for line in given.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    server, port = start(given.bundle, "--client-requests", str(CLIENT_REQUESTS))
    problems = []
    try:
        asyncio.run(saturated(port, lines, 3))
        rate = asyncio.run(saturated(port, lines, given.measure_seconds))
        print(f"{cpu_model()}, {os.cpu_count()} cores; {given.bundle}", flush=True)
        print(f"{rate:.0f} requests/s are answered; {2 * rate:.0f} come, for {given.seconds:g} s\n", flush=True)
        asyncio.run(overload(port, server.pid, lines, 2 * rate, WARM_SECONDS))
        found = asyncio.run(overload(port, server.pid, lines, 2 * rate, given.seconds))
        print("\n".join(tables(found)))
        third = max(1, len(found.memory) // 3)
        first, last = statistics.median(found.memory[:third]), statistics.median(found.memory[-third:])
        tenths = [one / 2**20 for one in found.memory[:: max(1, len(found.memory) // 10)]]
        print(f"\nmemory, MiB: {', '.join(f'{one:.0f}' for one in tenths)}")
        print(f"memory: {first / 2**20:.0f} MiB in the first third, {last / 2**20:.0f} MiB in the last")
        time.sleep(1)
        before = cpu_of(server.pid)
        time.sleep(IDLE_SECONDS)
        idle = (cpu_of(server.pid) - before) / IDLE_SECONDS
        print(f"idle: {idle:.1%} of a core")
        problems += [f"{count} requests: {one}" for one, count in Counter(found.wrong).most_common(5)]
        if others := found.statuses.keys() - {str(one) for one in ALLOWED}:
            problems.append(f"there are answers of other kinds: {', '.join(sorted(others))}")
        if last > GROWTH * first:
            problems.append("memory has grown")
        if idle > IDLE_SHARE:
            problems.append("the idle service is busy")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        print(f"the server ended with {code}")
    if code:
        problems.append("the server did not end well")
    print("\n".join(problems or ["all holds"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
