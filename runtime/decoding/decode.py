"""The decode loop, and the loops that a call may ask for, as objects with a `run`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvx.runtime.decoding.backend import Backend, Candidates, Step, shortlisting_of
from kvx.runtime.decoding.filters import UNFILTERED, Filters
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.decoding.schedule import Schedule
from kvx.runtime.decoding.search import Search, log_probabilities
from kvx.runtime.decoding.shortlisted import ShortlistedStep

Cancelled = Callable[[], bool]

TOKENS_AT_ONCE = 128  # of all rows together: what fills a matrix product (docs/performance.md)


def never() -> bool:
    """Nothing is cancelled."""
    return False


def decode(
    backend: Backend,
    sentences: Iterable[Sentence],
    search: Search,
    plan: Plan,
    stats: DecodeStats | None = None,
    *,
    filters: Filters = UNFILTERED,
    scored: bool = False,
    with_attention: bool = False,
    candidates: Candidates | None = None,
    cancelled: Cancelled = never,
) -> Iterator[Outcome]:
    """Sentences, any number and in any order → what becomes of each target, as it is over.

    Sentences are drawn only as seats fall free. `cancelled` is asked once before each step; where it answers true,
    every target ends as it is. The cache belongs to this decode and goes with it, also where the consumer stops
    half-way. With `candidates`, which must know all sources and which the backend must have steps for, a target is made
    of those of its source.
    """
    stats = stats or DecodeStats()
    schedule = Schedule(
        backend,
        iter(sentences),
        plan,
        search,
        stats,
        scored=scored,
        with_attention=with_attention,
        gain=filters.gain,
        candidates=candidates,
    )
    step, rows = _bind(backend, schedule, stats, shortlisted=candidates is not None), schedule.rows
    while schedule.fill():
        if cancelled():
            yield from schedule.cancel()
            return
        output = step(rows.next_ids())
        logits = filters(output.logits, rows)
        yield from schedule.record(search.choose(output, logits, rows), output.attention)


def score(
    backend: Backend,
    plan: Plan,
    sentences: Iterable[Sentence],
    stats: DecodeStats | None = None,
    cancelled: Cancelled = never,
) -> Iterator[Outcome]:
    """Sentences whose targets are fixed from beginning to end → their log-probabilities, as they finish.

    Ends where `cancelled` answers true. On the rows and cache of `decode`, but several tokens of a row at a time while
    few rows leave a step half empty.
    """
    at_once = TOKENS_AT_ONCE if backend.query_tokens else 1
    schedule = Schedule(backend, iter(sentences), plan, None, stats or DecodeStats(), at_once=at_once, scored=True)
    one = backend.bind(schedule.cache)
    several = backend.bind_chunk(schedule.cache) if backend.query_tokens else one
    while schedule.fill() and not cancelled():
        input_ids, following = schedule.next_fixed()
        output = one(input_ids[:, 0]) if input_ids.shape[1] == 1 else several(input_ids)
        scores = log_probabilities(output.logits.reshape(following.size, -1), following.reshape(-1))
        yield from schedule.record_fixed(scores.reshape(following.shape))


class Loop(Protocol):
    """What runs sentences through a backend. It may be run several times, also side by side."""

    def run(self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled) -> Iterator[Outcome]:
        """The outcomes, as they come."""
        ...


@dataclass(frozen=True, slots=True)
class SearchLoop:
    """A decode. With candidates, sources that they do not know have the whole vocabulary, in decodes of their own:
    beside others they would cost these as much.
    """

    backend: Backend
    plan: Plan
    search: Search
    filters: Filters = UNFILTERED
    scored: bool = False
    with_attention: bool = False
    candidates: Candidates | None = None

    def run(self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled) -> Iterator[Outcome]:
        """See Loop."""
        if self.candidates is None:
            yield from self._decode(sentences, stats, cancelled, None)
            return
        knows = self.candidates.knows
        for known, some in itertools.groupby(sentences, key=lambda sentence: knows(sentence.ids)):
            counted = _counted(some, stats, unknown=not known)
            yield from self._decode(counted, stats, cancelled, self.candidates if known else None)

    def _decode(
        self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled, candidates: Candidates | None
    ) -> Iterator[Outcome]:
        return decode(
            self.backend,
            sentences,
            self.search,
            self.plan,
            stats,
            filters=self.filters,
            scored=self.scored,
            with_attention=self.with_attention,
            candidates=candidates,
            cancelled=cancelled,
        )


@dataclass(frozen=True, slots=True)
class ScoringLoop:
    """Log-probabilities of fixed targets."""

    backend: Backend
    plan: Plan

    def run(self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled) -> Iterator[Outcome]:
        """See Loop."""
        return score(self.backend, self.plan, sentences, stats, cancelled)


def _counted(sentences: Iterable[Sentence], stats: DecodeStats, *, unknown: bool) -> Iterator[Sentence]:
    for sentence in sentences:
        stats.fallbacks += unknown
        yield sentence


def _bind(backend: Backend, schedule: Schedule, stats: DecodeStats, *, shortlisted: bool) -> Step:
    shortlisting = shortlisting_of(backend) if shortlisted else None
    if shortlisting is None:
        return backend.bind(schedule.cache)
    return ShortlistedStep(shortlisting, schedule.rows, stats)
