"""Which sentence sits where in the cache, and who comes next."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.decoding.backend import Backend, Candidates, specs_of
from kvx.runtime.decoding.cache import EncodedSource, KVCache
from kvx.runtime.decoding.plan import GROUP_POSITIONS, Plan
from kvx.runtime.decoding.rows import Choice, FinishReason, Hypothesis, Rows, Seat, Source
from kvx.runtime.decoding.search import Search

SHRINK_BELOW = 4  # buffers this many times too large are worth a repack


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the `target`-th target of source `index`: hypotheses, the best first, and why there are no more
    tokens.
    """

    index: int
    target: int
    hypotheses: tuple[Hypothesis, ...]
    cancelled: bool = False

    @property
    def best(self) -> Hypothesis:
        """The first hypothesis."""
        return self.hypotheses[0]

    def reason(self, hypothesis: Hypothesis) -> FinishReason:
        """Why a hypothesis is no longer."""
        if hypothesis.ended:
            return "end"
        return "cancelled" if self.cancelled else "length"


@dataclass(slots=True)
class DecodeStats:
    """What a decode did: `row_steps` is the sum over steps of the rows that ran, `row_places` of those planned;
    `cache_bytes` the most that the buffers held at a time. With a shortlist, `columns` is the sum over steps of the
    tokens that the output projection ran over, in `listed_steps`, and `fallbacks` are the sources that it did not know.
    """

    sentences: int = 0
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    row_places: int = 0
    repacks: int = 0
    cache_bytes: int = 0
    columns: int = 0
    listed_steps: int = 0
    fallbacks: int = 0

    @property
    def occupancy(self) -> float:
        """The share of the places that ran, 0 to 1."""
        return self.row_steps / self.row_places if self.row_places else 0.0

    def add(self, other: DecodeStats) -> None:
        """Adds what another decode did, but for the bytes, which depend on what else was held meanwhile."""
        for name in self.__slots__:
            if name != "cache_bytes":
                setattr(self, name, getattr(self, name) + getattr(other, name))


class _Waiting(NamedTuple):
    """A target before it has a seat: of which source, the ids given, the source as encoded."""

    source: Source
    target: int
    encoded: EncodedSource

    @property
    def given(self) -> tuple[int, ...]:
        return self.source.targets[self.target]


class Schedule:
    """Fills free seats from a stream of sources and retires those that are over.

    Without a search all targets are given and only scored; then up to `at_once` tokens of all rows together may be
    taken in one step. With a `shortlist`, which must know all sources, every seat has its candidates.
    """

    def __init__(
        self,
        backend: Backend,
        sources: Iterator[Source],
        plan: Plan,
        search: Search | None,
        stats: DecodeStats,
        *,
        at_once: int = 1,
        with_attention: bool = False,
        shortlist: Candidates | None = None,
    ) -> None:
        specs = specs_of(backend, beams=plan.beams, shortlisted=shortlist is not None)
        self.cache = KVCache(specs, plan.capacity(target=1, source=1))
        scored = search is None or search.scored
        self.rows = Rows(self.cache, plan, scored=scored, with_attention=with_attention)
        self._backend = backend
        self._sources = sources
        self._plan = plan
        self._search = search
        self._stats = stats
        self._at_once = at_once
        self._shortlist = shortlist
        self._held_back: Source | None = None
        self._ready: deque[_Waiting] = deque()

    def fill(self) -> bool:
        """Seats waiting targets where there is room; true while any row is active."""
        while self.cache.seated < self._plan.seats and self._can_seat(self.cache.seated):
            self._seat(self.cache.seated)
        self._fit(self._tokens_ahead())
        return self.cache.active > 0

    def next_given(self) -> tuple[IntArray, IntArray]:
        """Of given targets, as many tokens of each active row as the step should take, and those that must follow,
        both [n, Q]; any id stands where a row has fewer left.
        """
        ahead, tokens = np.arange(self._tokens_ahead()), self.rows.tokens
        columns = np.minimum(self.rows.lengths[:, None] + ahead, tokens.shape[1] - 2)
        rows = np.arange(self.rows.n)[:, None]
        return tokens[rows, columns], tokens[rows, columns + 1]

    def record_given(self, log_probabilities: NDArray[np.float64]) -> Iterator[Outcome]:
        """Notes the log-probabilities [n, Q] of the tokens that `next_given` said must follow, as `record` does."""
        rows, n = self.rows, self.rows.n
        taken = np.minimum(rows.limits[:n] - rows.lengths, log_probabilities.shape[1])
        for row, (start, count) in enumerate(zip(rows.lengths.tolist(), taken.tolist(), strict=True)):
            rows.log_probabilities[row, start : start + count] = log_probabilities[row, :count]
        self.cache.lengths[:n] += taken
        self._count_step()
        yield from self._finish(rows.at_limit())

    def record(self, choice: Choice, attention: FloatArray | None = None) -> Iterator[Outcome]:
        """Appends the chosen tokens; gives the targets that are over with them, then their seats to who waits.

        In this order: drawing the next source may mean waiting for it.
        """
        self.rows.append(choice, attention)
        self._count_step()
        yield from self._finish(choice.over | self.rows.at_limit())

    def cancel(self) -> Iterator[Outcome]:
        """Every target as far as it has come, those that wait for a seat and all further sources with nothing."""
        scored = self.rows.scored
        for seat in range(self.cache.seated):
            yield self._outcome(seat, cancelled=True)
        for waiting in self._ready:
            yield nothing(waiting.source, waiting.target, scored=scored)
        held_back = [self._held_back] if self._held_back else []
        for source in itertools.chain(held_back, self._sources):
            yield from (nothing(source, target, scored=scored) for target in range(len(source.targets)))

    def _count_step(self) -> None:
        self._stats.steps += 1
        self._stats.row_steps += self.rows.n
        self._stats.row_places += self._plan.rows

    def _tokens_ahead(self) -> int:
        """How many tokens of each row the next step takes."""
        n, lengths = self.rows.n, self.rows.lengths
        if self._at_once == 1 or n == 0:
            return 1
        left, room = self.rows.limits[:n] - lengths, self._plan.max_new_tokens - lengths
        return int(max(1, min(self._at_once // n, left.max(), room.min())))

    def _finish(self, over: NDArray[np.bool_]) -> Iterator[Outcome]:
        """What became of the seats that are `over`; then they go to who waits."""
        seats = np.flatnonzero(over).tolist()
        for seat in seats:
            yield self._outcome(seat)
        for seat in seats[::-1]:  # from the end, so that a target that moves in is not over itself
            if self._can_seat(seat):
                self._seat(seat)
            else:
                self.rows.vacate(seat)

    def _outcome(self, seat: int, *, cancelled: bool = False) -> Outcome:
        who = self.rows.seats[seat]
        found = [self.rows.read(seat)] if self._search is None else self._search.results(self.rows, seat)
        self._stats.sentences += 1
        self._stats.tokens += len(found[0].ids)
        return Outcome(who.index, who.target, tuple(found), cancelled)

    def _can_seat(self, seat: int) -> bool:
        """Whether a target is ready for this seat, and the budget has room for it beside the others."""
        if not self._ready:
            self._encode_next_group()
        if not self._ready:
            return False
        source = max(self._ready[0].encoded.length, self.cache.capacity.source)
        return max(self.cache.seated, seat + 1) <= self._plan.capacity(target=1, source=source).seats

    def _seat(self, seat: int) -> None:
        source, target, encoded = waiting = self._ready.popleft()
        held = self.cache.capacity
        if encoded.length > held.source:
            self._resize(held.target, encoded.length)
        state = None if self._search is None else self._search.begin(source, target)
        limit = self._plan.max_new_tokens if self._search else len(waiting.given)
        who = Seat(source.index, target, encoded.length, state)
        if self._shortlist is not None:
            assert self._shortlist.knows(source.ids), "a source that the shortlist does not know"
            candidates = self._shortlist.candidates(source.ids)
            who.candidates = np.union1d(candidates, np.array(waiting.given, np.int64))
        self.rows.take(seat, who, waiting.given, encoded, limit)

    def _encode_next_group(self) -> None:
        group = list(self._next_group())
        if not group:
            return
        tensors = self._backend.encode(*padded(group, max(len(source.ids) for source in group), self._plan.pad))
        for place, source in enumerate(group):
            encoded = EncodedSource(tensors, place, len(source.ids))
            self._ready.extend(_Waiting(source, target, encoded) for target in range(len(source.targets)))

    def _next_group(self) -> Iterator[Source]:
        """Sources until there are as many, or as many padded positions, as the encoder should get at once."""
        longest = 0
        for count in range(self._plan.group):
            source, self._held_back = self._held_back or next(self._sources, None), None
            if source is None:
                return
            longest = max(longest, len(source.ids))
            if count and longest * (count + 1) > GROUP_POSITIONS:
                self._held_back = source
                return
            yield source

    def _fit(self, tokens: int) -> None:
        """Makes room for the next tokens of every row, or gives up room that nobody needs."""
        cache, held = self.cache, self.cache.capacity
        target = int(cache.lengths[: cache.active].max(initial=0)) + tokens
        source = max(1, cache.longest_source)
        need = self._plan.capacity(target=target, source=source)
        too_large = need.target * SHRINK_BELOW <= held.target or need.source * SHRINK_BELOW <= held.source
        if target > held.target or too_large:
            self._resize(target, source)
        self._stats.cache_bytes = max(self._stats.cache_bytes, cache.bytes)

    def _resize(self, target: int, source: int) -> None:
        """To what the plan gives for these positions; counted where rows had to be repacked."""
        self._stats.repacks += self.cache.active > 0
        self.cache.resize(self._plan.capacity(target=target, source=source))


def padded(sources: Sequence[Source], positions: int, pad: int) -> tuple[IntArray, IntArray]:
    """Sources → what the encoder takes of them: input_ids [B, positions] and source_lengths [B]."""
    input_ids = np.full((len(sources), positions), pad, np.int64)
    for row, source in zip(input_ids, sources, strict=True):
        row[: len(source.ids)] = source.ids
    return input_ids, np.array([len(source.ids) for source in sources], np.int64)


def nothing(source: Source, target: int, *, scored: bool) -> Outcome:
    """A target that was cancelled before it began."""
    hypothesis = Hypothesis((), ended=False, log_probabilities=() if scored else None)
    return Outcome(source.index, target, (hypothesis,), cancelled=True)
