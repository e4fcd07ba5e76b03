"""What may be asked of a translation: one frozen object for the library and the command line."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TypedDict, get_args

from kvx.runtime.decoding.filters import (
    Constraints,
    EndPenalty,
    Filter,
    LeastTokens,
    NoRepeatedNgrams,
    RepetitionPenalty,
    Suppress,
)
from kvx.runtime.decoding.search import BeamSearch, Greedy, Sampling, Search
from kvx.runtime.errors import OptionError
from kvx.runtime.text.sources import OnLong

Given = str | tuple[int, ...]
Problem = tuple[str, str]

LARGEST_SEED = 2**64 - 1
RANGES = {  # beyond these nothing changes but that numbers overflow
    "length_penalty": (-50, 50),
    "end_penalty": (-1_000_000, 1_000_000),
    "repetition_penalty": (0.001, 1000),
}
BEAM_OPTIONS = ("n_best", "length_penalty", "early_stopping", "patience")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateOptions:
    """How to translate. Raises one OptionError that names everything unknown or contradictory.

    The texts. `on_long`: what happens to a source of more positions than the model has, bos and eos counted. `window`:
    texts read ahead and sorted by length together.

    The machine. `rows`: rows of the cache that a worker decodes at a time, of which a sentence takes one, or one for
    each beam (default: as many as fit, up to 64). `workers`: decode loops side by side (default: what the backend is
    fastest with, where there are sentences enough). `cache_bytes`: the most that all their caches together may hold
    (default: 1 GiB).

    The search, greedy by default. `beam_size` above 1: a beam search, with `n_best` translations of each text (1), a
    `length_penalty` (1.0), `early_stopping` (true) and `patience` (1.0) as BeamSearch describes them. `samples`: so
    many translations of each text drawn at random instead, after `temperature` (1.0), among the `top_k` most probable
    tokens (all) and the fewest with together the probability `top_p` (1.0); with a `seed` a text's samples are the same
    whenever and beside whatever they are drawn.

    Constraints. `max_new_tokens`, `min_new_tokens`: tokens after bos, eos counted (default: the bundle's limit, 1).
    `prefix`: what every translation begins with, a text or target ids. `suppress`: pieces or ids that never come.
    `no_repeated_ngrams`: no so many tokens come twice in the same order. `repetition_penalty`: above 1, tokens that
    have come get less probable; `end_penalty`: nats that ending costs. `shortlist`: a file that says which target
    pieces those of a source may become; a translation is made of these and its prefix, and log-probabilities are those
    among them. A source with a piece that the file does not know has the whole vocabulary, as scored targets have.

    The results. `scores`: also log-probabilities. `align`: also the source piece that each target token attends to
    most. `replace_unknown`: the aligned source word in place of an unknown token.
    """

    on_long: OnLong = "error"
    window: int | None = None
    rows: int | None = None
    workers: int | None = None
    cache_bytes: int | None = None
    beam_size: int = 1
    n_best: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    patience: float | None = None
    samples: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    prefix: Given | None = None
    suppress: tuple[str | int, ...] = ()
    no_repeated_ngrams: int | None = None
    repetition_penalty: float | None = None
    end_penalty: float | None = None
    shortlist: str | Path | None = None
    scores: bool = False
    align: bool = False
    replace_unknown: bool = False

    def __post_init__(self) -> None:
        refuse([*self._out_of_range(), *self._contradictions()])

    @property
    def targets(self) -> int:
        """How many targets of each source are searched for."""
        return self.samples or 1

    @property
    def with_attention(self) -> bool:
        """Whether the weights of the cross-attention are needed."""
        return self.align or self.replace_unknown

    def search(self) -> Search:
        """The search that these describe. Without a seed, every call draws one."""
        if self.samples is not None:
            return Sampling(
                seed=secrets.randbelow(LARGEST_SEED) if self.seed is None else self.seed,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k,
                top_p=1.0 if self.top_p is None else self.top_p,
                scored=self.scores,
            )
        if self.beam_size == 1:
            return Greedy(scored=self.scores)
        return BeamSearch(
            size=self.beam_size,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=self.early_stopping is not False,
            n_best=self.n_best or 1,
            patience=1.0 if self.patience is None else self.patience,
            gain=math.inf if (self.repetition_penalty or 1.0) < 1 else max(0.0, -(self.end_penalty or 0.0)),
            scored=self.scores,
        )

    def constraints(self, suppressed: tuple[int, ...]) -> Constraints:
        """The filters that these describe, with the ids of what is suppressed. The least length comes last: it gives
        way where the others leave nothing but eos.
        """
        filters: list[Filter] = []
        if self.repetition_penalty not in (None, 1.0):
            filters.append(RepetitionPenalty(self.repetition_penalty))
        if self.end_penalty:
            filters.append(EndPenalty(self.end_penalty))
        if suppressed:
            filters.append(Suppress(suppressed))
        if self.no_repeated_ngrams is not None:
            filters.append(NoRepeatedNgrams(self.no_repeated_ngrams))
        if self.min_new_tokens is not None and self.min_new_tokens > 1:
            filters.append(LeastTokens(self.min_new_tokens))
        return Constraints(tuple(filters))

    def _out_of_range(self) -> Iterator[Problem]:
        counts = ("max_new_tokens", "min_new_tokens", "rows", "workers", "cache_bytes", "window", "beam_size", "n_best")
        for name in (*counts, "samples", "top_k", "no_repeated_ngrams"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                yield f"{name} = {value!r}", f"{name} from 1 up"
        for name in ("temperature", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} = {value}", f"{name} above 0"
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                yield f"{name} = {value}", f"{name} from {least} to {most}"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p = {self.top_p}", "top_p above 0 and up to 1"
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED):
            yield f"seed = {self.seed!r}", f"a seed from 0 to {LARGEST_SEED}"
        if isinstance(self.suppress, str):
            yield f"suppress = {self.suppress!r}", "a tuple of pieces or ids to suppress"
        if self.on_long not in get_args(OnLong):
            yield f"on_long = {self.on_long!r}", f"on_long {' or '.join(get_args(OnLong))}"

    def _contradictions(self) -> Iterator[Problem]:
        for name in SAMPLING_OPTIONS:
            if getattr(self, name) is not None and self.samples is None:
                yield f"{name} = {getattr(self, name)} with a deterministic search", f"{name} only with samples"
        for name in BEAM_OPTIONS:
            if getattr(self, name) is not None and self.beam_size == 1:
                yield f"{name} = {getattr(self, name)} without beams", f"{name} only with beam_size above 1"
        if self.samples is not None and self.beam_size > 1:
            yield f"samples = {self.samples} with beam_size = {self.beam_size}", "one of them"
        if self.n_best is not None and 1 < self.beam_size < self.n_best:
            yield f"n_best = {self.n_best} of beam_size = {self.beam_size}", "n_best up to beam_size"
        if self.rows is not None and self.rows < self.beam_size:
            yield f"beam_size = {self.beam_size} in rows = {self.rows}", "a row for every beam of a sentence"
        if self.min_new_tokens is not None and self.min_new_tokens > (self.max_new_tokens or self.min_new_tokens):
            yield (
                f"min_new_tokens = {self.min_new_tokens} over max_new_tokens = {self.max_new_tokens}",
                "min_new_tokens up to max_new_tokens",
            )
        if self.patience is not None and self.early_stopping is False:
            yield f"patience = {self.patience} without early_stopping", "patience only with early_stopping"


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class TranslateKeywords(TypedDict, total=False):
    """The fields of TranslateOptions as keyword arguments, but for the window, which is all texts at hand."""

    on_long: OnLong
    rows: int | None
    workers: int | None
    cache_bytes: int | None
    beam_size: int
    n_best: int | None
    length_penalty: float | None
    early_stopping: bool | None
    patience: float | None
    samples: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    prefix: Given | None
    suppress: tuple[str | int, ...]
    no_repeated_ngrams: int | None
    repetition_penalty: float | None
    end_penalty: float | None
    shortlist: str | Path | None
    scores: bool
    align: bool
    replace_unknown: bool


def refuse(problems: list[Problem]) -> None:
    """Raises OptionError with what was got and expected of all problems, if there are any."""
    if problems:
        got, expected = zip(*problems, strict=True)
        raise OptionError(
            ", ".join(got), expected="; ".join(dict.fromkeys(expected)), remedy="Correct or leave out what is named."
        )
