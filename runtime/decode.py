"""The decode loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvx.runtime.backend import Backend
from kvx.runtime.plan import Plan
from kvx.runtime.schedule import DecodeStats, Hypothesis, Schedule, Source
from kvx.runtime.search import Search, log_probabilities

TOKENS_AT_ONCE = 128  # of all rows together: what fills a matrix product (docs/performance.md)


def decode(
    backend: Backend, sources: Iterable[Source], search: Search, plan: Plan, stats: DecodeStats | None = None
) -> Iterator[Hypothesis]:
    """Sources, any number and in any order → a hypothesis for each target, as they finish.

    Sources are drawn only as rows fall free. The cache belongs to this decode and goes with it, also where the
    consumer stops half-way.
    """
    schedule = Schedule(backend, iter(sources), plan, stats or DecodeStats())
    step = backend.bind(schedule.cache)
    while schedule.fill():
        output = step(schedule.next_ids())
        yield from schedule.record(search.choose(output))


def score(
    backend: Backend, plan: Plan, sources: Iterable[Source], stats: DecodeStats | None = None
) -> Iterator[Hypothesis]:
    """Sources whose targets are all given → their log-probabilities, as they finish.

    On the rows and cache of `decode`, but several tokens of a row at a time while few rows leave a step half empty.
    """
    at_once = TOKENS_AT_ONCE if backend.query_tokens else 1
    schedule = Schedule(backend, iter(sources), plan, stats or DecodeStats(), at_once=at_once)
    step = backend.bind(schedule.cache)
    while schedule.fill():
        input_ids, following = schedule.next_given()
        logits = step(input_ids if input_ids.shape[1] > 1 else input_ids[:, 0]).logits
        scores = log_probabilities(logits.reshape(following.size, -1), following.reshape(-1))
        yield from schedule.record_given(scores.reshape(following.shape))
