"""One text on its way to its translation."""

from __future__ import annotations

from dataclasses import dataclass

from kvx.runtime.decoding.results import Sentence


@dataclass(slots=True, eq=False)
class Request(Sentence):
    """A sentence with what its text adds: whether it was `truncated`, and the `pieces` of its source as they stand in
    the text, where they are needed. Without a piece it has no ids and is not decoded.
    """

    truncated: bool = False
    pieces: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether its translation can be written."""
        return not self.ids or self.results is not None

    @property
    def failed(self) -> bool:
        """Whether the model gave numbers for it, by now, that are not finite."""
        return any(outcome is not None and outcome.failed for outcome in self.outcomes)
