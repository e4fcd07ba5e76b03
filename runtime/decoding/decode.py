"""The decode loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from kvx.runtime.decoding.backend import Backend, Candidates, Step, shortlisting_of
from kvx.runtime.decoding.filters import UNCONSTRAINED, Constraints
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.rows import Source
from kvx.runtime.decoding.schedule import DecodeStats, Outcome, Schedule
from kvx.runtime.decoding.search import Search, log_probabilities
from kvx.runtime.decoding.shortlisted import ShortlistedStep

Cancelled = Callable[[], bool]

TOKENS_AT_ONCE = 128  # of all rows together: what fills a matrix product (docs/performance.md)


def never() -> bool:
    """Nothing is cancelled."""
    return False


def decode(
    backend: Backend,
    sources: Iterable[Source],
    search: Search,
    plan: Plan,
    stats: DecodeStats | None = None,
    *,
    constraints: Constraints = UNCONSTRAINED,
    with_attention: bool = False,
    shortlist: Candidates | None = None,
    cancelled: Cancelled = never,
) -> Iterator[Outcome]:
    """Sources, any number and in any order → what becomes of each target, as it is over.

    Sources are drawn only as seats fall free. Where `cancelled` answers true, between two steps, every target ends as
    it is. The cache belongs to this decode and goes with it, also where the consumer stops half-way. By a
    `shortlist`, which must know all sources and which the backend must have steps for, targets are made of candidates.
    """
    stats = stats or DecodeStats()
    schedule = Schedule(backend, iter(sources), plan, search, stats, with_attention=with_attention, shortlist=shortlist)
    step, rows = _bind(backend, schedule, stats, shortlisted=shortlist is not None), schedule.rows
    while schedule.fill():
        if cancelled():
            yield from schedule.cancel()
            return
        output = step(rows.next_ids())
        logits = constraints(output.logits, rows)
        yield from schedule.record(search.choose(output, logits, rows), output.attention)


def decode_known(
    decode_some: Callable[..., Iterator[Outcome]], sources: Iterable[Source], shortlist: Candidates, stats: DecodeStats
) -> Iterator[Outcome]:
    """What becomes of all sources: of those that the shortlist knows by it, of others by the whole vocabulary, which
    would cost all those beside them as much. `decode_some` is `decode` with all that is the same for both.
    """
    for known, some in itertools.groupby(sources, key=lambda source: shortlist.knows(source.ids)):
        listed = {"shortlist": shortlist} if known else {}
        yield from decode_some(_counted(some, stats, unknown=not known), **listed)


def _counted(sources: Iterable[Source], stats: DecodeStats, *, unknown: bool) -> Iterator[Source]:
    for source in sources:
        stats.fallbacks += unknown
        yield source


def _bind(backend: Backend, schedule: Schedule, stats: DecodeStats, *, shortlisted: bool) -> Step:
    shortlisting = shortlisting_of(backend) if shortlisted else None
    if shortlisting is None:
        return backend.bind(schedule.cache)
    return ShortlistedStep(shortlisting, schedule.rows, stats)


def score(
    backend: Backend,
    plan: Plan,
    sources: Iterable[Source],
    stats: DecodeStats | None = None,
    stopped: Cancelled = never,
) -> Iterator[Outcome]:
    """Sources whose targets are all given → their log-probabilities, as they finish.

    Ends where `stopped` answers true. On the rows and cache of `decode`, but several tokens of a row at a time while
    few rows leave a step half empty.
    """
    at_once = TOKENS_AT_ONCE if backend.query_tokens else 1
    schedule = Schedule(backend, iter(sources), plan, None, stats or DecodeStats(), at_once=at_once)
    one = backend.bind(schedule.cache)
    several = backend.bind_chunk(schedule.cache) if backend.query_tokens else one
    while schedule.fill() and not stopped():
        input_ids, following = schedule.next_given()
        output = one(input_ids[:, 0]) if input_ids.shape[1] == 1 else several(input_ids)
        scores = log_probabilities(output.logits.reshape(following.size, -1), following.reshape(-1))
        yield from schedule.record_given(scores.reshape(following.shape))
