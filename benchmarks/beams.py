"""What beams cost: a beam search against greedy at the same number of rows, interleaved in one run.

    python benchmarks/beams.py BUNDLE TEXT [--sizes 2,4,8] [--rows 64] [--sentences] [--repeat 5] [--limit N]

One decode loop of one thread, longest first. With --sentences as many sentences at a time as greedy has rows, each of
as many rows as it has beams. Prints a Markdown table: median and least seconds over the lines of TEXT, median seconds
of processor time, which other processes disturb less, steps, and the ratios of both medians to greedy's. Compare rows
of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

from kvx import TranslateOptions, Translator
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.text.lines import open_lines, read_lines


def seconds(translator: Translator, texts: list[str], options: TranslateOptions) -> tuple[float, float, int]:
    """Wall time and processor time to translate all texts, and the steps it took."""
    stats, started, used = DecodeStats(), time.perf_counter(), time.process_time()
    count = sum(1 for _ in translator.translate_iter(texts, options, stats))
    assert count == len(texts)
    return time.perf_counter() - started, time.process_time() - used, stats.steps


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sizes", default="2,4,8")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sentences", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with open_lines(arguments.text) as stream:
        texts = list(itertools.islice(read_lines(stream), arguments.limit))
    translator = Translator.load(arguments.bundle, threads=1)
    sizes = [1, *map(int, arguments.sizes.split(","))]
    runs: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    steps = dict.fromkeys(sizes, 0)
    for _, size in itertools.product(range(arguments.repeat + 1), sizes):
        rows = arguments.rows * (size if arguments.sentences else 1)
        options = TranslateOptions(rows=rows, workers=1, window=len(texts), beam_size=size)
        *taken, steps[size] = seconds(translator, texts, options)
        runs[size].append((taken[0], taken[1]))  # the first of each warms up
    walls, used = ({size: [one[which] for one in runs[size][1:]] for size in sizes} for which in (0, 1))
    wall, processor = ({size: statistics.median(of[size]) for size in sizes} for of in (walls, used))
    table = (
        (
            size,
            f"{wall[size]:.2f}",
            f"{min(walls[size]):.2f}",
            f"{processor[size]:.2f}",
            steps[size],
            f"{wall[size] / wall[1]:.2f}",
            f"{processor[size] / processor[1]:.2f}",
        )
        for size in sizes
    )
    headings = ("beams", "median s", "least s", "processor s", "steps", "times greedy", "in processor time")
    print("\n".join(markdown_table(headings, table)))


if __name__ == "__main__":
    main()
