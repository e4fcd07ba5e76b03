"""`kvx translate --paragraphs` and `--html`: whole texts in, whole texts out."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.commands.console import counting, say
from kvx.commands.output import format_stats
from kvx.runtime.errors import OptionError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.lines import STANDARD, open_lines, output_file, read_text

if TYPE_CHECKING:
    from kvx import Translator

OF_LINES = (
    "as_json",
    "scores",
    "align",
    "alternatives",
    "plot_attention",
    "prefix_file",
    "from_file",
    "to_file",
)
SEVERAL = ("n_best", "samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTexts:
    """Where whole texts come from, where they go, and whether they are HTML."""

    texts: tuple[str, ...]
    input: Path | None
    output: Path | None
    html: bool
    stats: bool

    def translate(self, translator: Translator, options: TranslateOptions) -> None:
        """Writes the translation of each text: of a stream as it is, of each argument with a line feed."""
        from kvx.runtime.decoding.results import DecodeStats

        stats, started, done = DecodeStats(), time.perf_counter(), 0
        counter = counting("translating", None, to_terminal=self.output is None and sys.stdout.isatty())
        with output_file(self.output) as out, counter as count:
            for text in self._read():
                meter = _Meter(count, done)
                translated = translator.translate_text(text, options, html=self.html, stats=stats, progress=meter)
                out.write(translated + "\n" if self.texts else translated)
                out.flush()
                done = meter.done
        if self.stats:
            say(format_stats(stats, time.perf_counter() - started))

    def _read(self) -> Iterator[str]:
        if self.texts:
            yield from self.texts
            return
        with open_lines(self.input or Path(STANDARD)) as stream:
            yield read_text(stream)


class _Meter:
    """Tells how many sentences are done, in all texts together."""

    def __init__(self, count: Callable[[int], None], before: int) -> None:
        self.done = before
        self._count = count
        self._before = before

    def __call__(self, done: int) -> None:
        self.done = self._before + done
        self._count(self.done)


def refuse_options_of_lines(mode: str, given: Mapping[str, object], *, interactive: bool) -> None:
    """Raises OptionError for options that belong to one line in and one line out, beside the option `mode`."""
    lines = (name for name in OF_LINES if given.get(name) not in (None, False))
    several = (name for name in SEVERAL if given.get(name) not in (None, 1))
    wrong = next(itertools.chain(lines, several), None)
    if wrong is not None:
        raise OptionError(
            f"`{wrong}` is given beside `{mode}`",
            expected="no option of single lines where texts come back whole",
            remedy="Leave one of the two out.",
            option=wrong,
        )
    if interactive:
        raise OptionError(
            f"`{mode}` is given for texts that are typed",
            expected="texts as arguments, or from a file or pipe",
            remedy="Name a file with `input`.",
            option=mode,
        )
