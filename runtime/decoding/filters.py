"""What a target may not be, as filters over the logits.

Letters: n active rows, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvx.runtime.arrays import FloatArray
from kvx.runtime.decoding.rows import Rows


class Filter(Protocol):
    """One constraint."""

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
        """Changes logits [n, V] in place, −∞ for what may not come next in each of the active rows."""
        ...


@dataclass(frozen=True, slots=True)
class Suppress:
    """These `ids` never come."""

    ids: tuple[int, ...]

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
        """The columns of the ids."""
        logits[:, list(self.ids)] = -np.inf


@dataclass(frozen=True, slots=True)
class NoRepeatedNgrams:
    """No `size` tokens after bos come twice in the same order (Paulus et al. 2018)."""

    size: int

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
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

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
        """Each token once, however often it stands there."""
        for row, length in enumerate(rows.lengths.tolist()):
            ids = np.unique(rows.tokens[row, 1 : length + 1])
            values = logits[row, ids]
            logits[row, ids] = np.where(values > 0, values / self.penalty, values * self.penalty)


@dataclass(frozen=True, slots=True)
class EndPenalty:
    """Ending costs `penalty` nats; a negative one makes targets shorter."""

    penalty: float

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
        """The column of eos."""
        logits[:, rows.eos] -= np.float32(self.penalty)


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """A target has at least so many tokens, eos counted, unless nothing but eos may come next."""

    tokens: int

    def __call__(self, logits: FloatArray, rows: Rows) -> None:
        """Eos in rows that are shorter."""
        for row in np.flatnonzero(rows.lengths + 1 < self.tokens).tolist():
            end, logits[row, rows.eos] = logits[row, rows.eos], -np.inf
            if logits[row].max() == -np.inf:
                logits[row, rows.eos] = end


@dataclass(frozen=True, slots=True)
class Constraints:
    """Filters one after the other; tokens that are given beforehand come whatever these say."""

    filters: Sequence[Filter] = ()

    def __call__(self, logits: FloatArray, rows: Rows) -> FloatArray:
        """logits [n, V] → the very same where nothing is constrained, else a copy of them with −∞ for what may not
        come next.
        """
        if not self.filters and not rows.begun:
            return logits
        given, tokens = rows.given_next()
        if not self.filters and not given.size:
            return logits
        allowed = logits.copy()
        for constrain in self.filters:
            constrain(allowed, rows)
        allowed[given] = -np.inf
        allowed[given, tokens] = logits[given, tokens]
        return allowed


UNCONSTRAINED = Constraints()
