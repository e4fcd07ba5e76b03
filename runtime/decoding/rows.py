"""What stands in the rows of a decode: whose they are, their tokens and scores, and the cache they live in.

Letters: R rows, of which the first n are active, G seats of R / G rows each, L positions of the longest target,
S source positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import BoolArray, FloatArray, IntArray
from kvx.runtime.decoding.cache import EncodedSource, KVCache
from kvx.runtime.decoding.filters import FilterRows
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Hypothesis, Sentence

if TYPE_CHECKING:
    from kvx.runtime.decoding.seat_options import SeatOptions


class Weights(NamedTuple):
    """The attention [S] of a row's newest token, and those of the tokens before it, which beams may share."""

    earlier: Weights | None
    newest: FloatArray


@dataclass(slots=True, eq=False)
class Seat:
    """One target of a sentence, from its encoding to its end.

    `encoded` is the source as encoded until the target has its rows; `state` is the search's own; `candidates` are the
    tokens that the target may be made of, ascending, where there is a shortlist; `shown` counts the ids that are known
    to have been decided; `error` is what its search or filters have raised.
    """

    sentence: Sentence
    target: int
    encoded: EncodedSource | None
    state: Any = None
    candidates: IntArray | None = None
    shown: int = 0
    error: BaseException | None = None

    @property
    def options(self) -> SeatOptions:
        """Those of its sentence."""
        assert self.sentence.options is not None, "a sentence in a seat without options"
        return self.sentence.options

    @property
    def fixed(self) -> tuple[int, ...]:
        """The ids of the target that are fixed beforehand."""
        return self.sentence.targets[self.target]


class Choice(NamedTuple):
    """What a search decided for n rows in G seats: the next `ids` [n]; `over` [G], the seats that are done; and where
    it keeps them, natural `log_probabilities` [n], `parents` [n], the rows that they go on from, and `scores` [n],
    by which it compares rows. `failed` [G] are the seats whose logits are not finite; None where all are.
    """

    ids: IntArray
    over: NDArray[np.bool_]
    log_probabilities: NDArray[np.float64] | None = None
    parents: IntArray | None = None
    scores: NDArray[np.float64] | None = None
    failed: BoolArray | None = None


class Fixed(NamedTuple):
    """Rows whose next token is fixed, that token of each, and which of these are `free`: framing's, not the target's
    own, so that a search gives them a probability of 1.
    """

    rows: IntArray
    tokens: IntArray
    free: BoolArray


class ActiveRows(FilterRows, Protocol):
    """What a search sees of rows whose next tokens it chooses, all that are active or those of some seats, beside what
    a filter sees of them.
    """

    @property
    def n(self) -> int:
        """How many rows these are."""
        ...

    @property
    def numbers(self) -> IntArray:
        """0 … n − 1."""
        ...

    @property
    def seats(self) -> Sequence[Seat]:
        """Their seats [G]."""
        ...

    @property
    def limits(self) -> IntArray:
        """The most of these that a row may have [n or more]."""
        ...

    @property
    def scores(self) -> NDArray[np.float64]:
        """The search's own scores of rows [n or more]."""
        ...

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        ...

    @property
    def gain(self) -> float:
        """By how many nats at most filters raise the score of a target."""
        ...

    @property
    def begun(self) -> bool:
        """Whether any token may be fixed."""
        ...

    def fixed_next(self) -> Fixed:
        """The rows whose next token is fixed."""
        ...

    def read_ended(self, row: int, log_probability: float, rank_score: float, weights: FloatArray | None) -> Hypothesis:
        """What a row would have with eos as its next token, which attends to its source by these weights [S]."""
        ...


class Group(NamedTuple):
    """Seats for which one call decides a step, their rows, and the options that they have in common."""

    seats: IntArray
    rows: IntArray
    options: SeatOptions


class Rows:
    """Rows and seats side by side: row i of the cache and of every array here belong to the same target.

    `tokens` [R, L + 1] from the first on, of which the start is one more than `forced`, with those that are fixed
    beforehand; `fixed` [R], how many these are after the first; `log_probabilities` [R, L], kept where hypotheses are
    scored; `scores` [R], the search's, 0 for the first row of a new seat, −∞ for its others. Eos takes the last place
    of a row where `ends` [R]. `groups` are the seats by the options that decide a step.
    """

    def __init__(self, cache: KVCache, plan: Plan) -> None:
        self.cache = cache
        self.eos = plan.eos
        self.forced = plan.forced
        self.beams = plan.beams
        self.seats: list[Seat] = []
        self.tokens: IntArray = np.full((plan.rows, 1), plan.start[0], np.int64)
        self.fixed = np.zeros(plan.rows, np.int64)
        self.limits = np.zeros(plan.rows, np.int64)
        self.log_probabilities = np.zeros((plan.rows, 0))
        self.scores = np.zeros(plan.rows)
        self.ends = np.zeros(plan.rows, np.bool_)
        self.groups: list[Group] = []
        self.begun = False
        self._attends = False
        self._start = plan.start
        self._attention: list[Weights | None] = [None] * plan.rows
        self._numbers = np.arange(plan.rows)

    @property
    def n(self) -> int:
        """How many rows are active."""
        return self.cache.active

    @property
    def lengths(self) -> IntArray:
        """Tokens after the first of every active row [n], which are the positions in its cache before the next step."""
        return self.cache.lengths[: self.cache.active]

    @property
    def numbers(self) -> IntArray:
        """0 … n − 1."""
        return self._numbers[: self.cache.active]

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for, where all seats are one group."""
        return self.groups[0].options.scored

    @property
    def gain(self) -> float:
        """By how many nats at most filters raise the score of a target, where all seats are one group."""
        return self.groups[0].options.filters.gain

    @property
    def longest(self) -> int:
        """The most positions that a target in a seat may have, 0 without any."""
        return int(self.limits[: self.n].max(initial=0))

    def next_ids(self) -> IntArray:
        """The token that each active row feeds to the next step [n]."""
        ids: IntArray = self.tokens[self.numbers, self.lengths]
        return ids

    def fixed_next(self) -> Fixed:
        """The active rows whose next token is fixed."""
        return self.fixed_of(self.numbers)

    def fixed_of(self, rows: IntArray) -> Fixed:
        """Those of some rows [m] whose next token is fixed, numbered by their places among these."""
        lengths = self.cache.lengths[rows]
        last = self.ends[rows] & (lengths + 1 == self.limits[rows])
        places = np.flatnonzero((lengths < self.fixed[rows]) | last)
        tokens = self.tokens[rows[places], lengths[places] + 1]
        ends = last[places]
        tokens[ends] = self.eos
        return Fixed(places, tokens, ends | (lengths[places] < self.forced))

    def take(self, place: int, seat: Seat) -> None:
        """Seats a target in a place whose own has ended, or in the first free one. Its encoding is let go."""
        assert seat.encoded is not None, "a target that has a seat already"
        options, given = seat.options, (*(seat.sentence.start or self._start), *seat.fixed)
        limit = seat.sentence.most_tokens(seat.target) + self.forced
        self._hold(limit)
        self.cache.admit(seat.encoded, place)
        seat.encoded = None
        self.seats[place : place + 1] = [seat]
        rows = self.of_seat(place)
        self.limits[rows] = limit
        self.fixed[rows] = len(given) - 1
        self.ends[rows] = options.ends_at_limit
        self.tokens[rows, : len(given)] = given
        self.scores[rows] = -np.inf
        self.scores[rows.start] = 0.0
        self._attention[rows] = [None] * self.beams

    def vacate(self, seat: int) -> None:
        """Gives a seat back; the last one that is taken moves into its place."""
        moved = self.cache.release(seat)
        old, new = self.of_seat(moved), self.of_seat(seat)
        for array in (self.tokens, self.fixed, self.limits, self.log_probabilities, self.scores, self.ends):
            array[new] = array[old]
        self._attention[new] = self._attention[old]
        self.seats[seat] = self.seats[moved]
        self.seats.pop()

    def regroup(self) -> None:
        """Sees who decides steps with whom, after seats have changed."""
        n = self.n
        self.begun = bool(self.fixed[:n].any() or self.ends[:n].any())
        self._attends = any(seat.options.with_attention for seat in self.seats)
        if not self.seats:
            self.groups = []
            return
        first = self.seats[0].options
        if all(seat.options is first for seat in self.seats):
            self.groups = [Group(self._numbers[: len(self.seats)], self.numbers, first)]
            return
        found: list[tuple[SeatOptions, list[int]]] = []
        for place, seat in enumerate(self.seats):
            places = next((places for options, places in found if options.steps_like(seat.options)), None)
            if places is None:
                found.append((seat.options, [place]))
            else:
                places.append(place)
        self.groups = [Group(np.array(places), self._rows_of(places), options) for options, places in found]

    def append(self, choice: Choice, attention: FloatArray | None) -> None:
        """One more token for every active row, after what its parent has."""
        self.cache.advance()
        if choice.parents is not None:
            self._follow(choice.parents)
        rows, lengths = self.numbers, self.lengths
        if attention is not None and self._attends:
            self._note(attention if choice.parents is None else attention[choice.parents])
        if choice.log_probabilities is not None:
            self.log_probabilities[rows, lengths - 1] = choice.log_probabilities
        if choice.scores is not None:
            self.scores[: self.n] = choice.scores
        self.tokens[rows, lengths] = choice.ids

    def read(self, row: int, rank_score: float | None = None) -> Hypothesis:
        """What a row has by now."""
        length = int(self.cache.lengths[row])
        ids = tuple(self.tokens[row, self.forced + 1 : length + 1].tolist())
        scored = self.seats[row // self.beams].options.scored
        scores = tuple(self.log_probabilities[row, self.forced : length].tolist()) if scored else None
        ended = bool(ids) and ids[-1] == self.eos
        return Hypothesis(
            ids, ended, scores, rank_score, self._stacked(self._attention[row]), self._is_cut(row, length)
        )

    def read_ended(self, row: int, log_probability: float, rank_score: float, weights: FloatArray | None) -> Hypothesis:
        """What a row would have with eos as its next token, which attends to its source by these weights [S]."""
        open_ = self.read(row)
        scores = None if open_.log_probabilities is None else (*open_.log_probabilities, log_probability)
        stacked = None
        if weights is not None and self.seats[row // self.beams].options.with_attention:
            stacked = self._stacked(Weights(self._attention[row], self._of_source(row, weights)))
        cut = self._is_cut(row, int(self.cache.lengths[row]) + 1)
        return Hypothesis((*open_.ids, self.eos), True, scores, rank_score, stacked, cut)

    def at_limit(self) -> NDArray[np.bool_]:
        """The seats whose rows have as many tokens as they may have [G]."""
        reached: NDArray[np.bool_] = self.lengths >= self.limits[: self.cache.active]
        return reached if self.beams == 1 else reached[:: self.beams]

    def of_seat(self, seat: int) -> slice:
        """The rows of a seat."""
        return slice(seat * self.beams, (seat + 1) * self.beams)

    def _rows_of(self, seats: Sequence[int]) -> IntArray:
        rows: IntArray = (np.array(seats)[:, None] * self.beams + np.arange(self.beams)).reshape(-1)
        return rows

    def _hold(self, positions: int) -> None:
        """Makes sure that rows have places for this many tokens after the first."""
        rows, held = self.tokens.shape
        if positions >= held:
            size = max(positions, min(2 * held, positions + held))
            tokens, scores = np.zeros((rows, size + 1), np.int64), np.zeros((rows, size))
            tokens[:, :held], scores[:, : held - 1] = self.tokens, self.log_probabilities
            self.tokens, self.log_probabilities = tokens, scores

    def _is_cut(self, row: int, length: int) -> bool:
        """Whether a target of this length had to end."""
        return bool(self.ends[row] and length >= self.limits[row])

    def _follow(self, parents: IntArray) -> None:
        children = np.flatnonzero(parents != self.numbers)
        if not children.size:
            return
        self.cache.follow(parents, self._in_common(parents))
        for array in (self.tokens, self.log_probabilities):
            array[children] = array[parents[children]]
        if self._attends:
            self._attention[: self.n] = [self._attention[parent] for parent in parents.tolist()]

    def _in_common(self, parents: IntArray) -> IntArray:
        """With how many of the same tokens each row and its parent begin [n].

        Whatever two beams have in common comes from one row, and is the same to the last bit in their caches. Not so in
        rows that are no beams, whose score is −∞: they have nothing in common with any other.
        """
        tokens = self.tokens[: self.n, : int(self.lengths.max()) + 1]
        same = tokens == tokens[parents]
        same[:, -1] = False
        common: IntArray = np.where(self.scores[: self.n] > -np.inf, same.argmin(axis=1), 0)
        return common

    def _note(self, attention: FloatArray) -> None:
        for row in range(self.n):
            if self.seats[row // self.beams].options.with_attention:
                self._attention[row] = Weights(self._attention[row], self._of_source(row, attention[row]))

    def _stacked(self, weights: Weights | None) -> FloatArray | None:
        """[tokens after the start, S] from a chain of weights, the newest first."""
        found = []
        while weights is not None:
            found.append(weights.newest)
            weights = weights.earlier
        chosen = found[::-1][self.forced :]
        return np.stack(chosen) if chosen else None

    def _of_source(self, row: int, weights: FloatArray) -> FloatArray:
        """A copy, because the step's output is valid only until the next step."""
        return weights[: len(self.seats[row // self.beams].sentence.ids)].copy()


class Selection:
    """The rows of one group as a search and filters see them, numbered from 0."""

    def __init__(self, rows: Rows, group: Group) -> None:
        self.seats = [rows.seats[place] for place in group.seats.tolist()]
        self.n = len(group.rows)
        self.numbers = np.arange(self.n)
        self.lengths: IntArray = rows.cache.lengths[group.rows]
        self.limits: IntArray = rows.limits[group.rows]
        self.scores: NDArray[np.float64] = rows.scores[group.rows]
        self.forced, self.eos, self.begun = rows.forced, rows.eos, rows.begun
        self.scored, self.gain = group.options.scored, group.options.filters.gain
        self._rows = rows
        self._places = group.rows

    @property
    def tokens(self) -> IntArray:
        """The ids of each row from the first on [n, L + 1], of which `lengths[i]` + 1 mean something."""
        tokens: IntArray = self._rows.tokens[self._places]
        return tokens

    def fixed_next(self) -> Fixed:
        """The rows whose next token is fixed."""
        return self._rows.fixed_of(self._places)

    def read_ended(self, row: int, log_probability: float, rank_score: float, weights: FloatArray | None) -> Hypothesis:
        """What a row would have with eos as its next token, which attends to its source by these weights [S]."""
        return self._rows.read_ended(int(self._places[row]), log_probability, rank_score, weights)
