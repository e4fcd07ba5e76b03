"""Greedy decoding by a graph that feeds itself: a device runs blocks of steps and the host only looks in between.

Rows keep their places and shapes never change, so that a step may be captured once and replayed. A row without a
sentence starts as finished, has length 0, has no vote on when to stop and never shows in a result.

Letters: R rows, S source positions, T capacity of a row.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import IntArray
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.decode import Cancelled, never, run, with_options
from kvx.runtime.decoding.lane import Drawn, Source, Stopped, padded
from kvx.runtime.decoding.plan import GROUP_POSITIONS, Plan, rung
from kvx.runtime.decoding.results import Decided, DecodeStats, Hypothesis, News, Outcome, Sentence, StopReason
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.decoding.seat_options import SeatOptions
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


def feeds_itself(backend: object) -> TypeGuard[LoopBackend]:
    """Whether this is how a backend decodes greedily."""
    return isinstance(backend, LoopBackend) and backend.loops


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

    As `decode` with Greedy, but that the host looks only every `block` steps.
    """
    options = SeatOptions(Greedy(), plan.max_new_tokens, ends_at_limit=plan.ends_at_limit)
    drawn = Drawn(with_options(sentences, options))
    yield from run(DeviceLane(backend, plan, drawn, stats, block=block), drawn, cancelled)


class DeviceLane:
    """As Lane, on rows of a device: the host looks only every `block` steps, so that a row stops at most so much later
    than it might. A source that is too long for the rows, or may become so, waits until they are empty and gets larger
    ones. A row that a sentence left with numbers that are not finite is given to no other.
    """

    def __init__(
        self, backend: LoopBackend, plan: Plan, source: Source, stats: DecodeStats, *, block: int = BLOCK
    ) -> None:
        self._backend = backend
        self._plan = plan
        self._source = source
        self._stats = stats
        self._block = block
        self._line: deque[Sentence] = deque()  # taken from the source, without a row yet
        self._held = contextlib.ExitStack()  # the rows on the device
        self._rows: LoopRows | None = None
        self._state: LoopState
        self._seated: list[Sentence | None] = []
        self._shown: list[int] = []
        self._spoilt: set[int] = set()  # rows that nobody may take any more

    @property
    def active(self) -> int:
        """How many rows have a sentence."""
        return sum(sentence is not None for sentence in self._seated)

    @property
    def running(self) -> bool:
        """Whether any row has a sentence."""
        return self.active > 0

    @property
    def empty(self) -> bool:
        """Whether nothing is seated or waits for a row."""
        return not self.running and not self._line

    @property
    def bytes(self) -> int:
        """What the rows take."""
        return 0 if self._rows is None else self._backend.loop_bytes(self._rows.capacity)

    @property
    def reserved(self) -> int:
        """Nothing of what lanes on the host share."""
        return 0

    def fits(self, sentence: Sentence) -> bool:
        """See Room: a sentence that the rows cannot hold waits for others."""
        return True

    def fill(self) -> bool:
        """See Lane."""
        if not self.running:
            self.close()
            self._take(self._plan.rows)
            if self._line:
                self._open()
        if self._rows is not None:
            self._seat_all(self._rows)
        return self.running

    def advance(self) -> list[News]:
        """A block of steps, or fewer where no row can go on so long → what became known with it."""
        assert self._rows is not None
        before = self._state
        running = ~before.past_finished
        left = int((before.limits - before.past_lengths)[running].max(initial=1))
        steps = min(self._block, left)
        self._rows.run(steps)
        self._state = self._rows.read()
        self._stats.steps += steps
        self._stats.row_steps += int((self._state.past_lengths - before.past_lengths).sum())
        self._stats.row_places += steps * self._rows.capacity.rows
        news: list[News] = []
        for row, sentence in enumerate(self._seated):
            if sentence is not None and self._state.past_finished[row]:
                self._seated[row] = None
                news.append(self._outcome(self._rows, row, sentence))
            elif sentence is not None and sentence.followed:
                news.extend(self._decided(row, sentence))
        return news

    def stop(self, stopped: Stopped) -> list[Outcome]:
        """See Lane. The rows of who is stopped are finished, and free."""
        changed, outcomes = False, list[Outcome]()
        for row, sentence in enumerate(self._seated):
            if sentence is not None and (reason := stopped(sentence)) is not None:
                assert self._rows is not None
                outcomes.append(self._outcome(self._rows, row, sentence, reason))
                self._seated[row] = None
                self._state.past_finished[row] = changed = True
        if changed and self._rows is not None:
            self._rows.write(self._state)
        waiting = [(sentence, stopped(sentence)) for sentence in self._line]
        self._line = deque(sentence for sentence, reason in waiting if reason is None)
        for sentence, reason in waiting:
            if reason is not None:
                outcomes.append(Outcome.nothing(sentence, 0, stopped=reason))
        return outcomes

    def trim(self) -> None:
        """Nothing: rows do not change."""

    def broken(self) -> list[Outcome]:
        """See Lane: nothing is encoded by itself."""
        return []

    def close(self, error: BaseException | None = None) -> None:
        """Gives the rows back, after an error as rows whose state is unknown."""
        held, self._held = self._held, contextlib.ExitStack()
        self._rows, self._seated = None, []
        held.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _take(self, count: int) -> None:
        """Has this many sentences at hand, if there are."""
        while len(self._line) < count and (found := self._source.take(count - len(self._line), self)):
            self._line.extend(found)

    def _open(self) -> None:
        """Rows for those at hand."""
        capacity = self._capacity()
        self._stats.cache_bytes = max(self._stats.cache_bytes, self._backend.loop_bytes(capacity))
        self._rows = self._held.enter_context(self._backend.loop_rows(capacity))
        self._seated, self._shown = [None] * capacity.rows, [0] * capacity.rows
        self._spoilt.clear()
        self._state = LoopState.idle(capacity, self._plan.forced)

    def _capacity(self) -> Capacity:
        """For as many of those at hand, in order, as the bytes hold together. Raises CapacityError."""
        line = list(self._line)
        for count in range(len(line), 1, -1):
            with contextlib.suppress(CapacityError):
                return _capacity(self._backend, self._plan, line[:count])
        return _capacity(self._backend, self._plan, line[:1])

    def _seat_all(self, rows: LoopRows) -> None:
        """Seats waiting sentences in the free rows."""
        free = [row for row, sentence in enumerate(self._seated) if sentence is None and row not in self._spoilt]
        admitted: list[int] = []
        for row in free:
            self._take(1)
            if not self._line or not self._holds(rows.capacity, self._line[0]):
                break
            self._seat(row, self._line.popleft())
            admitted.append(row)
        at_once = max(1, GROUP_POSITIONS // rows.capacity.source)
        for first, last in _runs(admitted):
            for some in range(first, last + 1, at_once):
                self._encode(rows, some, min(last, some + at_once - 1))
        if admitted:
            rows.write(self._state)

    def _holds(self, capacity: Capacity, sentence: Sentence) -> bool:
        longest = sentence.most_tokens(0) + self._plan.forced
        return len(sentence.ids) <= capacity.source and longest < capacity.target

    def _seat(self, row: int, sentence: Sentence) -> None:
        state = self._state
        self._seated[row], self._shown[row] = sentence, 0
        state.input_ids[row], *state.forced_ids[row] = sentence.start or self._plan.start
        state.past_lengths[row] = 0
        state.source_lengths[row] = len(sentence.ids)
        state.limits[row] = sentence.most_tokens(0) + self._plan.forced
        state.past_finished[row] = False

    def _encode(self, rows: LoopRows, first: int, last: int) -> None:
        """The sources of the rows from `first` to `last`, padded to the rows' own source positions."""
        seated = [sentence for sentence in self._seated[first : last + 1] if sentence is not None]
        rows.encode(first, *padded(seated, rows.capacity.source, self._plan.pad))

    def _decided(self, row: int, sentence: Sentence) -> Iterator[Decided]:
        ids = self._ids(row)
        if len(ids) > self._shown[row]:
            yield Decided(sentence, ids[self._shown[row] :], None)
            self._shown[row] = len(ids)

    def _ids(self, row: int) -> tuple[int, ...]:
        return tuple(self._state.past_ids[row, self._plan.forced : int(self._state.past_lengths[row])].tolist())

    def _outcome(self, rows: LoopRows, row: int, sentence: Sentence, stopped: StopReason | None = None) -> Outcome:
        """A row that was given no token, although it had not ended and has room, has logits that are not finite."""
        assert sentence.options is not None
        ids, eos = self._ids(row), self._plan.eos
        at_limit = bool(self._state.past_lengths[row] >= self._state.limits[row])
        cut = at_limit and sentence.options.ends_at_limit
        if cut:
            ids = (*ids[:-1], eos)
        ended = bool(ids) and ids[-1] == eos
        self._stats.sentences += 1
        if self._state.past_finished[row] and not ended and not at_limit:
            self._spoilt.add(row)
            rows.spoil()
            return Outcome.nothing(sentence, 0)
        self._stats.tokens += len(ids)
        return Outcome(sentence, 0, (Hypothesis(ids, ended, cut=cut),), stopped)


def _capacity(backend: LoopBackend, plan: Plan, ahead: list[Sentence]) -> Capacity:
    """One of few sizes that hold them: rows a power of two, or all that the plan has; T above every limit."""
    wanted = 1
    while wanted < len(ahead):
        wanted *= 2
    longest = max(sentence.most_tokens(0) for sentence in ahead) + plan.forced
    target = -(-(longest + 1) // TARGET_UNIT) * TARGET_UNIT
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
