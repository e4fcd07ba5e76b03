"""Log-probabilities of given translations, on the same rows and cache as generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import Cancelled, score
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.rows import Source
from kvx.runtime.decoding.schedule import DecodeStats, Outcome
from kvx.runtime.engine.workers import Decode, shared_out, side_by_side
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions, refuse
from kvx.runtime.text.sources import refuse_string
from kvx.runtime.text.targets import Target

if TYPE_CHECKING:
    from kvx.runtime.translator import Translator

SCORING_OPTIONS = ("on_long", "rows", "workers", "cache_bytes")

RankBy = Literal["sum", "per_token"]


@dataclass(frozen=True, slots=True)
class Score:
    """Natural log-probabilities of a target's ids, one for each, given its source.

    `sum` is theirs, `per_token` their mean, `tokens` their number; a text's eos counts.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]

    @property
    def sum(self) -> float:
        """log P(target | source), in nats."""
        return math.fsum(self.log_probabilities)

    @property
    def tokens(self) -> int:
        """How many ids were scored."""
        return len(self.log_probabilities)

    @property
    def per_token(self) -> float:
        """The mean log-probability of an id, in nats."""
        return self.sum / self.tokens


@dataclass(frozen=True, slots=True)
class Ranking:
    """The scores of a source's candidates, in their order; `best` is the index of the best one, `margin` its lead
    over the second best, or None where there is only one.
    """

    scores: tuple[Score, ...]
    best: int
    margin: float | None


def rank(
    translator: Translator,
    sources: Sequence[str],
    candidates: Sequence[Sequence[Target]],
    by: RankBy,
    options: TranslateOptions,
) -> list[Ranking]:
    """See Translator.rank."""
    refuse_string(sources)
    options = _of_scoring(options)
    targets = list(_read_targets(translator, sources, candidates))
    longest = max((len(ids) for given in targets for ids in given), default=1)
    plan, decodes = translator.plan(options, sentences=sum(map(len, targets)), max_new_tokens=longest)
    special = translator.manifest.source_ids
    texts = translator.read_sources(sources, plan, options.on_long)
    jobs = [
        Source(index, text.ids or (special.bos, special.eos), given)
        for index, (text, given) in enumerate(zip(texts, targets, strict=True))
    ]
    jobs.sort(key=lambda job: len(job.ids), reverse=True)
    scores: dict[tuple[int, int], Score] = {}
    scorings = [_scoring(backend, plan) for backend in shared_out(translator.backends, decodes)]
    for found in side_by_side(scorings, jobs, DecodeStats()):
        scores[found.index, found.target] = Score(found.best.ids, found.best.log_probabilities or ())
    return [
        _ranking(tuple(scores[index, target] for target in range(len(given))), by)
        for index, given in enumerate(targets)
    ]


def _of_scoring(options: TranslateOptions) -> TranslateOptions:
    """The options, of which no other may be set. Raises OptionError naming those that are."""
    names = [field.name for field in fields(options)]
    plain = replace(type(options)(), **{name: getattr(options, name) for name in SCORING_OPTIONS})
    refuse(
        [
            (f"{name} = {getattr(options, name)!r} where translations are given", f"only {', '.join(SCORING_OPTIONS)}")
            for name in names
            if getattr(options, name) != getattr(plain, name)
        ]
    )
    return plain


def _scoring(backend: Backend, plan: Plan) -> Decode:
    def score_them(sources: Iterator[Source], stats: DecodeStats, stopped: Cancelled) -> Iterator[Outcome]:
        return score(backend, plan, sources, stats, stopped)

    return score_them


def _ranking(scores: tuple[Score, ...], by: RankBy) -> Ranking:
    values = [score.sum if by == "sum" else score.per_token for score in scores]
    best = values.index(max(values))
    others = values[:best] + values[best + 1 :]
    return Ranking(scores, best, values[best] - max(others) if others else None)


def _read_targets(
    translator: Translator, sources: Sequence[str], candidates: Sequence[Sequence[Target]]
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The ids of every source's candidates, each within the model's positions."""
    if len(sources) != len(candidates):
        raise InputError(
            f"{len(sources)} sources and {len(candidates)} targets",
            expected="as many targets as sources",
            remedy="Check that both belong together.",
        )
    for number, given in enumerate(candidates, 1):
        if isinstance(given, str) or not given:
            raise InputError(
                "no candidates" if not given else "one str instead of candidates",
                expected="at least one candidate for each source",
                remedy="Add them, or leave the source out.",
                line=number,
            )
        yield tuple(translator.targets.whole(target, number) for target in given)
