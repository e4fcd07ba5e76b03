"""What the service adds to a translation: a file sent line by line by many clients, beside `kvx translate` on the file.

    python benchmarks/service.py artifacts/my-model --text lines.txt --reference reference.jsonl

Each round runs `kvx translate` (its own time without loading, as --stats tells it) and then sends every line as a
request of its own to a `kvx serve` on loopback. The clients are a process of their own on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvx.runtime.system import cpu_model

KVX = [sys.executable, "-m", "kvx"]
LISTENS = re.compile(r"http://127\.0\.0\.1:(\d+)")
SPEED = re.compile(r"([\d.,]+) sentences/s")


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, form: dict[str, Any]) -> Any:  # noqa: ANN401
    """One request on a connection that stays open → its answer in JSON."""
    body = json.dumps(form).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: kvx\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    status = int(answer.split(b" ", 2)[1])
    length = int(re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)[1])  # type: ignore[index]
    found = json.loads(await reader.readexactly(length))
    if status != 200:
        raise RuntimeError(f"{status}: {found}")
    return found


async def send(port: int, lines: list[str], clients: int, languages: dict[str, str]) -> tuple[float, list[str]]:
    """All lines, one request each, by clients that each have one under way → seconds, and the translations."""
    found, left = [""] * len(lines), iter(enumerate(lines))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number, line in left:
            answer = await post(reader, writer, "/v1/translate", {"texts": [line], "beam_size": 1, **languages})
            found[number] = answer["translations"][0]["text"]
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begun, found


def translate(bundle: Path, text: Path) -> tuple[float, list[str]]:
    """`kvx translate` on the file → lines/s of its decoding, and the translations."""
    command = [*KVX, "translate", "--model", str(bundle), "-i", str(text), "--beam-size", "1", "--stats"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    speed = SPEED.search(done.stderr)
    if speed is None:
        raise RuntimeError(done.stderr)
    return float(speed[1].replace(",", "")), done.stdout.splitlines()


def start(bundle: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """A `kvx serve` on a free port, ready to answer."""
    command = [*KVX, "serve", str(bundle), "--port", "0", *options]
    log = Path(tempfile.mkdtemp()) / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stderr=file)
    while server.poll() is None:
        if listens := LISTENS.search(log.read_text(encoding="utf-8")):
            return server, int(listens[1])
        time.sleep(0.05)
    raise RuntimeError(log.read_text(encoding="utf-8"))


def main() -> None:
    """Prints a line a round, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="JSON lines with the text of each translation")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    lines = given.text.read_text(encoding="utf-8").splitlines()
    server, port = start(given.bundle)
    print(f"{cpu_model()}, {os.cpu_count()} cores; {given.bundle}; {given.clients} clients, {len(lines)} lines")
    ratios = []
    try:
        asyncio.run(send(port, lines[:200], given.clients, {}))
        for _ in range(given.rounds):
            speed, own = translate(given.bundle, given.text)
            seconds, served = asyncio.run(send(port, lines, given.clients, {}))
            ratios.append(len(lines) / seconds / speed)
            same = sum(one == other for one, other in zip(own, served, strict=True))
            print(
                f"kvx translate {speed:6.1f} lines/s, service {len(lines) / seconds:6.1f} lines/s, "
                f"ratio {ratios[-1]:.2f}, {same} lines the same",
                flush=True,
            )
        if given.reference is not None:
            with given.reference.open(encoding="utf-8") as file:
                wanted = [json.loads(line)["text"] for line in file]
            print(f"{sum(one == other for one, other in zip(wanted, served, strict=True))} lines are the reference's")
    finally:
        server.send_signal(signal.SIGTERM)
        print(f"the server ended with {server.wait(60)}")
    print(f"ratio: median {statistics.median(ratios):.2f}, best {max(ratios):.2f}")


if __name__ == "__main__":
    main()
