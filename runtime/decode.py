"""The decode loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvx.runtime.backend import Backend
from kvx.runtime.schedule import DecodeStats, Hypothesis, Limits, Schedule, Source
from kvx.runtime.search import Search


def decode(
    backend: Backend, sources: Iterable[Source], search: Search, limits: Limits, stats: DecodeStats | None = None
) -> Iterator[Hypothesis]:
    """Sources, any number and in any order → a hypothesis for each, as they finish.

    Sources are drawn only as rows fall free. The cache belongs to this decode and goes with it.
    """
    schedule = Schedule(backend, iter(sources), limits, stats or DecodeStats())
    step = backend.bind(schedule.cache)
    while schedule.fill():
        output = step(schedule.next_ids())
        yield from schedule.record(search.choose(output))
