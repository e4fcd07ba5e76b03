"""The decode loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvx.runtime.backend import Backend
from kvx.runtime.plan import Plan
from kvx.runtime.schedule import DecodeStats, Hypothesis, Schedule, Source
from kvx.runtime.search import Search


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
        choice = search.choose(output, schedule.given_ids())
        yield from schedule.record(choice)
