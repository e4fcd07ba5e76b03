"""The decode loop over sentences of one kind, until there are no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from kvx.runtime.decoding.backend import Backend, Candidates
from kvx.runtime.decoding.filters import UNFILTERED, Filters
from kvx.runtime.decoding.lane import Drawn, Lane, Stopped
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, News, Outcome, Sentence
from kvx.runtime.decoding.search import GIVEN, Search
from kvx.runtime.decoding.seat_options import SeatOptions

Cancelled = Callable[[], bool]


def never() -> bool:
    """Nothing is cancelled."""
    return False


class Steps(Protocol):
    """Rows that step together: a Lane, or what a device has in its place."""

    def fill(self) -> bool:
        """Seats waiting targets where there is room; true while any row is active."""
        ...

    def advance(self) -> Sequence[News]:
        """A step, or a block of them, for every active row → what became known with it."""
        ...

    def stop(self, stopped: Stopped) -> Sequence[Outcome]:
        """Ends the targets of all sentences that are stopped, as far as they have come."""
        ...

    def broken(self) -> Sequence[Outcome]:
        """What became of sentences that could not be encoded, with the error, each once."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Gives back what it holds, after an error as what nobody may use again."""
        ...


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

    Sentences are drawn only as seats fall free; those without options of their own get these. `cancelled` is asked once
    before each step; where it answers true, every target ends as it is. The cache belongs to this decode and goes with
    it, also where the consumer stops half-way. With `candidates`, which must know all sources and which the backend
    must have steps for, a target is made of those of its source.
    """
    options = SeatOptions(
        search,
        plan.max_new_tokens,
        filters,
        ends_at_limit=plan.ends_at_limit,
        scored=scored,
        with_attention=with_attention,
        candidates=candidates,
    )
    drawn = Drawn(with_options(sentences, options))
    lane = Lane(backend, plan, drawn, stats or DecodeStats(), shortlisted=candidates is not None)
    return run(lane, drawn, cancelled)


def score(
    backend: Backend,
    plan: Plan,
    sentences: Iterable[Sentence],
    stats: DecodeStats | None = None,
    cancelled: Cancelled = never,
) -> Iterator[Outcome]:
    """Sentences whose targets are fixed from beginning to end → their log-probabilities, as they finish."""
    return decode(backend, sentences, GIVEN, plan, stats, scored=True, cancelled=cancelled)


def run(lane: Steps, drawn: Drawn, cancelled: Cancelled = never) -> Iterator[Outcome]:
    """What becomes of all targets that are drawn, as they are over."""
    try:
        while lane.fill():
            if cancelled():
                yield from lane.stop(lambda _: "cancelled")
                yield from untouched(drawn)
                break
            yield from _whole([*lane.broken(), *lane.advance()])
        yield from _whole(lane.broken())
    except BaseException as error:
        lane.close(error)
        raise
    lane.close()


def _whole(news: Sequence[News]) -> Iterator[Outcome]:
    """The outcomes among the news. Raises the error of one that has one."""
    for one in news:
        if isinstance(one, Outcome):
            if one.error is not None:
                raise one.error
            yield one


def untouched(sentences: Iterable[Sentence]) -> Iterator[Outcome]:
    """The outcomes of sentences that are cancelled before they were encoded."""
    for sentence in sentences:
        for target in range(len(sentence.targets)):
            yield Outcome.nothing(sentence, target, stopped="cancelled")


def with_options(sentences: Iterable[Sentence], options: SeatOptions) -> Iterator[Sentence]:
    """The sentences, with these options where they have none."""
    for sentence in sentences:
        sentence.options = sentence.options or options
        yield sentence
