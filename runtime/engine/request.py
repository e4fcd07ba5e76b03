"""One text on its way to its translation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvx.runtime.decoding.results import Decided, Sentence, StopReason
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import TranslateOptions


class LaneKey(NamedTuple):
    """What seats of one lane have in common: their number of rows, and which steps they take."""

    beams: int
    shortlisted: bool = False
    looped: bool = False


class Owner(Protocol):
    """Who hears of requests, in the thread that decodes them: it must be quick.

    One that is `asked` is asked whether it still wants its requests also while they wait. Any other takes them out of
    the queue itself. One that `reads_ahead` bounds the number of its requests that wait itself.
    """

    @property
    def asked(self) -> bool:
        """See above."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """See above."""
        ...

    def cancelled(self) -> bool:
        """Whether nobody wants them any more; asked once before each step. What it raises ends them."""
        ...

    def fail(self, error: BaseException) -> None:
        """Hears what `cancelled` has raised."""
        ...

    def decided(self, news: Decided) -> None:
        """Hears of further tokens of a request that is followed."""
        ...

    def over(self, requests: list[Request]) -> None:
        """Hears that nothing more will come of some of them."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Sentence):
    """A sentence with what its text adds: its `model`, the options that were `asked_for`, whether it was `truncated`,
    and the `pieces` of its source as they stand in the text, where they are needed. Without a piece it has no ids and
    is not decoded.

    `lane` is where it is decoded; `owner` hears of it; it ends where it is by its `deadline`, in seconds of
    time.monotonic. `arrival` is its place among all that came; `overtaken` counts those behind it that were let in
    before it. `error` is why there are no outcomes.
    """

    model: LoadedModel
    asked_for: TranslateOptions
    lane: LaneKey
    owner: Owner
    truncated: bool = False
    pieces: tuple[str, ...] = ()
    deadline: float | None = None
    arrival: int = field(default=0, init=False)
    overtaken: int = field(default=0, init=False)
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether its translation can be written."""
        return not self.ids or self.results is not None

    @property
    def failed(self) -> bool:
        """Whether the model gave numbers for it, by now, that are not finite."""
        return any(outcome is not None and outcome.failed for outcome in self.outcomes)

    def late(self, now: float) -> StopReason | None:
        """Whether its time is over."""
        return "deadline" if self.deadline is not None and now >= self.deadline else None
