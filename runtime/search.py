"""How the next token is chosen from a step's output. Letters: n active rows, V target vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.backend import FloatArray, IntArray, StepOutput


class Choice(NamedTuple):
    """ids [n] of the next tokens and, where asked for, their natural log-probabilities [n]."""

    ids: IntArray
    log_probabilities: NDArray[np.float64] | None


class Search(Protocol):
    """A strategy that picks one next token for each row."""

    def choose(self, output: StepOutput) -> Choice:
        """logits [n, V] → the choice for each row."""
        ...


@dataclass(frozen=True, slots=True)
class Greedy:
    """The most probable token, the lowest id on ties.

    `scores` also gives its log-probability, which costs a pass over the logits.
    """

    scores: bool = False

    def choose(self, output: StepOutput) -> Choice:
        """logits [n, V] → argmax [n]."""
        ids: IntArray = output.logits.argmax(axis=-1) if output.next_ids is None else output.next_ids
        return Choice(ids, log_probabilities(output.logits, ids) if self.scores else None)


def log_probabilities(logits: FloatArray, ids: IntArray) -> NDArray[np.float64]:
    """logits [n, V], ids [n] → log softmax(logits)[ids] [n], in nats and float64."""
    largest = logits.max(axis=-1)
    total = np.exp(logits - largest[:, None]).sum(axis=-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    difference: NDArray[np.float64] = chosen.astype(np.float64) - largest - np.log(total)
    return difference
