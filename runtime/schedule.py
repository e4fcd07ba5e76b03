"""Which sentence sits in which row of the cache, and who comes next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.backend import Backend, IntArray
from kvx.runtime.cache import EncodedSource, KVCache
from kvx.runtime.plan import GROUP_POSITIONS, Plan
from kvx.runtime.search import Choice

SHRINK_BELOW = 4  # buffers this many times too large are worth a repack


@dataclass(frozen=True, slots=True)
class Source:
    """A sentence for the encoder: `ids` with bos and eos, known to its owner as `index`.

    Each of its `targets` takes a row: none, to be searched for, or the ids after bos that are to be scored.
    """

    index: int
    ids: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...] = ((),)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished target of source `index`, the `target`-th: ids after bos, eos included where the sentence `ended`.

    `log_probabilities` are those of the ids, natural, where the search gave them.
    """

    index: int
    target: int
    ids: tuple[int, ...]
    ended: bool
    log_probabilities: tuple[float, ...] | None

    @property
    def score(self) -> float | None:
        """log P(ids | source) in nats, where the search gave it."""
        return None if self.log_probabilities is None else math.fsum(self.log_probabilities)


@dataclass(slots=True)
class DecodeStats:
    """What a decode did: `row_steps` is the sum over steps of the rows that ran, `row_places` of those planned;
    `cache_bytes` the most that the buffers held at a time.
    """

    sentences: int = 0
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    row_places: int = 0
    repacks: int = 0
    cache_bytes: int = 0

    @property
    def occupancy(self) -> float:
        """The share of the places that ran, 0 to 1."""
        return self.row_steps / self.row_places if self.row_places else 0.0

    def add(self, other: DecodeStats) -> None:
        """Adds what another decode did, but for the bytes, which depend on what else was held meanwhile."""
        for name in self.__slots__:
            if name != "cache_bytes":
                setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row's work before it has a row: which source and target, the ids given, the source as encoded."""

    index: int
    target: int
    given: tuple[int, ...]
    encoded: EncodedSource


class Schedule:
    """Fills free rows from a stream of sources and retires those that have ended.

    Row i of the cache, of the tokens and of the seats always belong to the same target. Where all targets are given,
    up to `at_once` tokens of all rows together may be taken in one step.
    """

    def __init__(
        self, backend: Backend, sources: Iterator[Source], plan: Plan, stats: DecodeStats, *, at_once: int = 1
    ) -> None:
        self.cache = KVCache(backend.cache_specs, plan.capacity(target=1, source=1))
        self._backend = backend
        self._sources = sources
        self._plan = plan
        self._stats = stats
        self._at_once = at_once
        self._held_back: Source | None = None
        self._ready: deque[_Waiting] = deque()
        self._seats: list[_Waiting] = []
        self._limits = np.zeros(plan.rows, np.int64)
        self._tokens = np.full((plan.rows, plan.max_new_tokens + 1), plan.bos, np.int64)
        self._log_probabilities = np.zeros((plan.rows, plan.max_new_tokens))

    def fill(self) -> bool:
        """Seats waiting sentences in the free rows; true while any row is active."""
        while self.cache.active < self._plan.rows and self._can_seat(self.cache.active):
            self._seat(self.cache.active)
        self._fit(self._tokens_ahead())
        return self.cache.active > 0

    def next_ids(self) -> IntArray:
        """The token that each active row feeds to the next step [n]."""
        rows = np.arange(self.cache.active)
        ids: IntArray = self._tokens[rows, self.cache.lengths[rows]]
        return ids

    def next_given(self) -> tuple[IntArray, IntArray]:
        """Of given targets, as many tokens of each active row as the step should take, and those that must follow,
        both [n, Q]; any id stands where a row has fewer left.
        """
        ahead = np.arange(self._tokens_ahead())
        n = self.cache.active
        columns = np.minimum(self.cache.lengths[:n, None] + ahead, self._tokens.shape[1] - 2)
        rows = np.arange(n)[:, None]
        return self._tokens[rows, columns], self._tokens[rows, columns + 1]

    def record_given(self, log_probabilities: NDArray[np.float64]) -> Iterator[Hypothesis]:
        """Notes the log-probabilities [n, Q] of the tokens that `next_given` said must follow, as `record` does."""
        cache, n = self.cache, self.cache.active
        taken = np.minimum(self._limits[:n] - cache.lengths[:n], log_probabilities.shape[1])
        for row, (start, count) in enumerate(zip(cache.lengths[:n].tolist(), taken.tolist(), strict=True)):
            self._log_probabilities[row, start : start + count] = log_probabilities[row, :count]
        cache.lengths[:n] += taken
        self._count_step(n)
        yield from self._finish(np.flatnonzero(cache.lengths[:n] == self._limits[:n]), np.zeros(n, bool), scored=True)

    def record(self, choice: Choice) -> Iterator[Hypothesis]:
        """Appends the chosen tokens; gives the targets that end with them, then their rows to who waits.

        In this order: drawing the next source may mean waiting for it.
        """
        cache, n = self.cache, self.cache.active
        rows = np.arange(n)
        if choice.log_probabilities is not None:
            self._log_probabilities[rows, cache.lengths[:n]] = choice.log_probabilities
        cache.advance()
        lengths = cache.lengths[:n]
        ended = choice.ids == self._plan.eos
        self._tokens[rows, lengths] = choice.ids
        self._count_step(n)
        over = np.flatnonzero(ended | (lengths == self._limits[:n]))
        yield from self._finish(over, ended, scored=choice.log_probabilities is not None)

    def _count_step(self, rows: int) -> None:
        self._stats.steps += 1
        self._stats.row_steps += rows
        self._stats.row_places += self._plan.rows

    def _tokens_ahead(self) -> int:
        """How many tokens of each row the next step takes."""
        n, lengths = self.cache.active, self.cache.lengths[: self.cache.active]
        if self._at_once == 1 or n == 0:
            return 1
        left, room = self._limits[:n] - lengths, self._plan.max_new_tokens - lengths
        return int(max(1, min(self._at_once // n, left.max(), room.min())))

    def _finish(self, over: IntArray, ended: NDArray[np.bool_], *, scored: bool) -> Iterator[Hypothesis]:
        """The hypotheses of the rows that are `over`; then the rows go to who waits."""
        for row in over.tolist():
            yield self._hypothesis(row, ended=bool(ended[row]), scored=scored)
        for row in over[::-1].tolist():  # from the end, so that a row that moves in has not ended itself
            self._give_back(row)

    def _hypothesis(self, row: int, *, ended: bool, scored: bool) -> Hypothesis:
        length, seat = int(self.cache.lengths[row]), self._seats[row]
        ids = tuple(self._tokens[row, 1 : length + 1].tolist())
        scores = tuple(self._log_probabilities[row, :length].tolist()) if scored else None
        self._stats.sentences += 1
        self._stats.tokens += length
        return Hypothesis(seat.index, seat.target, ids, ended, scores)

    def _give_back(self, row: int) -> None:
        if self._can_seat(row):
            self._seat(row)
        else:
            self._vacate(row)

    def _can_seat(self, row: int) -> bool:
        """Whether a sentence is ready for this row, and the budget has room for it beside the other rows."""
        if not self._ready:
            self._encode_next_group()
        if not self._ready:
            return False
        source = max(self._ready[0].encoded.length, self.cache.capacity.source)
        return max(self.cache.active, row + 1) <= self._plan.capacity(target=1, source=source).rows

    def _seat(self, row: int) -> None:
        seat = self._ready.popleft()
        held = self.cache.capacity
        if seat.encoded.length > held.source:
            self._resize(held.target, seat.encoded.length)
        self.cache.admit(seat.encoded, row)
        self._seats[row : row + 1] = [seat]
        self._limits[row] = len(seat.given) or self._plan.max_new_tokens
        self._tokens[row, 1 : len(seat.given) + 1] = seat.given

    def _vacate(self, row: int) -> None:
        moved = self.cache.release(row)
        for array in (self._tokens, self._limits, self._log_probabilities):
            array[row] = array[moved]
        self._seats[row] = self._seats[moved]
        self._seats.pop()

    def _encode_next_group(self) -> None:
        group = list(self._next_group())
        if not group:
            return
        lengths = np.array([len(source.ids) for source in group], np.int64)
        input_ids = np.full((len(group), int(lengths.max())), self._plan.pad, np.int64)
        for row, source in zip(input_ids, group, strict=True):
            row[: len(source.ids)] = source.ids
        tensors = self._backend.encode(input_ids, lengths)
        for place, source in enumerate(group):
            encoded = EncodedSource(tensors, place, len(source.ids))
            self._ready.extend(_Waiting(source.index, i, given, encoded) for i, given in enumerate(source.targets))

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
        source = int(cache.source_lengths[: cache.active].max(initial=1))
        need = self._plan.capacity(target=target, source=source)
        too_large = need.target * SHRINK_BELOW <= held.target or need.source * SHRINK_BELOW <= held.source
        if target > held.target or too_large:
            self._resize(target, source)
        self._stats.cache_bytes = max(self._stats.cache_bytes, cache.bytes)

    def _resize(self, target: int, source: int) -> None:
        """To what the plan gives for these positions; counted where rows had to be repacked."""
        self._stats.repacks += self.cache.active > 0
        self.cache.resize(self._plan.capacity(target=target, source=source))
