"""The KV cache: packed rows. Active rows are always the first n, so a step over n rows costs n rows.

A sentence sits in a seat: one row, or as many side by side as it has beams.

Letters: B rows, G seats, S source positions, T capacity of a row's cache, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.errors import CapacityError, OptionError


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much a cache holds: rows, positions of a row's own (T) and of its source (S), and rows of a seat."""

    rows: int
    target: int
    source: int
    beams: int = 1

    def bytes(self, specs: Iterable[TensorSpec]) -> int:
        """Bytes of the buffers `specs` at this capacity, known before anything is allocated."""
        return sum(spec.bytes(self.sizes) for spec in specs)

    @property
    def sizes(self) -> dict[str, int]:
        """The capacity by axis letter."""
        return {"B": self.rows, "G": self.seats, "T": self.target, "S": self.source}

    @property
    def seats(self) -> int:
        """How many sentences it holds."""
        return self.rows // self.beams


@dataclass(frozen=True, slots=True)
class EncodedSource:
    """One sentence as the encoder left it: row `index` of `tensors` [B, H, S, D], `length` positions of it."""

    tensors: Mapping[str, NDArray[Any]]
    index: int
    length: int


class KVCache:
    """Owns every buffer of one decode.

    `buffers` by tensor name, described by `specs`; `lengths` [rows] positions written, `source_lengths` one for each
    row, or for each seat where the buffers of sources are shared by its rows; rows 0 … active − 1 are in use.
    `generation` changes whenever the buffers do, so that whoever bound them binds again. What lies beyond a row's
    lengths is finite, never meaningful. Raises OptionError for bfloat16,
    CapacityError where memory is short.
    """

    def __init__(self, specs: Sequence[TensorSpec], capacity: Capacity) -> None:
        self.specs = tuple(specs)
        if any(spec.dtype == "bfloat16" for spec in self.specs):
            raise OptionError(
                "This needs a cache in bfloat16 on the host, but numpy has no bfloat16",
                expected="float32 or float16, or greedy translations without scores, whose cache is on the device",
                remedy="Ask for no more than the best translation, or export the model with precision fp16.",
            )
        self.capacity = capacity
        self.shared_sources = any(spec.axes[0] == "G" for spec in self.specs)
        self.buffers = self._allocate(capacity)
        self.lengths = np.zeros(capacity.rows, np.int64)
        self.source_lengths = np.zeros(self._sources_of(capacity), np.int64)
        self.active = 0
        self.generation = 0

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def seated(self) -> int:
        """How many seats are in use."""
        return self.active // self.capacity.beams

    @property
    def longest_source(self) -> int:
        """Positions of the longest source that is in use, 0 without any."""
        return int(self.source_lengths[: self._sources_of(self.capacity, self.active)].max(initial=0))

    def admit(self, source: EncodedSource, seat: int | None = None) -> int:
        """Puts a sentence into a `seat` whose own has ended, else into the first free one; returns the seat.

        Raises CapacityError where no seat is free or the source is longer than S.
        """
        if seat is None:
            seat = self.seated
        last = min(self.seated, self.capacity.seats - 1)
        if not 0 <= seat <= last or source.length > self.capacity.source:
            raise CapacityError(
                f"A source of {source.length} positions cannot take seat {seat}, with {self.seated} seats taken",
                expected=f"a seat up to {last} and at most {self.capacity.source} positions",
                remedy="Release a seat or resize the cache first.",
            )
        for spec in self.specs:
            if "S" in spec.axes:
                buffer = self.buffers[spec.name][self._places(spec, seat)]
                buffer[:, :, : source.length] = source.tensors[spec.name][source.index, :, : source.length]
        self.lengths[self._rows(seat)] = 0
        self.source_lengths[self._source_places(seat)] = source.length
        self.active = max(self.active, self._rows(seat).stop)
        return seat

    def release(self, seat: int) -> int:
        """Gives a seat back by moving the last one that is taken into its place; returns the one that moved."""
        last = self.seated - 1
        if not 0 <= seat <= last:
            raise CapacityError(
                f"Seat {seat} cannot be released",
                expected=f"one of the {self.seated} taken",
                remedy="Release a seat once.",
            )
        self.move(last, seat)
        self.active = self._rows(last).start
        return last

    def clear(self, seat: int) -> None:
        """Overwrites with zeros all that a seat has, which may not be finite."""
        for spec in self.specs:
            self.buffers[spec.name][self._places(spec, seat)] = 0

    def move(self, origin: int, destination: int) -> None:
        """Copies what is meaningful of one seat over another."""
        if origin == destination:
            return
        own = int(self.lengths[self._rows(origin)].max())
        source = int(self.source_lengths[self._source_places(origin)].max())
        for spec in self.specs:
            positions = _positions(spec, source if "S" in spec.axes else own)
            buffer = self.buffers[spec.name]
            moved = buffer[self._places(spec, origin)][positions]
            buffer[self._places(spec, destination)][positions] = moved
        self.lengths[self._rows(destination)] = self.lengths[self._rows(origin)]
        self.source_lengths[self._source_places(destination)] = self.source_lengths[self._source_places(origin)]

    def follow(self, parents: NDArray[np.int64], common: NDArray[np.int64] | None = None) -> None:
        """Every active row becomes a copy of its parent [n], another row of its seat or itself; only the others are
        copied, and of them only what was written, after as many positions as a row and its parent have in `common` [n].
        """
        children = np.flatnonzero(parents != np.arange(len(parents)))
        if not children.size:
            return
        origins = parents[children]
        chained = bool((parents[origins] != origins).any())  # some parent becomes another itself
        first = np.zeros_like(children) if common is None else common[children]
        ranges = [slice(*ends) for ends in zip(first.tolist(), self.lengths[origins].tolist(), strict=True)]
        for spec in self.specs:
            if "T" in spec.axes:
                buffer = self.buffers[spec.name].swapaxes(1, spec.axes.index("T"))
                source = buffer.copy() if chained else buffer
                for child, origin, positions in zip(children.tolist(), origins.tolist(), ranges, strict=True):
                    buffer[child, positions] = source[origin, positions]
        self.lengths[children] = self.lengths[origins]

    def advance(self) -> None:
        """Every active row has one more position written."""
        self.lengths[: self.active] += 1

    def resize(self, capacity: Capacity) -> None:
        """Repacks the active rows into buffers of another capacity, which must hold what the rows hold.

        Raises CapacityError, and leaves the cache as it is, where it does not or memory is short.
        """
        used_target = int(self.lengths[: self.active].max(initial=0))
        used_source = self.longest_source
        if (
            capacity.rows < self.active
            or capacity.target < used_target
            or capacity.source < used_source
            or capacity.beams != self.capacity.beams
        ):
            raise CapacityError(
                f"The cache cannot be resized to {capacity.rows} rows of {capacity.target} target and "
                f"{capacity.source} source positions, {capacity.beams} a seat",
                expected=f"at least {self.active} rows, {self.capacity.beams} a seat, and at least the {used_target} "
                f"and {used_source} positions in use",
                remedy="Resize to what the active rows need.",
            )
        old, taken = self.buffers, self.seated
        self.buffers = self._allocate(capacity)
        self.capacity = capacity
        self.lengths = _with_rows(self.lengths, capacity.rows)
        self.source_lengths = _with_rows(self.source_lengths, self._sources_of(capacity))
        for spec in self.specs:
            used = slice(0, taken if spec.axes[0] == "G" else self.active)
            positions = _positions(spec, used_source if "S" in spec.axes else used_target)
            self.buffers[spec.name][used][positions] = old[spec.name][used][positions]
        self.generation += 1

    def _allocate(self, capacity: Capacity) -> dict[str, NDArray[Any]]:
        try:
            return {spec.name: np.zeros(spec.shape(capacity.sizes), spec.dtype) for spec in self.specs}
        except (MemoryError, ValueError) as error:  # numpy's ValueError: more bytes than can be addressed
            raise CapacityError(
                f"There is not enough memory for a cache of {capacity.rows} rows with {capacity.target} target and "
                f"{capacity.source} source positions ({error})",
                expected=f"{capacity.bytes(self.specs):,} bytes that can be allocated",
                remedy="Use fewer rows (`rows`) or fewer bytes (`cache_bytes`), or free memory.",
                option="cache_bytes",
            ) from None

    def _sources_of(self, capacity: Capacity, rows: int | None = None) -> int:
        """How many sources the buffers hold, or how many of them are in the first `rows`."""
        rows = capacity.rows if rows is None else rows
        return rows // capacity.beams if self.shared_sources else rows

    def _rows(self, seat: int) -> slice:
        return slice(seat * self.capacity.beams, (seat + 1) * self.capacity.beams)

    def _places(self, spec: TensorSpec, seat: int) -> slice:
        return slice(seat, seat + 1) if spec.axes[0] == "G" else self._rows(seat)

    def _source_places(self, seat: int) -> slice:
        return slice(seat, seat + 1) if self.shared_sources else self._rows(seat)


def _with_rows(lengths: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """The leading rows of lengths [rows], or zeros beyond them."""
    resized = np.zeros(rows, np.int64)
    kept = min(rows, len(lengths))
    resized[:kept] = lengths[:kept]
    return resized


def _positions(spec: TensorSpec, length: int) -> tuple[slice, ...]:
    """The index that keeps the first `length` positions of a buffer's S or T axis."""
    return tuple(slice(length) if axis in ("S", "T") else slice(None) for axis in spec.axes)
