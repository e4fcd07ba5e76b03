"""Log-probabilities of given translations, on the same rows and cache as generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from kvx.runtime.decoding.decode import ScoringLoop
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.search import BeamSearch, Sampling
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.workers import shared_out, side_by_side
from kvx.runtime.engine.writer import not_finite
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.rules import Problem, choice, refuse, wrong_value
from kvx.runtime.text.sources import refuse_string
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
    model: LoadedModel,
    sources: Iterable[str],
    candidates: Iterable[Iterable[Target]],
    by: RankBy,
    options: TranslateOptions,
) -> list[Ranking]:
    """See Translator.rank."""
    refuse_string(sources)
    refuse_string(candidates)
    sources, candidates = list(sources), list(candidates)
    refuse([*wrong_value("by", by, choice(get_args(RankBy))), *_without_effect(options)])
    targets = list(_read_targets(model, sources, candidates))
    longest = max((len(ids) for fixed in targets for ids in fixed), default=1)
    plan, workers = model.plan(options, sentences=sum(map(len, targets)), max_new_tokens=longest)
    requests = list(model.requests(zip(sources, targets, strict=True), options, plan, empty=True))
    longest_first = sorted(requests, key=lambda request: len(request.ids), reverse=True)
    loops = [ScoringLoop(backend, plan) for backend in shared_out(model.backends, workers)]
    for outcome in side_by_side(loops, longest_first, DecodeStats()):
        outcome.sentence.outcomes[outcome.target] = outcome
    for request in requests:
        if request.failed:
            raise not_finite(request, model.manifest)
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
    model: LoadedModel, sources: Sequence[str], candidates: Sequence[Iterable[Target]]
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
