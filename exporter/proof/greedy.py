"""Greedy translations of the same sources by an export and by eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvx.exporter.proof.report import Check
from kvx.exporter.proof.trial import ROWS, Trial
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.filters import without
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.decoding.search import Greedy

DRAWN_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token in which two translations of a sentence differ, and by how much eager prefers its own."""

    sentence: int
    position: int
    expected: int
    got: int
    margin: float
    is_tie: bool

    def __str__(self) -> str:
        return (
            f"sentence {self.sentence + 1}, token {self.position}: {self.got} instead of {self.expected}, "
            f"which eager prefers by {self.margin:.2g}"
        )


def translations(backend: Backend, sources: Sequence[tuple[int, ...]], plan: Plan) -> dict[int, tuple[int, ...]]:
    """The greedy ids of each source, by its number."""
    numbered = (Sentence(index, ids) for index, ids in enumerate(sources))
    outcomes = decode(backend, numbered, Greedy(), plan, filters=without(plan.never))
    return {outcome.sentence.number: outcome.best.ids for outcome in outcomes}


def check_drawn(trial: Trial, backend: Backend, plan: Plan) -> Check:
    """Greedy translations of random sentences."""
    plan = replace(plan, max_new_tokens=min(DRAWN_TOKENS, plan.max_new_tokens))
    return check_greedy(trial, backend, trial.drawn_sources(), plan, "greedy on drawn ids")


def check_greedy(trial: Trial, backend: Backend, sources: Sequence[tuple[int, ...]], plan: Plan, name: str) -> Check:
    """Greedy translations of the same sources, in different numbers of rows; a near-tie of eager may fall
    either way.
    """
    expected = translations(trial.eager, sources, replace(plan, rows=2 * ROWS, group=2 * ROWS))
    got = translations(backend, sources, replace(plan, rows=ROWS, group=ROWS))
    differing = [index for index in range(len(sources)) if expected[index] != got[index]]
    if failed := [index for index in differing if not (expected[index] and got[index])]:
        return Check(backend.name, name, False, f"sentence {failed[0]} has logits that are not finite")
    divergences = [
        _divergence(trial, index, (*plan.start, *expected[index]), (*plan.start, *got[index]), sources[index])
        for index in differing
    ]
    wrong = [divergence for divergence in divergences if not divergence.is_tie]
    equal, ties = len(sources) - len(differing), len(differing) - len(wrong)
    detail = f"{equal} of {len(sources)} sentences equal" + (f", {ties} near-ties fell the other way" if ties else "")
    return Check(backend.name, name, not wrong, "; ".join([detail, *map(str, wrong[:1])]))


def _divergence(
    trial: Trial, sentence: int, expected: tuple[int, ...], got: tuple[int, ...], source: tuple[int, ...]
) -> Divergence:
    """Where two targets part, both with the ids that they begin with."""
    position = next(i for i, ids in enumerate(zip(expected, got, strict=False)) if ids[0] != ids[1])
    with torch.inference_mode():
        logits = trial.model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([expected[:position]]))[
            0, -1
        ]
    margin = float(logits[expected[position]] - logits[got[position]])
    uncertainty = 2 * trial.tolerance * max(1.0, float(logits.abs().max()))
    return Divergence(sentence, position, expected[position], got[position], margin, margin <= uncertainty)
