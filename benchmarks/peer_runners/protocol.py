"""How benchmarks/peers.py talks to a runner: a JSON request a line on stdin, a JSON reply a line on stdout.

{"load": {"key": …, …}} and {"run": {"key": …, "sentences": [[ids]], …}} reply with {"seconds": …, "peak_mb": …}, a run
also with the {"ids": [[ids after bos]]} of every sentence; {"prepare": {…}}, {"unload": {"key": …}} and
{"versions": {}} do what they say. What fails replies {"error": …}.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Request = Mapping[str, Any]
Ids = list[list[int]]


class Timed(NamedTuple):
    """Seconds for the translation alone, and the ids of every sentence after bos, in order."""

    seconds: float
    ids: Ids


class Runner(NamedTuple):
    """What a peer does: `prepare` its files, `load` an engine for a setting, `run` it."""

    prepare: Callable[[Request], None]
    load: Callable[[Request], Any]
    run: Callable[[Any, Request], Timed]


def serve(runner: Runner) -> None:
    """Answers requests until stdin ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engines: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = _answer(runner, engines, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def longest_first(sentences: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """The numbers of the sentences in batches of `rows`, longest first."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]), reverse=True)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def _answer(runner: Runner, engines: dict[str, Any], request: dict[str, Request]) -> dict[str, object]:
    ((command, options),) = request.items()
    match command:
        case "prepare":
            runner.prepare(options)
        case "load":
            started = time.perf_counter()
            engines[options["key"]] = runner.load(options)
            return {"seconds": time.perf_counter() - started, "peak_mb": _peak_mb()}
        case "run":
            timed = runner.run(engines[options["key"]], options)
            return {"seconds": timed.seconds, "ids": timed.ids, "peak_mb": _peak_mb()}
        case "unload":
            del engines[options["key"]]
            gc.collect()
        case "versions":
            found = [*importlib.metadata.distributions()]  # in the order of the path, where the first one counts
            return {package.name: package.version for package in reversed(found)}
    return {"ok": True}


def _peak_mb() -> float | None:
    """The largest resident set so far, where the system tells."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
