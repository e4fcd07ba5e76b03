"""A test set through a model: quality, speed and memory. Needs sacrebleu."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.core import core_for
from kvx.runtime.engine.translating import translate
from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.measuring.tables import markdown_table, mebibytes
from kvx.runtime.system import peak_bytes, reset_peak
from kvx.runtime.translation import Translation

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

    from kvx.runtime.engine.loaded import LoadedModel
    from kvx.runtime.options import TranslateOptions

COLUMNS = (
    "backend",
    "BLEU",
    "chrF",
    "seconds",
    "sentences/s",
    "tokens/s",
    "×",
    "steps",
    "rows in use",
    "cache",
    "peak",
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A corpus score, 0 to 100, and sacrebleu's signature, which says how to repeat it."""

    score: float
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one backend did with a test set.

    `seconds` of wall time from the first source to the last translation, loading left out; `occupancy` of the planned
    rows, 0 to 1; `cache_bytes` the most that the caches held; `peak_bytes` the largest resident set meanwhile, None
    where the system does not say; `complete` is false where the run was interrupted and covers the first sentences
    only.
    """

    name: str
    bleu: Metric
    chrf: Metric
    sentences: int
    seconds: float
    sentences_per_second: float
    tokens: int
    tokens_per_second: float
    steps: int
    occupancy: float
    repacks: int
    cache_bytes: int
    peak_bytes: int | None
    complete: bool


@dataclass(frozen=True, slots=True)
class ParallelText:
    """Sources and one reference for each. Raises InputError where the numbers differ or there is nothing."""

    sources: tuple[str, ...]
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.references) or not self.sources:
            raise InputError(
                f"There are {len(self.sources)} sources and {len(self.references)} references",
                expected="one reference for each source, and at least one source",
                remedy="Check that both files belong together.",
            )


def evaluate(
    loaded: LoadedModel, test_set: ParallelText, options: TranslateOptions, *, tokenize: str | None = None
) -> tuple[Evaluation, list[str]]:
    """Translates the sources and compares with the references → the evaluation and the hypotheses.

    `tokenize` is sacrebleu's tokenizer for BLEU ("13a", "zh", …; default: sacrebleu's). After Ctrl-C the evaluation
    covers what there was; with nothing at all, KeyboardInterrupt is raised again. Raises OptionError for an unknown
    tokenizer, before anything is translated.
    """
    bleu, chrf = _metrics(tokenize)
    stats, translations, complete = DecodeStats(), list[Translation](), False
    reset_peak()
    started = time.perf_counter()
    try:
        with core_for(loaded, options) as core:
            translations.extend(translate(core, test_set.sources, options, stats=stats))
        complete = True
    except KeyboardInterrupt:
        if not translations:
            raise
    seconds = time.perf_counter() - started
    hypotheses = [translation.text for translation in translations]
    tokens = sum(len(translation.ids) for translation in translations)
    references = list(islice(test_set.references, len(hypotheses)))
    evaluation = Evaluation(
        name=loaded.backend.name,
        bleu=_score(bleu, hypotheses, references),
        chrf=_score(chrf, hypotheses, references),
        sentences=len(hypotheses),
        seconds=seconds,
        sentences_per_second=len(hypotheses) / seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        steps=stats.steps,
        occupancy=stats.occupancy,
        repacks=stats.repacks,
        cache_bytes=stats.cache_bytes,
        peak_bytes=peak_bytes(),
        complete=complete,
    )
    return evaluation, hypotheses


def comparison(evaluations: Sequence[Evaluation]) -> list[str]:
    """The evaluations side by side, as the lines of a Markdown table; speed relative to the slowest."""
    slowest = min(result.sentences_per_second for result in evaluations)
    rows = [
        (
            result.name if result.complete else f"{result.name} (first {result.sentences})",
            f"{result.bleu.score:.2f}",
            f"{result.chrf.score:.2f}",
            f"{result.seconds:.2f}",
            f"{result.sentences_per_second:.1f}",
            f"{result.tokens_per_second:.0f}",
            f"{result.sentences_per_second / slowest:.1f}",
            result.steps,
            f"{result.occupancy:.0%}",
            mebibytes(result.cache_bytes),
            mebibytes(result.peak_bytes),
        )
        for result in evaluations
    ]
    return markdown_table(COLUMNS, rows, text={0})


def corpus_scores(hypotheses: list[str], references: Sequence[str]) -> tuple[float, float]:
    """BLEU and chrF of translations against their references, both 0 to 100."""
    bleu, chrf = (_score(metric, hypotheses, list(references)) for metric in _metrics(None))
    return bleu.score, chrf.score


def _metrics(tokenize: str | None) -> tuple[SacrebleuMetric, SacrebleuMetric]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        raise OptionError(
            f"There is no tokenizer {tokenize!r}",
            expected=f"one of sacrebleu's: {', '.join(sorted(map(str, BLEU.TOKENIZERS)))}",
            remedy="Correct `tokenize`.",
            option="tokenize",
        )
    try:
        return BLEU(tokenize=tokenize), CHRF()
    except (ImportError, RuntimeError) as error:
        raise OptionError(
            f"sacrebleu cannot load the tokenizer {tokenize!r} ({str(error).strip().splitlines()[0]})",
            expected="a tokenizer that is installed",
            remedy="Install what it needs, or choose another with `tokenize`.",
            option="tokenize",
        ) from None


def _score(metric: SacrebleuMetric, hypotheses: list[str], references: list[str]) -> Metric:
    score = metric.corpus_score(hypotheses, [references])
    return Metric(float(score.score), str(metric.get_signature()))
