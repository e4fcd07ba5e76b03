"""What the defaults rest on: rows, encoder groups, threads and workers, measured in one interleaved run.

    python benchmarks/settings.py BUNDLE TEXT [--repeat 5]

Prints a Markdown table of seconds per run over the lines of TEXT: minimum and median of the repetitions. Compare rows
of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.lines import open_lines, read_lines


@dataclass(frozen=True, slots=True)
class Setting:
    """`threads` compute threads an operator, `workers` decode loops of `rows` rows, the encoder run on `group`."""

    threads: int
    workers: int
    rows: int
    group: int


def settings(threads: int) -> list[Setting]:
    """What is compared: the default with one thing changed at a time."""
    default = Setting(threads=1, workers=threads, rows=64, group=16)
    return [
        default,
        *(replace(default, group=group) for group in (4, 8, 32, 64)),
        *(replace(default, rows=rows) for rows in (8, 16, 32, 128)),
        replace(default, workers=1),
        replace(default, threads=threads, workers=1),
        replace(default, threads=threads),
    ]


def seconds(model: LoadedModel, sources: list[Sentence], setting: Setting) -> float:
    """Wall time to decode all sources, longest first."""
    options = TranslateOptions(rows=setting.rows, workers=setting.workers)
    plan, workers = model.plan(options)
    plan = replace(plan, group=setting.group)

    def decoded(share: list[Sentence]) -> int:
        return sum(1 for _ in decode(model.backend, share, Greedy(), plan))

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        count = sum(threads.map(decoded, [sources[number::workers] for number in range(workers)]))
    assert count == len(sources)
    return time.perf_counter() - started


def main() -> None:
    """Runs every setting in turn, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    models = {n: LoadedModel.load(bundle, threads=n) for n in {1, arguments.threads}}
    with open_lines(arguments.text) as stream:
        texts = models[1].sources.read(read_lines(stream))
        found = [text.ids for text in texts if text.ids]
    found.sort(key=len, reverse=True)
    measured: dict[Setting, list[float]] = {setting: [] for setting in settings(arguments.threads)}
    for _ in range(arguments.repeat):
        for setting, times in measured.items():
            sources = [Sentence(number, ids) for number, ids in enumerate(found)]
            times.append(seconds(models[setting.threads], sources, setting))
    print(f"{len(found)} sentences, {arguments.repeat} interleaved runs\n")
    header = ("threads", "workers", "rows", "group", "minimum s", "median s", "sentences/s")
    rows = (
        (
            *(setting.threads, setting.workers, setting.rows, setting.group),
            *(f"{min(times):.2f}", f"{statistics.median(times):.2f}", f"{len(found) / min(times):.0f}"),
        )
        for setting, times in measured.items()
    )
    print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    main()
