"""Steps whose output projection runs over the candidates of the sentences at hand alone.

Letters: n active rows, R rows of the cache, V target vocabulary, E model width, C columns: the tokens that some seat
has among its candidates, and a few that none has any more.
"""

from __future__ import annotations

import numpy as np

from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.decoding.backend import Shortlisting, StepOutput
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.rows import Rows, Seat

COLUMNS = 128  # C is a multiple of it, so that there are few shapes
LEAST_COLUMNS = 512  # for fewer, split among threads, products may be added up in another order
SPARE = 1.25  # columns at hand for each one needed, before those that nobody needs are dropped


class ShortlistedStep:
    """A decoder step → logits [n, V], those of the candidates of each row's own sentence and −∞ for all other tokens.

    What a sentence's neighbours may say is never visible to it.
    """

    def __init__(self, shortlisting: Shortlisting, rows: Rows, stats: DecodeStats) -> None:
        self._step = shortlisting.bind(rows.cache)
        self._columns = Columns(shortlisting.projection)
        self._rows = rows
        self._stats = stats
        self._seats: list[Seat] = []
        self._tokens = np.empty(0, np.int64)  # where candidates stand in the logits of all tokens, flat
        self._found = np.empty(0, np.int64)  # and in those of the columns
        self._logits = np.full((len(rows.tokens), len(shortlisting.projection)), -np.inf, np.float32)  # [R, V]

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n] → logits [n, V], valid until the next step."""
        if self._seats != self._rows.seats:
            self._follow_seats()
        output = self._step(input_ids, self._columns.projection)
        self._logits.reshape(-1)[self._tokens] = output.logits.reshape(-1)[self._found]
        self._stats.columns += self._columns.count
        self._stats.listed_steps += 1
        return output._replace(logits=self._logits[: len(input_ids)])

    def _follow_seats(self) -> None:
        """Seats have been taken, given back or moved: other columns, in other rows."""
        self._logits.reshape(-1)[self._tokens] = -np.inf
        self._seats = list(self._rows.seats)
        of_rows = [seat.candidates for seat in self._seats for _ in range(self._rows.beams)]
        listed = [ids for ids in of_rows if ids is not None]
        assert len(listed) == len(of_rows), "a seat without candidates"
        ids, rows = np.concatenate(listed), np.repeat(np.arange(len(listed)), list(map(len, listed)))
        self._columns.hold(ids)
        self._tokens = rows * self._logits.shape[1] + ids
        self._found = rows * len(self._columns.projection) + self._columns.of[ids]


class Columns:
    """The rows of the output projection that are at hand, copied from all of them, `whole` [V, E].

    `projection` [C, E] is what the step gets: the `count` first of it mean something; `of` [V] is the column of each
    token, −1 where it has none. The very same array as long as its size is.
    """

    def __init__(self, whole: FloatArray) -> None:
        self.of: IntArray = np.full(len(whole), -1, np.int64)
        self.count = 0
        self._all = whole
        self._own = np.zeros((LEAST_COLUMNS, whole.shape[1]), np.float32)
        self.projection = self._own

    def hold(self, ids: IntArray) -> None:
        """Makes sure that these tokens have a column: only those that have none yet are copied."""
        needed = np.zeros(len(self._all), np.bool_)
        needed[ids] = True
        missing = np.flatnonzero(needed & (self.of < 0))
        if self.count + len(missing) > SPARE * needed.sum() + COLUMNS:
            missing, self.count = np.flatnonzero(needed), 0
            self.of.fill(-1)
        self._append(missing)

    def _append(self, ids: IntArray) -> None:
        first, self.count = self.count, self.count + len(ids)
        size = max(LEAST_COLUMNS, -(-self.count // COLUMNS) * COLUMNS)
        if size > len(self._own):
            grown = np.zeros((max(size, 2 * len(self._own)), self._own.shape[1]), np.float32)
            grown[:first] = self._own[:first]
            self._own = grown
        self._own[first : self.count] = self._all[ids]
        self.of[ids] = np.arange(first, self.count)
        if len(self.projection) != size or self.projection.base is not self._own:
            self.projection = self._own[:size]
