"""What beams cost: a beam search against greedy at the same number of rows, interleaved in one run.

    python benchmarks/beams.py BUNDLE TEXT [--sizes 2,4,8] [--rows 64] [--repeat 5] [--limit N]

One decode loop of one thread, longest first. Prints a Markdown table: median and least seconds over the lines of TEXT,
steps, and the ratio of medians to greedy's. Compare rows of one run only; machines are noisy.
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


def seconds(translator: Translator, texts: list[str], options: TranslateOptions) -> tuple[float, int]:
    """Wall time to translate all texts, and the steps it took."""
    stats, started = DecodeStats(), time.perf_counter()
    count = sum(1 for _ in translator.translate_iter(texts, options, stats))
    assert count == len(texts)
    return time.perf_counter() - started, stats.steps


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sizes", default="2,4,8")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with open_lines(arguments.text) as stream:
        texts = list(itertools.islice(read_lines(stream), arguments.limit))
    translator = Translator.load(arguments.bundle, threads=1)
    sizes = [1, *map(int, arguments.sizes.split(","))]
    runs: dict[int, list[float]] = {size: [] for size in sizes}
    steps = dict.fromkeys(sizes, 0)
    for _, size in itertools.product(range(arguments.repeat + 1), sizes):
        options = TranslateOptions(rows=arguments.rows, workers=1, window=len(texts), beam_size=size)
        taken, steps[size] = seconds(translator, texts, options)
        runs[size].append(taken)
    medians = {size: statistics.median(times[1:]) for size, times in runs.items()}  # the first of each warms up
    rows = (
        (size, f"{medians[size]:.2f}", f"{min(times[1:]):.2f}", steps[size], f"{medians[size] / medians[1]:.2f}")
        for size, times in runs.items()
    )
    print("\n".join(markdown_table(("beams", "median s", "least s", "steps", "times greedy"), rows)))


if __name__ == "__main__":
    main()
