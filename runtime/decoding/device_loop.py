"""Greedy decoding by a graph that feeds itself: a device runs blocks of steps and the host only looks in between.

Rows keep their places and shapes never change, so that a step may be captured once and replayed. A row without a
sentence starts as finished, has length 0, has no vote on when to stop and never shows in a result.

Letters: R rows, S source positions, T capacity of a row.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import IntArray
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.decode import Cancelled, never
from kvx.runtime.decoding.plan import GROUP_POSITIONS, Plan, rung
from kvx.runtime.decoding.results import DecodeStats, Hypothesis, Outcome, Sentence
from kvx.runtime.decoding.schedule import padded
from kvx.runtime.errors import CapacityError

BLOCK = 8  # steps between two looks
TARGET_UNIT = 64  # capacities of rows are multiples of it, so that few different ones are captured


@dataclass(slots=True)
class LoopState:
    """What the looped step feeds itself and what the host sets, by the names of the contract: [R] each, past_ids [R,
    T], forced_ids [R, F], which a graph without forced tokens does not take.
    """

    input_ids: IntArray
    past_lengths: IntArray
    source_lengths: IntArray
    limits: IntArray
    past_finished: NDArray[np.bool_]
    past_ids: IntArray
    forced_ids: IntArray

    @classmethod
    def idle(cls, capacity: Capacity, forced: int) -> Self:
        """Rows without a sentence, and with places for this many forced tokens. Their sources have one position, of
        zeros, so that attention to them is defined.
        """
        rows = capacity.rows
        zeros = np.zeros(rows, np.int64)
        return cls(
            input_ids=zeros.copy(),
            past_lengths=zeros.copy(),
            source_lengths=np.ones(rows, np.int64),
            limits=np.ones(rows, np.int64),
            past_finished=np.ones(rows, bool),
            past_ids=np.zeros((rows, capacity.target), np.int64),
            forced_ids=np.zeros((rows, forced), np.int64),
        )


class LoopRows(Protocol):
    """Rows of a fixed capacity on a device."""

    @property
    def capacity(self) -> Capacity:
        """R, T and S."""
        ...

    def encode(self, row: int, input_ids: IntArray, source_lengths: IntArray) -> None:
        """input_ids [n, S], source_lengths [n] → the cross keys and values of the rows from `row` on, in place."""
        ...

    def write(self, state: LoopState) -> None:
        """Sets all of the state."""
        ...

    def run(self, steps: int) -> None:
        """So many steps, each feeding the next."""
        ...

    def read(self) -> LoopState:
        """The state as it is now."""
        ...

    def spoil(self) -> None:
        """Notes that what a row left behind is not finite: nobody else may have these rows after this decode."""
        ...


@runtime_checkable
class LoopBackend(Protocol):
    """A backend with a graph that feeds itself, where `loops` is true."""

    @property
    def loops(self) -> bool:
        """Whether this is how it decodes greedily."""
        ...

    def loop_rows(self, capacity: Capacity) -> AbstractContextManager[LoopRows]:
        """Idle rows of this capacity, for one decode. Raises CapacityError where the device cannot hold them."""
        ...

    def loop_bytes(self, capacity: Capacity) -> int:
        """Bytes of the buffers at this capacity."""
        ...


def decode_in_blocks(
    backend: LoopBackend,
    sentences: Iterable[Sentence],
    plan: Plan,
    stats: DecodeStats,
    *,
    block: int = BLOCK,
    cancelled: Cancelled = never,
) -> Iterator[Outcome]:
    """Sentences, each with one target of which nothing is fixed → their greedy translations, as they are over.

    As `decode` with Greedy, but that the host looks only every `block` steps: a row stops at most so much later than it
    might. A source that is too long for the rows waits until they are empty and gets larger ones. A row that a sentence
    left with numbers that are not finite is given to no other.
    """
    waiting = _Line(iter(sentences))
    while ahead := waiting.look(plan.rows):
        capacity = _capacity(backend, plan, ahead)
        stats.cache_bytes = max(stats.cache_bytes, backend.loop_bytes(capacity))
        with backend.loop_rows(capacity) as rows:
            yield from _Loop(rows, waiting, plan, stats, block, cancelled).run()


class _Line:
    """Sentences that are drawn, at most as many as there are rows for, but have no row yet."""

    def __init__(self, sentences: Iterator[Sentence]) -> None:
        self.sentences = sentences
        self.drawn: deque[Sentence] = deque()

    def look(self, count: int) -> list[Sentence]:
        """The next sentences, up to this many."""
        while len(self.drawn) < count and (sentence := next(self.sentences, None)) is not None:
            self.drawn.append(sentence)
        return list(self.drawn)


class _Loop:
    """One set of rows, from the first sentence that fits to the last."""

    def __init__(
        self,
        rows: LoopRows,
        waiting: _Line,
        plan: Plan,
        stats: DecodeStats,
        block: int,
        cancelled: Cancelled,
    ) -> None:
        self._rows = rows
        self._waiting = waiting
        self._plan = plan
        self._stats = stats
        self._block = block
        self._cancelled = cancelled
        self._seated: list[Sentence | None] = [None] * rows.capacity.rows
        self._spoilt: set[int] = set()  # rows that nobody may take any more
        self._state = LoopState.idle(rows.capacity, plan.forced)

    def run(self) -> Iterator[Outcome]:
        """The outcomes, as they come."""
        while self._fill():
            if self._cancelled():
                yield from self._cancel()
                return
            self._advance()
            yield from self._collect()

    def _fill(self) -> bool:
        """Seats waiting sentences in the free rows; true while any row has one."""
        free = [row for row, sentence in enumerate(self._seated) if sentence is None and row not in self._spoilt]
        admitted: list[int] = []
        for row in free:
            ahead = self._waiting.look(1)
            if not ahead or len(ahead[0].ids) > self._rows.capacity.source:
                break
            self._seat(row, self._waiting.drawn.popleft())
            admitted.append(row)
        at_once = max(1, GROUP_POSITIONS // self._rows.capacity.source)
        for first, last in _runs(admitted):
            for some in range(first, last + 1, at_once):
                self._encode(some, min(last, some + at_once - 1))
        if admitted:
            self._rows.write(self._state)
        return any(sentence is not None for sentence in self._seated)

    def _seat(self, row: int, sentence: Sentence) -> None:
        state = self._state
        self._seated[row] = sentence
        state.input_ids[row], *state.forced_ids[row] = sentence.start or self._plan.start
        state.past_lengths[row] = 0
        state.source_lengths[row] = len(sentence.ids)
        state.limits[row] = self._plan.target_positions
        state.past_finished[row] = False

    def _encode(self, first: int, last: int) -> None:
        """The sources of the rows from `first` to `last`, padded to the rows' own source positions."""
        seated = [sentence for sentence in self._seated[first : last + 1] if sentence is not None]
        self._rows.encode(first, *padded(seated, self._rows.capacity.source, self._plan.pad))

    def _advance(self) -> None:
        """A block of steps, or fewer where no row can go on so long."""
        before = self._state
        running = ~before.past_finished
        left = int((before.limits - before.past_lengths)[running].max(initial=1))
        steps = min(self._block, left)
        self._rows.run(steps)
        self._state = self._rows.read()
        self._stats.steps += steps
        self._stats.row_steps += int((self._state.past_lengths - before.past_lengths).sum())
        self._stats.row_places += steps * self._rows.capacity.rows

    def _collect(self) -> Iterator[Outcome]:
        """What became of the rows that are finished; they are free then."""
        for row in np.flatnonzero(self._state.past_finished).tolist():
            sentence = self._seated[row]
            if sentence is not None:
                self._seated[row] = None
                yield self._outcome(row, sentence)

    def _outcome(self, row: int, sentence: Sentence, *, cancelled: bool = False) -> Outcome:
        """A row that was given no token, although it had not ended and has room, has logits that are not finite."""
        length = int(self._state.past_lengths[row])
        ids = tuple(self._state.past_ids[row, self._plan.forced : length].tolist())
        at_limit = length >= self._state.limits[row]
        cut = at_limit and self._plan.ends_at_limit
        if cut:
            ids = (*ids[:-1], self._plan.eos)
        ended = bool(ids) and ids[-1] == self._plan.eos
        self._stats.sentences += 1
        if self._state.past_finished[row] and not ended and not at_limit:
            self._spoilt.add(row)
            self._rows.spoil()
            return Outcome.nothing(sentence, 0, scored=False, failed=True)
        self._stats.tokens += len(ids)
        return Outcome(sentence, 0, (Hypothesis(ids, ended, cut=cut),), cancelled)

    def _cancel(self) -> Iterator[Outcome]:
        for row, sentence in enumerate(self._seated):
            if sentence is not None:
                yield self._outcome(row, sentence, cancelled=True)
        for sentence in itertools.chain(self._waiting.drawn, self._waiting.sentences):
            yield Outcome.nothing(sentence, 0, scored=False)
        self._waiting.drawn.clear()


@dataclass(frozen=True, slots=True)
class DeviceLoop:
    """Greedy decoding in blocks of steps on a device."""

    backend: LoopBackend
    plan: Plan

    def run(self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled) -> Iterator[Outcome]:
        """See Loop."""
        return decode_in_blocks(self.backend, sentences, self.plan, stats, cancelled=cancelled)


def _capacity(backend: LoopBackend, plan: Plan, ahead: list[Sentence]) -> Capacity:
    """One of few sizes that hold them: rows a power of two, or all that the plan has; T above every limit."""
    wanted = 1
    while wanted < len(ahead):
        wanted *= 2
    target = -(-(plan.target_positions + 1) // TARGET_UNIT) * TARGET_UNIT
    source = rung(max(len(each.ids) for each in ahead), plan.source_positions)
    one = backend.loop_bytes(Capacity(1, target, source))
    rows = min(wanted, plan.rows, plan.cache_bytes // one)
    if rows < 1:
        raise CapacityError(
            f"A row of {target} target and {source} source positions takes {one:,} bytes",
            expected=f"at most {plan.cache_bytes:,} bytes",
            remedy="Allow more bytes (`cache_bytes`) or fewer new tokens (`max_new_tokens`).",
            option="cache_bytes",
        )
    return Capacity(rows, target, source)


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows → the first and last of each run without a gap."""
    for place, row in enumerate(rows):
        if place == 0 or rows[place - 1] != row - 1:
            first = row
        if place == len(rows) - 1 or rows[place + 1] != row + 1:
            yield first, row
