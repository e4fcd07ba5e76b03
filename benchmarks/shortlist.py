"""What a shortlist gives and takes: with and without it, greedy and with beams, interleaved in one run.

    python benchmarks/shortlist.py BUNDLE SOURCE REFERENCE SHORTLIST [--beams 1,4] [--rows 64] [--repeat 5] [--limit N]

One decode loop of one thread, longest first. Prints a Markdown table: BLEU and chrF against REFERENCE, the median and
the least seconds, how many times faster by the medians, C (the tokens that a step's output projection ran over, on
average), the share of sentences that are translated as without the shortlist, and how many it did not know.
Compare rows of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvx import TranslateOptions, Translation, Translator
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.measuring.evaluation import ParallelText, corpus_scores
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.text.lines import open_lines, read_lines


@dataclass
class Measured:
    """All runs of one setting; the translations and the stats are the last one's."""

    seconds: list[float] = field(default_factory=list)
    translations: list[Translation] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)

    @property
    def median(self) -> float:
        """Without the first run, which warms up."""
        return statistics.median(self.seconds[1:])

    def run(self, translator: Translator, texts: tuple[str, ...], options: TranslateOptions) -> None:
        """Translates all texts once more."""
        self.stats, started = DecodeStats(), time.perf_counter()
        self.translations = list(translator.translate_iter(texts, options, self.stats))
        self.seconds.append(time.perf_counter() - started)


def row(beams: int, name: str, test_set: ParallelText, measured: Measured, plain: Measured) -> tuple[object, ...]:
    """A row of the table."""
    bleu, chrf = corpus_scores([one.text for one in measured.translations], test_set.references)
    pairs = zip(measured.translations, plain.translations, strict=True)
    equal = sum(one.ids == other.ids for one, other in pairs) / len(plain.translations)
    stats = measured.stats
    columns = f"{stats.columns / stats.listed_steps:.0f}" if stats.listed_steps else "–"
    least, faster = min(measured.seconds[1:]), plain.median / measured.median
    return (
        *(beams, name, f"{bleu:.2f}", f"{chrf:.2f}", f"{measured.median:.2f}", f"{least:.2f}", f"{faster:.2f}"),
        *(columns, f"{equal:.1%}", stats.fallbacks),
    )


def _lines(path: Path, limit: int | None) -> tuple[str, ...]:
    with open_lines(path) as stream:
        return tuple(itertools.islice(read_lines(stream), limit))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "source", "reference", "shortlist"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--beams", default="1,4")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    test_set = ParallelText(_lines(arguments.source, arguments.limit), _lines(arguments.reference, arguments.limit))
    translator = Translator.load(arguments.bundle, threads=1)
    sizes = [int(size) for size in arguments.beams.split(",")]
    measured = {(size, listed): Measured() for size in sizes for listed in (False, True)}
    for _ in range(arguments.repeat + 1):
        for (size, listed), found in measured.items():
            options = TranslateOptions(rows=arguments.rows, workers=1, window=len(test_set.sources), beam_size=size)
            options = replace(options, shortlist=arguments.shortlist) if listed else options
            found.run(translator, test_set.sources, options)
    header = ("beams", "vocabulary", "BLEU", "chrF", "median s", "least s", "×", "C", "equal", "unknown")
    rows = (
        row(size, "shortlist" if listed else "whole", test_set, found, measured[size, False])
        for (size, listed), found in measured.items()
    )
    print("\n".join(markdown_table(header, rows, text={1})))


if __name__ == "__main__":
    main()
