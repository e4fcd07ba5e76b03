"""What travels through a decode: a sentence, what was found for it, and what the decode did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvx.runtime.arrays import FloatArray

if TYPE_CHECKING:
    from kvx.runtime.decoding.seat_options import SeatOptions

StopReason = Literal["cancelled", "deadline"]
FinishReason = Literal["end", "length", "cancelled", "deadline", "failed"]


@dataclass(slots=True, eq=False)
class Sentence:
    """A source on its way through a decode, from its ids to its results. Its owner knows it by its `number`.

    `ids` are those for the encoder, with all that framing lays around a text. Each of its `targets` takes a seat: these
    are the ids after the start that are fixed, either all of them, to be scored, or a prefix to go on from. `start` are
    the ids that its targets begin with, where they are not the plan's. `repeat` counts the equal sources before it, so
    that samples of equal texts differ. `options` say how the targets are made, where they are not those of the decode.
    The tokens of the first target of one that is `followed` are news as they are decided. `outcomes` has a place for
    each target, None until it is over.
    """

    number: int
    ids: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...] = ((),)
    start: tuple[int, ...] = field(default=(), kw_only=True)
    repeat: int = field(default=0, kw_only=True)
    options: SeatOptions | None = field(default=None, kw_only=True, repr=False)
    followed: bool = field(default=False, kw_only=True)
    outcomes: list[Outcome | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.outcomes = [None] * len(self.targets)

    def most_tokens(self, target: int) -> int:
        """The most tokens after the start that a target may have."""
        assert self.options is not None, "a sentence without options"
        return self.options.limit_of(self.targets[target])

    @property
    def results(self) -> list[Outcome] | None:
        """What became of all targets, in order, or None while one of them is not over."""
        found = [outcome for outcome in self.outcomes if outcome is not None]
        return found if len(found) == len(self.outcomes) else None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A target as far as it goes: ids after the start, eos included where it ended.

    `log_probabilities` are those of the ids, natural, as the model has them, where they were asked for; `rank_score`
    is what a search compared it by; `attention` [ids, S] where the step gives it and it was asked for. One that is
    `cut` has eos at the limit of tokens, where nothing else may stand.
    """

    ids: tuple[int, ...]
    ended: bool
    log_probabilities: tuple[float, ...] | None = None
    rank_score: float | None = None
    attention: FloatArray | None = field(default=None, compare=False)
    cut: bool = False

    @property
    def score(self) -> float | None:
        """log P(ids | source) in nats, where it was asked for."""
        return None if self.log_probabilities is None else math.fsum(self.log_probabilities)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sentence's target of this number: hypotheses, the best first, and why it was `stopped`, if it
    was, before it had ended.

    It has `failed`, with one hypothesis of nothing, where the model gave logits that are not finite, and where the
    encoder, the search or a filter raised an `error`.
    """

    sentence: Sentence
    target: int
    hypotheses: tuple[Hypothesis, ...]
    stopped: StopReason | None = None
    failed: bool = False
    error: BaseException | None = None

    @property
    def best(self) -> Hypothesis:
        """The first hypothesis."""
        return self.hypotheses[0]

    def reason(self, hypothesis: Hypothesis) -> FinishReason:
        """Why a hypothesis is no longer."""
        if self.failed:
            return "failed"
        if hypothesis.ended:
            return "length" if hypothesis.cut else "end"
        return self.stopped or "length"

    @classmethod
    def nothing(cls, sentence: Sentence, target: int, *, stopped: StopReason | None = None) -> Outcome:
        """Of a target that was `stopped` before it began, or that has failed."""
        scored = sentence.options is not None and sentence.options.scored
        hypothesis = Hypothesis((), ended=False, log_probabilities=() if scored else None)
        return cls(sentence, target, (hypothesis,), stopped, failed=stopped is None)

    @classmethod
    def broken(cls, sentence: Sentence, target: int, error: BaseException) -> Outcome:
        """Of a target for which something raised an error."""
        return cls(sentence, target, (Hypothesis((), ended=False),), failed=True, error=error)


class Decided(NamedTuple):
    """Further ids of a sentence's first target, which nothing will change any more, and their log-probabilities where
    they are asked for.
    """

    sentence: Sentence
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...] | None


News = Outcome | Decided


@dataclass(slots=True)
class DecodeStats:
    """What a decode did.

    `row_steps` is the sum over steps of the rows that ran, `row_places` of those that were planned; `cache_bytes` is
    the most that the buffers held at a time. With a shortlist, `columns` is the sum over `listed_steps` of the tokens
    that the output projection ran over, and `fallbacks` counts the sources that it did not know.
    """

    sentences: int = 0
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    row_places: int = 0
    repacks: int = 0
    cache_bytes: int = 0
    columns: int = 0
    listed_steps: int = 0
    fallbacks: int = 0

    @property
    def occupancy(self) -> float:
        """The share of the places that ran, 0 to 1."""
        return self.row_steps / self.row_places if self.row_places else 0.0

    def add_since(self, before: DecodeStats, after: DecodeStats, own: DecodeStats) -> None:
        """Adds what decode loops did between two looks at them, of which these sentences and tokens were a call's
        `own`.
        """
        for name in self.__slots__:
            if name not in ("cache_bytes", "sentences", "tokens", "fallbacks"):
                setattr(self, name, getattr(self, name) + getattr(after, name) - getattr(before, name))
        self.cache_bytes = max(self.cache_bytes, after.cache_bytes)
        for name in ("sentences", "tokens", "fallbacks"):
            setattr(self, name, getattr(self, name) + getattr(own, name))

    def add(self, other: DecodeStats) -> None:
        """Adds what another decode did, but for the bytes, which depend on what else was held meanwhile."""
        for name in self.__slots__:
            if name != "cache_bytes":
                setattr(self, name, getattr(self, name) + getattr(other, name))
