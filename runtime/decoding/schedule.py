"""Which sentence sits where in the cache, and who comes next."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import BoolArray, FloatArray, IntArray
from kvx.runtime.decoding.backend import Backend, Candidates, specs_of
from kvx.runtime.decoding.cache import EncodedSource, KVCache
from kvx.runtime.decoding.plan import GROUP_POSITIONS, Plan, rung
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.decoding.rows import Choice, Rows, Seat
from kvx.runtime.decoding.search import Search

_log = logging.getLogger("kvx")

SHRINK_BELOW = 4  # buffers this many times too large are worth a repack


class Schedule:
    """Fills free seats from a stream of sentences and retires those that are over.

    Without a search all targets are fixed and only scored; then up to `at_once` tokens of all rows together may be
    taken in one step. With `candidates`, which must know all sources, every seat has its own. `gain` is that of the
    filters.
    """

    def __init__(
        self,
        backend: Backend,
        sentences: Iterator[Sentence],
        plan: Plan,
        search: Search | None,
        stats: DecodeStats,
        *,
        at_once: int = 1,
        scored: bool = False,
        with_attention: bool = False,
        gain: float = 0.0,
        candidates: Candidates | None = None,
    ) -> None:
        specs = specs_of(backend, beams=plan.beams, shortlisted=candidates is not None)
        self.cache = KVCache(specs, plan.capacity(target=1, source=1))
        self.rows = Rows(self.cache, plan, scored=scored, with_attention=with_attention, gain=gain)
        self._backend = backend
        self._sentences = sentences
        self._plan = plan
        self._search = search
        self._stats = stats
        self._at_once = at_once
        self._candidates = candidates
        self._held_back: Sentence | None = None
        self._ready: deque[Seat] = deque()

    def fill(self) -> bool:
        """Seats waiting targets where there is room; true while any row is active."""
        while self.cache.seated < self._plan.seats and self._can_seat(self.cache.seated):
            self._seat(self.cache.seated)
        self._fit(self._tokens_ahead())
        return self.cache.active > 0

    def next_fixed(self) -> tuple[IntArray, IntArray]:
        """Of fixed targets, as many tokens of each active row as the step should take, and those that must follow,
        both [n, Q]; any id stands where a row has fewer left.
        """
        ahead, tokens = np.arange(self._tokens_ahead()), self.rows.tokens
        columns = np.minimum(self.rows.lengths[:, None] + ahead, tokens.shape[1] - 2)
        rows = np.arange(self.rows.n)[:, None]
        return tokens[rows, columns], tokens[rows, columns + 1]

    def record_fixed(self, log_probabilities: NDArray[np.float64]) -> Iterator[Outcome]:
        """Notes the log-probabilities [n, Q] of the tokens that `next_fixed` said must follow, as `record` does."""
        rows, n = self.rows, self.rows.n
        taken = np.minimum(rows.limits[:n] - rows.lengths, log_probabilities.shape[1])
        for row, (start, count) in enumerate(zip(rows.lengths.tolist(), taken.tolist(), strict=True)):
            rows.log_probabilities[row, start : start + count] = log_probabilities[row, :count]
        self.cache.lengths[:n] += taken
        self._count_step()
        meant = np.arange(log_probabilities.shape[1]) < taken[:, None]
        failed = (np.isnan(log_probabilities) & meant).any(axis=-1)
        yield from self._finish(rows.at_limit() | failed, failed)

    def record(self, choice: Choice, attention: FloatArray | None = None) -> Iterator[Outcome]:
        """Appends the chosen tokens; gives the targets that are over with them, then their seats to who waits.

        In this order: drawing the next source may mean waiting for it.
        """
        self.rows.append(choice, attention)
        self._count_step()
        over = choice.over | self.rows.at_limit()
        failed = choice.failed if choice.log_probabilities is None else self._failed(choice)
        yield from self._finish(over, None) if failed is None else self._finish(over | failed, failed)

    def cancel(self) -> Iterator[Outcome]:
        """Every target as far as it has come, those that wait for a seat and all further sentences with nothing."""
        scored = self.rows.scored
        for place in range(self.cache.seated):
            yield self._outcome(place, cancelled=True)
        for seat in self._ready:
            yield Outcome.nothing(seat.sentence, seat.target, scored=scored)
        held_back = [self._held_back] if self._held_back else []
        for sentence in itertools.chain(held_back, self._sentences):
            yield from (Outcome.nothing(sentence, target, scored=scored) for target in range(len(sentence.targets)))

    def _count_step(self) -> None:
        self._stats.steps += 1
        self._stats.row_steps += self.rows.n
        self._stats.row_places += self._plan.rows

    def _tokens_ahead(self) -> int:
        """How many tokens of each row the next step takes."""
        n, lengths = self.rows.n, self.rows.lengths
        if self._at_once == 1 or n == 0:
            return 1
        left, room = self.rows.limits[:n] - lengths, self._plan.target_positions - lengths
        return int(max(1, min(self._at_once // n, left.max(), room.min())))

    def _failed(self, choice: Choice) -> BoolArray | None:
        """The seats whose logits are not finite [G], if any: those that the search saw, and those whose filters hid it
        while a score shows it.
        """
        assert choice.log_probabilities is not None
        if not (nan := np.isnan(choice.log_probabilities)).any():
            return choice.failed
        nan &= self.rows.scores[: self.rows.n] > -np.inf
        seats: BoolArray = nan.reshape(-1, self._plan.beams).max(axis=-1)
        return seats if choice.failed is None else seats | choice.failed

    def _finish(self, over: BoolArray, failed: BoolArray | None) -> Iterator[Outcome]:
        """What became of the seats that are `over`; then their places go to who waits."""
        places = np.flatnonzero(over).tolist()
        for place in places:
            yield self._failure(place) if failed is not None and failed[place] else self._outcome(place)
        for place in places[::-1]:  # from the end, so that a target that moves in is not over itself
            if self._can_seat(place):
                self._seat(place)
            else:
                self.rows.vacate(place)

    def _outcome(self, place: int, *, cancelled: bool = False) -> Outcome:
        seat = self.rows.seats[place]
        found = [self.rows.read(place)] if self._search is None else self._search.results(self.rows, place)
        self._stats.sentences += 1
        self._stats.tokens += len(found[0].ids)
        return Outcome(seat.sentence, seat.target, tuple(found), cancelled)

    def _failure(self, place: int) -> Outcome:
        """Of a seat whose numbers are not finite: none of them may stay for whoever takes it."""
        seat = self.rows.seats[place]
        self.cache.clear(place)
        self._stats.sentences += 1
        return Outcome.nothing(seat.sentence, seat.target, scored=self.rows.scored, failed=True)

    def _can_seat(self, place: int) -> bool:
        """Whether a target is ready for this place, and the budget has room for it beside the others."""
        if not self._ready:
            self._encode_next_group()
        if not self._ready:
            return False
        source = max(len(self._ready[0].sentence.ids), self.cache.capacity.source)
        return max(self.cache.seated, place + 1) <= self._plan.capacity(target=1, source=source).seats

    def _seat(self, place: int) -> None:
        seat = self._ready.popleft()
        held, source = self.cache.capacity, seat.sentence.ids
        if len(source) > held.source:
            self._resize(held.target, len(source))
        if self._search is not None:
            seat.state = self._search.begin(seat.sentence, seat.target)
        if self._candidates is not None:
            assert self._candidates.knows(source), "a source that the shortlist does not know"
            seat.candidates = np.union1d(self._candidates.candidates(source), np.array(seat.fixed, np.int64))
        self.rows.take(place, seat, self._plan.max_new_tokens if self._search else len(seat.fixed))

    def _encode_next_group(self) -> None:
        group = list(self._next_group())
        if not group:
            return
        tensors = self._backend.encode(*padded(group, max(len(one.ids) for one in group), self._plan.pad))
        for index, sentence in enumerate(group):
            encoded = EncodedSource(tensors, index, len(sentence.ids))
            self._ready.extend(Seat(sentence, target, encoded) for target in range(len(sentence.targets)))

    def _next_group(self) -> Iterator[Sentence]:
        """Sentences until there are as many, or as many padded positions, as the encoder should get at once."""
        longest = 0
        for count in range(self._plan.group):
            sentence, self._held_back = self._held_back or next(self._sentences, None), None
            if sentence is None:
                return
            longest = max(longest, len(sentence.ids))
            if count and longest * (count + 1) > GROUP_POSITIONS:
                self._held_back = sentence
                return
            yield sentence

    def _fit(self, tokens: int) -> None:
        """Makes room for the next tokens of every row, or gives up room that nobody needs."""
        cache, held = self.cache, self.cache.capacity
        target = int(cache.lengths[: cache.active].max(initial=0)) + tokens
        source = max(1, cache.longest_source)
        plan = self._plan
        too_large = (
            rung(target, plan.target_positions) * SHRINK_BELOW <= held.target
            or rung(source, plan.source_positions) * SHRINK_BELOW <= held.source
        )
        if target > held.target or too_large:
            self._resize(target, source)
        self._stats.cache_bytes = max(self._stats.cache_bytes, cache.bytes)

    def _resize(self, target: int, source: int) -> None:
        """To what the plan gives for these positions; counted where rows had to be repacked."""
        capacity = self._plan.capacity(target=target, source=source)
        if self.cache.active:
            self._stats.repacks += 1
            _log.debug("cache repacked: %s → %s, %d rows active", self.cache.capacity, capacity, self.cache.active)
        self.cache.resize(capacity)


def padded(sentences: Sequence[Sentence], positions: int, pad: int) -> tuple[IntArray, IntArray]:
    """Sentences → what the encoder takes of them: input_ids [B, positions] and source_lengths [B]."""
    input_ids = np.full((len(sentences), positions), pad, np.int64)
    for row, sentence in zip(input_ids, sentences, strict=True):
        row[: len(sentence.ids)] = sentence.ids
    return input_ids, np.array([len(sentence.ids) for sentence in sentences], np.int64)
