"""Log-probabilities of given translations, on the same rows and cache as generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.search import BeamSearch, Sampling
from kvx.runtime.engine.bulk import Bulk
from kvx.runtime.engine.core import Core
from kvx.runtime.engine.loaded import LoadedModel, with_languages
from kvx.runtime.engine.prepared import Prepared
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.supply import Listed
from kvx.runtime.engine.translating import Progress
from kvx.runtime.engine.writer import not_finite
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.rules import Problem, choice, refuse, wrong_value
from kvx.runtime.text.sources import Source, refuse_string
from kvx.runtime.text.targets import Target

SEARCHED_BY: dict[type, str] = {BeamSearch: "beam_size", Sampling: "samples"}  # what asks for these searches
SCORING_OPTIONS = ("on_long", "rows", "workers", "cache_bytes", "source_language", "target_language", "text_prefix")

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
    core: Core,
    sources: Iterable[Source],
    candidates: Iterable[Iterable[Target]],
    by: RankBy,
    options: TranslateOptions,
    *,
    cancelled: Cancelled | None = None,
    stats: DecodeStats | None = None,
    progress: Progress | None = None,
) -> list[Ranking]:
    """See Translator.rank."""
    refuse_string(sources)
    refuse_string(candidates)
    sources, candidates = list(sources), list(candidates)
    refuse([*wrong_value("by", by, choice(get_args(RankBy))), *_without_effect(options)])
    targets = list(_read_targets(core.model, sources, candidates))
    longest = max((len(ids) for fixed in targets for ids in fixed), default=1)
    prepared = Prepared.for_scoring(core.model, core.sized(options), core.workers.settings.workers, longest)
    bulk = Bulk(core.workers, prepared, max(1, len(sources)), cancelled)
    spoken = zip(with_languages(sources, options), targets, strict=True)
    requests = [
        prepared.request(
            text, bulk, number=number, targets=fixed, source_language=source, target_language=target, empty=True
        )
        for number, ((text, source, target), fixed) in enumerate(spoken, 1)
    ]
    before = core.stats
    for done, request in enumerate(bulk.run(Listed(iter(requests))), 1):
        if request.failed:
            raise not_finite(request)
        if any(outcome.stopped for outcome in request.results or ()):
            raise InputError(
                "Scoring was cancelled",
                expected="all targets to be scored",
                remedy="Score them again, or fewer of them.",
                line=request.number,
            )
        if progress is not None:
            progress(done)
    if stats is not None:
        stats.add_since(before, core.stats, DecodeStats(sentences=sum(map(len, targets))))
    return [_ranking(_scores(request), by) for request in requests]


def _without_effect(options: TranslateOptions) -> Iterator[Problem]:
    """The options that are set although they have no say in scoring."""
    plain = TranslateOptions()
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in SCORING_OPTIONS and value != getattr(plain, field.name):
            name = SEARCHED_BY.get(type(value), field.name)
            got = f"`{name}` is {value!r:.80}, but translations are scored, not searched for"
            yield Problem(name, got, f"only {', '.join(SCORING_OPTIONS)}")


def _scores(request: Request) -> tuple[Score, ...]:
    return tuple(Score(one.best.ids, one.best.log_probabilities or ()) for one in request.results or ())


def _ranking(scores: tuple[Score, ...], by: RankBy) -> Ranking:
    values = [score.sum if by == "sum" else score.per_token for score in scores]
    best = values.index(max(values))
    others = values[:best] + values[best + 1 :]
    return Ranking(scores, best, values[best] - max(others) if others else None)


def _read_targets(
    model: LoadedModel, sources: Sequence[Source], candidates: Sequence[Iterable[Target]]
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The ids of every source's candidates, each within the model's positions."""
    if len(sources) != len(candidates):
        raise InputError(
            f"There are {len(sources)} sources and {len(candidates)} targets",
            expected="as many targets as sources",
            remedy="Check that both belong together.",
        )
    for number, each in enumerate(candidates, 1):
        texts = [] if isinstance(each, str) or not isinstance(each, Iterable) else list(each)
        if not texts:
            raise InputError(
                f"The candidates are {each!r:.60}" if each else "The source has no candidates",
                expected="at least one candidate for each source",
                remedy="Add them, or leave the source out.",
                line=number,
            )
        yield tuple(model.targets.whole(target, number) for target in texts)
