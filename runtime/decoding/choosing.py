"""How the active rows go on, where each seat has options of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.decoding.backend import StepOutput
from kvx.runtime.decoding.rows import ActiveRows, Choice, Group, Rows, Selection
from kvx.runtime.decoding.seat_options import SeatOptions


def choose(output: StepOutput, rows: Rows) -> Choice:
    """The output of a step for all active rows → how each goes on, by the options of its seat. One group of seats
    costs nothing more than its search; each of several gets a copy of its part of the logits.
    """
    if len(rows.groups) == 1:
        return _choose(output, rows, rows.groups[0].options)
    choices = [_choose(_part(output, group), Selection(rows, group), group.options) for group in rows.groups]
    return _together(rows, choices)


def _choose(output: StepOutput, rows: ActiveRows, options: SeatOptions) -> Choice:
    """What the search and filters of one group decide; where they raise an error, its seats are over with it."""
    try:
        return options.search.choose(output, options.filters(output.logits, rows), rows)
    except Exception as error:
        for seat in rows.seats:
            seat.error = error
        over = np.ones(len(rows.seats), np.bool_)
        return Choice(np.full(rows.n, rows.eos, np.int64), over, failed=over)


def _part(output: StepOutput, group: Group) -> StepOutput:
    attention = None if output.attention is None else output.attention[group.rows]
    return StepOutput(output.logits[group.rows], attention)


def _together(rows: Rows, choices: Sequence[Choice]) -> Choice:
    """The choices of all groups as one for all rows."""
    groups, n, seats = rows.groups, rows.n, len(rows.seats)

    def of_rows(parts: Sequence[NDArray[Any] | None], default: NDArray[Any]) -> NDArray[Any] | None:
        """Parts, each for the rows of its group, in their places; None where no group has any."""
        if all(part is None for part in parts):
            return None
        for group, part in zip(groups, parts, strict=True):
            if part is not None:
                default[group.rows] = part
        return default

    over, failed = np.zeros(seats, np.bool_), np.zeros(seats, np.bool_)
    for group, choice in zip(groups, choices, strict=True):
        over[group.seats] = choice.over
        failed[group.seats] = False if choice.failed is None else choice.failed
    parents = [
        None if choice.parents is None else group.rows[choice.parents]
        for group, choice in zip(groups, choices, strict=True)
    ]
    ids = of_rows([choice.ids for choice in choices], np.zeros(n, np.int64))
    assert ids is not None
    return Choice(
        ids,
        over,
        of_rows([choice.log_probabilities for choice in choices], np.zeros(n)),
        of_rows(parents, np.arange(n)),
        of_rows([choice.scores for choice in choices], rows.scores[:n].copy()),
        failed if failed.any() else None,
    )
