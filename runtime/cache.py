"""The KV cache: packed rows. Active rows are always the first n, so a step over n rows costs n rows.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.errors import CapacityError
from kvx.runtime.signature import TensorSpec


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much a cache holds: rows, and positions of a row's own (T) and of its source (S)."""

    rows: int
    target: int
    source: int

    def bytes(self, specs: Iterable[TensorSpec]) -> int:
        """Bytes of the buffers `specs` at this capacity, known before anything is allocated."""
        return sum(int(np.prod(spec.shape(self.sizes))) * np.dtype(spec.dtype).itemsize for spec in specs)

    @property
    def sizes(self) -> dict[str, int]:
        """The capacity by axis letter."""
        return {"B": self.rows, "T": self.target, "S": self.source}


@dataclass(frozen=True, slots=True)
class EncodedSource:
    """One sentence as the encoder left it: row `index` of `tensors` [B, H, S, D], `length` positions of it."""

    tensors: Mapping[str, NDArray[Any]]
    index: int
    length: int


class KVCache:
    """Owns every buffer of one decode.

    `buffers` by tensor name, described by `specs`; `lengths` [rows] positions written, `source_lengths` [rows]; rows
    0 … active − 1 are in use. `generation` changes whenever the buffers do, so that whoever bound them binds again.
    What lies beyond a row's lengths is finite, never meaningful.
    """

    def __init__(self, specs: Sequence[TensorSpec], capacity: Capacity) -> None:
        self.specs = tuple(specs)
        self.capacity = capacity
        self.buffers = self._allocate(capacity)
        self.lengths = np.zeros(capacity.rows, np.int64)
        self.source_lengths = np.zeros(capacity.rows, np.int64)
        self.active = 0
        self.generation = 0

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def admit(self, source: EncodedSource, row: int | None = None) -> int:
        """Puts a sentence into an active `row` that has ended, else into the first free one; returns the row.

        Raises CapacityError where no row is free or the source is longer than S.
        """
        if row is None:
            row = self.active
        if not 0 <= row <= min(self.active, self.capacity.rows - 1) or source.length > self.capacity.source:
            raise CapacityError(
                f"a source of {source.length} positions for row {row}, {self.active} active",
                expected=f"a row up to {min(self.active, self.capacity.rows - 1)} and at most "
                f"{self.capacity.source} positions",
                remedy="Release a row or resize the cache first.",
            )
        for spec in self.specs:
            if "S" in spec.axes:
                self._row(spec, row, source.length)[...] = source.tensors[spec.name][source.index, :, : source.length]
        self.lengths[row] = 0
        self.source_lengths[row] = source.length
        self.active = max(self.active, row + 1)
        return row

    def release(self, row: int) -> int:
        """Gives a row back by moving the last active row into its place; returns the row that moved."""
        last = self.active - 1
        if not 0 <= row <= last:
            raise CapacityError(
                f"release of row {row}", expected=f"one of the {self.active} active rows", remedy="Release a row once."
            )
        self.move(last, row)
        self.active = last
        return last

    def move(self, origin: int, destination: int) -> None:
        """Copies what is meaningful of one row over another."""
        if origin == destination:
            return
        for spec in self.specs:
            length = int((self.source_lengths if "S" in spec.axes else self.lengths)[origin])
            self._row(spec, destination, length)[...] = self._row(spec, origin, length)
        self.lengths[destination] = self.lengths[origin]
        self.source_lengths[destination] = self.source_lengths[origin]

    def advance(self) -> None:
        """Every active row has one more position written."""
        self.lengths[: self.active] += 1

    def resize(self, capacity: Capacity) -> None:
        """Repacks the active rows into buffers of another capacity, which must hold what the rows hold."""
        used_target = int(self.lengths[: self.active].max(initial=0))
        used_source = int(self.source_lengths[: self.active].max(initial=0))
        if capacity.rows < self.active or capacity.target < used_target or capacity.source < used_source:
            raise CapacityError(
                f"resize to {capacity.rows} rows of {capacity.target} target and {capacity.source} source positions",
                expected=f"at least {self.active} rows and at least the {used_target} and {used_source} in use",
                remedy="Resize to what the active rows need.",
            )
        old, self.capacity = self.buffers, capacity
        self.buffers = self._allocate(capacity)
        self.lengths = _with_rows(self.lengths, capacity.rows)
        self.source_lengths = _with_rows(self.source_lengths, capacity.rows)
        for spec in self.specs:
            positions = _positions(spec, used_source if "S" in spec.axes else used_target)
            self.buffers[spec.name][: self.active][positions] = old[spec.name][: self.active][positions]
        self.generation += 1

    def _allocate(self, capacity: Capacity) -> dict[str, NDArray[Any]]:
        return {spec.name: np.zeros(spec.shape(capacity.sizes), spec.dtype) for spec in self.specs}

    def _row(self, spec: TensorSpec, row: int, length: int) -> NDArray[Any]:
        view: NDArray[Any] = self.buffers[spec.name][row : row + 1][_positions(spec, length)][0]
        return view


def _with_rows(lengths: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """The leading rows of lengths [rows], or zeros beyond them."""
    resized = np.zeros(rows, np.int64)
    kept = min(rows, len(lengths))
    resized[:kept] = lengths[:kept]
    return resized


def _positions(spec: TensorSpec, length: int) -> tuple[slice, ...]:
    """The index that keeps the first `length` positions of a buffer's S or T axis."""
    return tuple(slice(length) if axis in ("S", "T") else slice(None) for axis in spec.axes)
