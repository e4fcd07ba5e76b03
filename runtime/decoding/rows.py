"""What stands in the rows of a decode: whose they are, their tokens and scores, and the cache they live in.

Letters: R rows, of which the first n are active, G seats of R / G rows each, L positions of the longest target,
S source positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import BoolArray, FloatArray, IntArray
from kvx.runtime.decoding.cache import EncodedSource, KVCache
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Hypothesis, Sentence


class Weights(NamedTuple):
    """The attention [S] of a row's newest token, and those of the tokens before it, which beams may share."""

    earlier: Weights | None
    newest: FloatArray


@dataclass(slots=True, eq=False)
class Seat:
    """One target of a sentence, from its encoding to its end.

    `encoded` is the source as encoded until the target has its rows; `state` is the search's own; `candidates` are the
    tokens that the target may be made of, ascending, where there is a shortlist.
    """

    sentence: Sentence
    target: int
    encoded: EncodedSource | None
    state: Any = None
    candidates: IntArray | None = None

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


class Rows:
    """Rows and seats side by side: row i of the cache and of every array here belong to the same target.

    `tokens` [R, L + 1] from the first on, of which the start is one more than `forced`, with those that are fixed
    beforehand; `fixed` [R], how many these are after the first; `log_probabilities` [R, L], kept where hypotheses are
    `scored`; `scores` [R], the search's, 0 for the first row of a new seat, −∞ for its others; `gain`, by how many nats
    at most filters raise the score of a target. Eos takes the last place of a row where it `ends_at_limit`.
    """

    def __init__(
        self, cache: KVCache, plan: Plan, *, scored: bool, with_attention: bool = False, gain: float = 0.0
    ) -> None:
        self.cache = cache
        self.eos = plan.eos
        self.forced = plan.forced
        self.ends_at_limit = plan.ends_at_limit
        self.beams = plan.beams
        self.scored = scored
        self.with_attention = with_attention
        self.gain = gain
        self.seats: list[Seat] = []
        self.tokens: IntArray = np.full((plan.rows, plan.target_positions + 1), plan.start[0], np.int64)
        self.fixed = np.zeros(plan.rows, np.int64)
        self.limits = np.zeros(plan.rows, np.int64)
        self.log_probabilities = np.zeros((plan.rows, plan.target_positions))
        self.scores = np.zeros(plan.rows)
        self.begun = plan.ends_at_limit  # whether any token may be fixed
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

    def next_ids(self) -> IntArray:
        """The token that each active row feeds to the next step [n]."""
        ids: IntArray = self.tokens[self.numbers, self.lengths]
        return ids

    def fixed_next(self) -> Fixed:
        """The active rows whose next token is fixed."""
        lengths, n = self.lengths, self.n
        fixed = lengths < self.fixed[:n]
        last = lengths + 1 == self.limits[:n] if self.ends_at_limit else None
        rows = np.flatnonzero(fixed if last is None else fixed | last)
        tokens = self.tokens[rows, lengths[rows] + 1]
        free = lengths[rows] < self.forced
        if last is not None:
            ends = last[rows]
            tokens[ends] = self.eos
            free |= ends
        return Fixed(rows, tokens, free)

    def take(self, place: int, seat: Seat, limit: int) -> None:
        """Seats a target in a place whose own has ended, or in the first free one. Its encoding is let go."""
        assert seat.encoded is not None, "a target that has a seat already"
        self.cache.admit(seat.encoded, place)
        seat.encoded = None
        self.seats[place : place + 1] = [seat]
        rows, given = self.of_seat(place), (*(seat.sentence.start or self._start), *seat.fixed)
        self.limits[rows] = limit + self.forced
        self.fixed[rows] = len(given) - 1
        self.tokens[rows, : len(given)] = given
        self.begun |= len(given) > 1
        self.scores[rows] = -np.inf
        self.scores[rows.start] = 0.0
        if self.with_attention:
            self._attention[rows] = [None] * self.beams

    def vacate(self, seat: int) -> None:
        """Gives a seat back; the last one that is taken moves into its place."""
        moved = self.cache.release(seat)
        old, new = self.of_seat(moved), self.of_seat(seat)
        for array in (self.tokens, self.fixed, self.limits, self.log_probabilities, self.scores):
            array[new] = array[old]
        self._attention[new] = self._attention[old]
        self.seats[seat] = self.seats[moved]
        self.seats.pop()

    def append(self, choice: Choice, attention: FloatArray | None) -> None:
        """One more token for every active row, after what its parent has."""
        self.cache.advance()
        if choice.parents is not None:
            self._follow(choice.parents)
        rows, lengths = self.numbers, self.lengths
        if self.with_attention and attention is not None:
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
        scores = tuple(self.log_probabilities[row, self.forced : length].tolist()) if self.scored else None
        ended = bool(ids) and ids[-1] == self.eos
        return Hypothesis(
            ids, ended, scores, rank_score, self._stacked(self._attention[row]), self._is_cut(row, length)
        )

    def read_ended(
        self, row: int, log_probability: float, rank_score: float, attention: FloatArray | None
    ) -> Hypothesis:
        """What a row would have with eos as its next token."""
        open_ = self.read(row)
        scores = None if open_.log_probabilities is None else (*open_.log_probabilities, log_probability)
        weights = None
        if self.with_attention and attention is not None:
            weights = self._stacked(Weights(self._attention[row], self._of_source(row, attention)))
        cut = self._is_cut(row, int(self.cache.lengths[row]) + 1)
        return Hypothesis((*open_.ids, self.eos), True, scores, rank_score, weights, cut)

    def at_limit(self) -> NDArray[np.bool_]:
        """The seats whose rows have as many tokens as they may have [G]."""
        reached: NDArray[np.bool_] = self.lengths >= self.limits[: self.cache.active]
        return reached if self.beams == 1 else reached[:: self.beams]

    def _is_cut(self, row: int, length: int) -> bool:
        """Whether a target of this length had to end."""
        return self.ends_at_limit and length >= self.limits[row]

    def of_seat(self, seat: int) -> slice:
        """The rows of a seat."""
        return slice(seat * self.beams, (seat + 1) * self.beams)

    def _follow(self, parents: IntArray) -> None:
        self.cache.follow(parents)
        children = np.flatnonzero(parents != np.arange(len(parents)))
        for array in (self.tokens, self.log_probabilities):
            array[children] = array[parents[children]]
        if self.with_attention:
            self._attention[: self.n] = [self._attention[parent] for parent in parents.tolist()]

    def _note(self, attention: FloatArray) -> None:
        for row in range(self.n):
            self._attention[row] = Weights(self._attention[row], self._of_source(row, attention))

    def _stacked(self, weights: Weights | None) -> FloatArray | None:
        """[tokens after the start, S] from a chain of weights, the newest first."""
        found = []
        while weights is not None:
            found.append(weights.newest)
            weights = weights.earlier
        chosen = found[::-1][self.forced :]
        return np.stack(chosen) if chosen else None

    def _of_source(self, row: int, attention: FloatArray) -> FloatArray:
        """A copy, because the step's output is valid only until the next step."""
        return attention[row, : len(self.seats[row // self.beams].sentence.ids)].copy()
