"""Which sentence sits in which row of the cache, and who comes next."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.backend import Backend, IntArray
from kvx.runtime.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.errors import OptionError
from kvx.runtime.manifest import Manifest
from kvx.runtime.search import Choice

SMALLEST_CAPACITY = 32
SHRINK_BELOW = 4  # buffers this many times too large are worth a repack


@dataclass(frozen=True, slots=True)
class Source:
    """A sentence to translate: `ids` with bos and eos, known to its owner as `index`."""

    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished translation of source `index`: ids after bos, eos included where the sentence `ended`.

    `score` is the sum of the ids' natural log-probabilities, where the search gave them.
    """

    index: int
    ids: tuple[int, ...]
    ended: bool
    score: float | None


@dataclass(slots=True)
class DecodeStats:
    """What a decode did: `row_steps` is the sum over steps of the rows that ran; `cache_bytes` the most it held."""

    sentences: int = 0
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    repacks: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a target starts and stops, and how far the cache may grow.

    `rows` sentences at a time, encoded `group` at a time; `max_new_tokens` after bos, eos included; `positions` of
    the longest source that may come.
    """

    bos: int
    eos: int
    pad: int
    rows: int
    group: int
    max_new_tokens: int
    source_positions: int

    @classmethod
    def of(cls, manifest: Manifest, *, rows: int, max_new_tokens: int | None = None) -> Self:
        """The limits of a bundle. Raises OptionError for more new tokens than the model has positions."""
        positions = manifest.model["target_positions"]
        limit = manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= positions:
            raise OptionError(
                f"max_new_tokens {limit}",
                expected=f"1 to {positions}, the model's target positions",
                remedy="Correct --max-new-tokens.",
            )
        return cls(
            bos=manifest.target_ids.bos,
            eos=manifest.target_ids.eos,
            pad=manifest.source_ids.pad,
            rows=rows,
            group=rows,
            max_new_tokens=limit,
            source_positions=manifest.model["source_positions"],
        )


@dataclass(slots=True)
class Schedule:
    """Fills free rows from a stream of sources and retires those that have ended.

    Row i of the cache, of `next_ids` and of the slots always belong to the same sentence.
    """

    backend: Backend
    sources: Iterator[Source]
    limits: Limits
    stats: DecodeStats
    cache: KVCache = field(init=False)
    _ready: deque[tuple[Source, EncodedSource]] = field(init=False, default_factory=deque)
    _sitting: list[Source] = field(init=False, default_factory=list)
    _tokens: IntArray = field(init=False)
    _scores: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        rows = self.limits.rows
        smallest = Capacity(rows, *(min(SMALLEST_CAPACITY, most) for most in self._most()))
        self.cache = KVCache(self.backend.cache_specs, smallest)
        self._tokens = np.full((rows, self.limits.max_new_tokens + 1), self.limits.bos, np.int64)
        self._scores = np.zeros(rows)

    def fill(self) -> bool:
        """Seats waiting sentences in the free rows; true while any row is active."""
        cache = self.cache
        while cache.active < cache.capacity.rows and self._waiting():
            self._seat(None)
        self._fit()
        return cache.active > 0

    def next_ids(self) -> IntArray:
        """The token that each active row feeds to the next step [n]."""
        rows = np.arange(self.cache.active)
        ids: IntArray = self._tokens[rows, self.cache.lengths[rows]]
        return ids

    def record(self, choice: Choice) -> Iterator[Hypothesis]:
        """Appends the chosen tokens; sentences that end with them give their rows back and are returned."""
        cache, n = self.cache, self.cache.active
        cache.advance()
        lengths = cache.lengths[:n]
        self._tokens[np.arange(n), lengths] = choice.ids
        if choice.log_probabilities is not None:
            self._scores[:n] += choice.log_probabilities
        self.stats.steps += 1
        self.stats.row_steps += n
        ended = choice.ids == self.limits.eos
        over = np.flatnonzero(ended | (lengths == self.limits.max_new_tokens))
        for row in over[::-1].tolist():  # from the end, so that the row that moves in has been looked at
            yield self._retire(row, ended=bool(ended[row]), scored=choice.log_probabilities is not None)

    def _retire(self, row: int, *, ended: bool, scored: bool) -> Hypothesis:
        length = int(self.cache.lengths[row])
        ids = tuple(self._tokens[row, 1 : length + 1].tolist())
        score = float(self._scores[row]) if scored else None
        hypothesis = Hypothesis(self._sitting[row].index, ids, ended, score)
        self.stats.sentences += 1
        self.stats.tokens += length
        if self._waiting():
            self._seat(row)
        else:
            self._vacate(row)
        return hypothesis

    def _seat(self, row: int | None) -> None:
        source, encoded = self._ready.popleft()
        if encoded.length > self.cache.capacity.source:
            self._resize(self.cache.capacity.target, encoded.length)
        row = self.cache.admit(encoded, row)
        self._sitting[row : row + 1] = [source]
        self._scores[row] = 0.0

    def _vacate(self, row: int) -> None:
        moved = self.cache.release(row)
        self._tokens[row] = self._tokens[moved]
        self._scores[row] = self._scores[moved]
        self._sitting[row] = self._sitting[moved]
        self._sitting.pop()

    def _waiting(self) -> bool:
        """Whether a sentence is encoded and ready, encoding the next group if need be."""
        if not self._ready:
            group = list(itertools.islice(self.sources, self.limits.group))
            if group:
                self._ready.extend(zip(group, self._encode(group), strict=True))
        return bool(self._ready)

    def _encode(self, group: list[Source]) -> Iterator[EncodedSource]:
        lengths = np.array([len(source.ids) for source in group], np.int64)
        input_ids = np.full((len(group), int(lengths.max())), self.limits.pad, np.int64)
        for row, source in zip(input_ids, group, strict=True):
            row[: len(source.ids)] = source.ids
        tensors = self.backend.encode(input_ids, lengths)
        return (EncodedSource(tensors, index, length) for index, length in enumerate(lengths.tolist()))

    def _fit(self) -> None:
        """Makes room for the next position of every row, or gives up room that nobody needs."""
        cache = self.cache
        lengths, sources = cache.lengths[: cache.active], cache.source_lengths[: cache.active]
        target, source = int(lengths.max(initial=0)) + 1, int(sources.max(initial=1))
        held = cache.capacity
        if target > held.target or _too_large(held.target, target) or _too_large(held.source, source):
            self._resize(target, source)
        self.stats.cache_bytes = max(self.stats.cache_bytes, cache.bytes)

    def _resize(self, target: int, source: int) -> None:
        """To the smallest sizes of the ladder that hold these; counted where rows had to be repacked."""
        most_target, most_source = self._most()
        self.stats.repacks += self.cache.active > 0
        self.cache.resize(target=_rung(target, most_target), source=_rung(source, most_source))

    def _most(self) -> tuple[int, int]:
        return self.limits.max_new_tokens, self.limits.source_positions


def _too_large(size: int, need: int) -> bool:
    return _rung(need, size) * SHRINK_BELOW <= size


def _rung(need: int, most: int) -> int:
    """The size that is allocated for a need: doubled from the smallest until it holds, `most` at the most."""
    size = SMALLEST_CAPACITY
    while size < need:
        size *= 2
    return min(size, most)
