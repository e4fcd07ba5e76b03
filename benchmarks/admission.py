"""What it gives to let newcomers wait for each other, and to let similar lengths pass: one interleaved run.

    python benchmarks/admission.py BUNDLE TEXT [--share 0.7] [--requests 1500] [--repeat 3]

Requests are the lines of TEXT, at random moments, at a share of what the engine can serve. Prints a Markdown table:
milliseconds from the arrival of a request to its translation and to its first token, sources for each run of the
encoder, the share of its positions that was padding, and the most that came later and were let in before a request.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.engine import waiting, workers
from kvx.runtime.engine.core import Core, EngineOptions
from kvx.runtime.engine.engine import Engine
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.request import Request
from kvx.runtime.measuring.arrivals import Continuous, Run, full_rate, moments, serve
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.options import TranslateOptions
from kvx.runtime.system import cpu_model
from kvx.runtime.text.lines import read_file


@dataclass(frozen=True, slots=True)
class Setting:
    """Steps that newcomers wait for others, waiting requests among which similar lengths are looked for, and requests
    that may overtake one.
    """

    gather: int
    looked_at: int
    overtaken: int


SETTINGS = [
    Setting(0, 64, 64),
    Setting(1, 64, 64),
    Setting(4, 64, 64),
    Setting(8, 64, 64),
    Setting(16, 64, 64),
    Setting(4, 16, 64),
    Setting(4, 64, 16),
    Setting(4, 256, 256),
]


@dataclass(slots=True)
class Counted:
    """A backend that counts what its encoder gets."""

    backend: Backend
    runs: int = 0
    sources: int = 0
    positions: int = 0
    padding: int = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever a backend has
        return getattr(self.backend, name)

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """Counts, and encodes."""
        self.runs += 1
        self.sources += len(input_ids)
        self.positions += input_ids.size
        self.padding += input_ids.size - int(source_lengths.sum())
        return self.backend.encode(input_ids, source_lengths)


@dataclass(slots=True)
class Measured:
    """Of one setting, a value for each repetition."""

    median: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    group: list[float] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    overtaken: list[int] = field(default_factory=list)


class Overtaken(waiting.Waiting):
    """Notes the most that a request was overtaken."""

    most = 0

    def take(self, lane: Any, most: int, room: Any) -> list[Request]:  # noqa: ANN401  # as the original
        """As the original."""
        found = super().take(lane, most, room)
        Overtaken.most = max(Overtaken.most, *(one.overtaken for one in found), 0)
        return found


def measure(model: LoadedModel, texts: list[str], setting: Setting, at: np.ndarray[Any, Any], into: Measured) -> Run:
    """One run of an engine of its own."""
    workers.GATHER_STEPS, waiting.LOOKED_AT, waiting.MOST_OVERTAKEN = (
        setting.gather,
        setting.looked_at,
        setting.overtaken,
    )
    Overtaken.most = 0
    counted = [Counted(backend) for backend in model.backends]
    model.backends = tuple(counted)
    with Engine(Core(model, EngineOptions(max_waiting=100_000))) as engine:
        run = serve(Continuous(engine, TranslateOptions()), texts, at)
    model.backends = tuple(one.backend for one in counted)
    times = [1000 * (one.done - one.due) for one in run.arrivals]
    into.median.append(float(np.percentile(times, 50)))
    into.high.append(float(np.percentile(times, 95)))
    into.first.append(float(np.percentile([1000 * (one.first - one.due) for one in run.arrivals], 50)))
    into.group.append(sum(one.sources for one in counted) / sum(one.runs for one in counted))
    into.padding.append(sum(one.padding for one in counted) / sum(one.positions for one in counted))
    into.overtaken.append(Overtaken.most)
    return run


def main() -> None:
    """Runs every setting in turn, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    vars(workers)["Waiting"] = Overtaken  # what the workers make
    model = LoadedModel.load(Bundle.open(arguments.bundle), threads=arguments.threads, workers=arguments.threads)
    texts = [text for text in read_file(arguments.text) if text.strip()]
    full = [full_rate(measure(model, texts, SETTINGS[2], np.zeros(1000), Measured())) for _ in range(arguments.repeat)]
    rate = arguments.share * statistics.median(full)
    found = {setting: Measured() for setting in SETTINGS}
    for repetition in range(arguments.repeat):
        at = moments(rate, arguments.requests, repetition)
        for setting, into in found.items():
            measure(model, texts, setting, at, into)
    print(f"{cpu_model()}: {rate:.0f} requests/s, {arguments.share:.0%} of {statistics.median(full):.0f}\n")
    header = ("gather", "looked at", "may overtake", "median", "95 %", "first token", "a run", "padding", "overtaken")
    rows = (
        (
            *(setting.gather, setting.looked_at, setting.overtaken),
            *(f"{statistics.median(values):.1f}" for values in (one.median, one.high, one.first, one.group)),
            f"{statistics.median(one.padding):.1%}",
            max(one.overtaken),
        )
        for setting, one in found.items()
    )
    print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    main()
