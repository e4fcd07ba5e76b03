"""Filters: what a target may not be, as changes of the logits.

Letters: n active rows, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from kvx.runtime.arrays import FloatArray, IntArray


class FilterRows(Protocol):
    """What a filter sees of the active rows: row i of the logits is row i here."""

    @property
    def tokens(self) -> IntArray:
        """The ids of each row from the first on [R, L + 1], of which the first `lengths[i]` + 1 mean something."""
        ...

    @property
    def lengths(self) -> IntArray:
        """How many tokens each active row has after the first [n]."""
        ...

    @property
    def forced(self) -> int:
        """How many of these are not chosen, such as that of the target's language."""
        ...

    @property
    def eos(self) -> int:
        """The id that ends a target."""
        ...


class Filter(Protocol):
    """One constraint: any callable of this signature.

    A filter that may raise what the model gives has a `gain`: by how many nats at most a target's score, in all its
    tokens together. Without one it is taken to be without a limit, so that a beam search never stops too early.
    """

    def __call__(self, logits: FloatArray, rows: FilterRows, /) -> None:
        """Changes logits [n, V] in place, −∞ for what may not come next in each of the active rows."""
        ...


@dataclass(frozen=True, slots=True)
class Suppress:
    """These `ids` never come."""

    ids: tuple[int, ...]
    gain: ClassVar[float] = 0.0

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """The columns of the ids."""
        logits[:, list(self.ids)] = -np.inf


@dataclass(frozen=True, slots=True)
class Ban:
    """These `sequences` of ids never come."""

    sequences: tuple[tuple[int, ...], ...]
    gain: ClassVar[float] = 0.0

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """The last id of a sequence, where the others are the row's latest."""
        for *first, last in self.sequences:
            for row in np.flatnonzero(rows.lengths >= len(first)).tolist():
                length = int(rows.lengths[row])
                if rows.tokens[row, length + 1 - len(first) : length + 1].tolist() == first:
                    logits[row, last] = -np.inf


@dataclass(frozen=True, slots=True)
class NoRepeatedNgrams:
    """No `size` tokens after the first come twice in the same order (Paulus et al. 2018)."""

    size: int
    gain: ClassVar[float] = 0.0

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """What followed the last size − 1 tokens wherever they stood before."""
        for row, length in enumerate(rows.lengths.tolist()):
            if length >= self.size:
                ids = rows.tokens[row, 1 : length + 1]
                ngrams = np.lib.stride_tricks.sliding_window_view(ids, self.size)
                same = (ngrams[:, :-1] == ids[length - self.size + 1 :]).all(axis=-1)
                logits[row, ngrams[same, -1]] = -np.inf


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Tokens that stand in the target already have positive logits divided and negative ones multiplied by `penalty`
    (Keskar et al. 2019).
    """

    penalty: float

    @property
    def gain(self) -> float:
        """Below 1 it raises logits, without a limit."""
        return math.inf if self.penalty < 1 else 0.0

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """Each token once, however often it stands there."""
        for row, length in enumerate(rows.lengths.tolist()):
            ids = np.unique(rows.tokens[row, 1 : length + 1])
            values = logits[row, ids]
            logits[row, ids] = np.where(values > 0, values / self.penalty, values * self.penalty)


@dataclass(frozen=True, slots=True)
class EndPenalty:
    """Ending costs `penalty` nats; a negative one makes targets shorter."""

    penalty: float

    @property
    def gain(self) -> float:
        """A target ends once."""
        return max(0.0, -self.penalty)

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """The column of eos."""
        logits[:, rows.eos] -= np.float32(self.penalty)


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """A target has at least this many `tokens`, with eos, unless nothing but eos may come next."""

    tokens: int
    gain: ClassVar[float] = 0.0

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        """Eos in rows that are shorter."""
        for row in np.flatnonzero(rows.lengths + 1 < self.tokens + rows.forced).tolist():
            end, logits[row, rows.eos] = logits[row, rows.eos], -np.inf
            if logits[row].max() == -np.inf:
                logits[row, rows.eos] = end


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters one after the other. The tokens of a prefix come even against them.

    With `in_place` they change the very logits of the model, which then nobody else may look at.
    """

    filters: Sequence[Filter] = ()
    in_place: bool = False

    @property
    def gain(self) -> float:
        """By how many nats at most they raise a target's score."""
        return math.fsum(getattr(one, "gain", math.inf) for one in self.filters)

    def __call__(self, logits: FloatArray, rows: FilterRows) -> FloatArray:
        """logits [n, V] → the very same where nothing is filtered, else a copy of them with −∞ for what may not come
        next.
        """
        if not self.filters:
            return logits
        allowed = logits if self.in_place else logits.copy()
        for apply in self.filters:
            apply(allowed, rows)
        return allowed


UNFILTERED = Filters()


def without(ids: tuple[int, ...]) -> Filters:
    """These ids never come, where nobody looks at the logits of the model."""
    return Filters((Suppress(ids),), in_place=True) if ids else UNFILTERED
