from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from kvx.runtime.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.errors import CapacityError
from kvx.runtime.signature import Dimensions, TensorSpec, cache_specs

SPECS = cache_specs(Dimensions(layers=2, heads=2, head_width=3, vocab_size=5))
LARGEST = 6
Values = dict[str, list[NDArray[Any]]]  # a tensor's name → the [H, D] of each position


def encoded(length: int, *, batch: int = 1, index: int = 0, start: float = 1.0) -> EncodedSource:
    """Distinct numbers in every place of the row, NaN wherever nothing may be read."""
    tensors = {}
    for number, spec in enumerate(spec for spec in SPECS if "S" in spec.axes):
        tensors[spec.name] = np.full(spec.shape({"B": batch, "S": length + 2}), np.nan, np.float32)
        row = tensors[spec.name][index, :, :length]
        row[...] = start + 1000 * number + np.arange(row.size).reshape(row.shape)
    return EncodedSource(tensors, index, length)


def full_cache(*source_lengths: int, target: int = 3, source: int = 4) -> KVCache:
    cache = KVCache(SPECS, Capacity(len(source_lengths), target, source))
    for length in source_lengths:
        cache.admit(encoded(length))
    return cache


class PackedRows(RuleBasedStateMachine):
    """The cache against lists: row i of the model is row i of the cache, position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0.0
        self.rows: list[Values] = []

    @initialize(rows=st.integers(1, 4), own=st.integers(1, 3), source=st.integers(1, 3))
    def begin(self, rows: int, own: int, source: int) -> None:
        self.cache = KVCache(SPECS, Capacity(rows, own, source))

    @rule(length=st.integers(0, LARGEST), batch=st.integers(1, 3), data=st.data())
    def admit(self, length: int, batch: int, data: st.DataObject) -> None:
        self.counter += 10_000
        source = encoded(length, batch=batch, index=data.draw(st.integers(0, batch - 1)), start=self.counter)
        row = data.draw(st.none() | st.integers(0, len(self.rows)))
        target = len(self.rows) if row is None else row
        if length > self.cache.capacity.source or target >= self.cache.capacity.rows:
            with pytest.raises(CapacityError):
                self.cache.admit(source, row)
            return
        assert self.cache.admit(source, row) == target
        self.rows[target : target + 1] = [
            {name: [tensor[source.index, :, s] for s in range(length)] for name, tensor in source.tensors.items()}
            | {spec.name: [] for spec in SPECS if "T" in spec.axes}
        ]

    @precondition(lambda self: self.rows and self.longest("T") < self.cache.capacity.target)
    @rule()
    def step(self) -> None:
        for row, values in enumerate(self.rows):
            for spec in (spec for spec in SPECS if "T" in spec.axes):
                self.counter += 10
                written = self.counter + np.arange(6, dtype=np.float32).reshape(2, 3)
                self.cache.buffers[spec.name][row, :, self.cache.lengths[row]] = written
                values[spec.name].append(written)
        self.cache.advance()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        assert self.cache.release(row) == len(self.rows) - 1
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        origin, destination = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        self.cache.move(origin, destination)
        self.rows[destination] = {name: list(values) for name, values in self.rows[origin].items()}

    @rule(own=st.integers(1, LARGEST), source=st.integers(1, LARGEST))
    def resize(self, own: int, source: int) -> None:
        generation, held = self.cache.generation, self.cache.capacity
        if own < self.longest("T") or source < self.longest("S"):
            with pytest.raises(CapacityError):
                self.cache.resize(Capacity(self.cache.capacity.rows, own, source))
            assert (self.cache.generation, self.cache.capacity) == (generation, held)
            return
        self.cache.resize(Capacity(self.cache.capacity.rows, own, source))
        assert self.cache.generation > generation
        assert self.cache.capacity == Capacity(held.rows, own, source)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        cache = self.cache
        assert cache.active == len(self.rows)
        assert cache.bytes == cache.capacity.bytes(SPECS)
        for spec in SPECS:
            buffer = cache.buffers[spec.name]
            assert buffer.shape == spec.shape(cache.capacity.sizes)
            assert np.isfinite(buffer).all()  # 0 · NaN is NaN: nothing else may ever get in
            lengths = cache.lengths if "T" in spec.axes else cache.source_lengths
            for row, values in enumerate(self.rows):
                assert lengths[row] == len(values[spec.name])
                for position, value in enumerate(values[spec.name]):
                    np.testing.assert_array_equal(buffer[row, :, position], value)

    def longest(self, axis: str) -> int:
        names = [spec.name for spec in SPECS if axis in spec.axes]
        return max((len(values[name]) for values in self.rows for name in names), default=0)


TestPackedRows = PackedRows.TestCase
TestPackedRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("capacity", [Capacity(1, 1, 1), Capacity(4, 32, 64), Capacity(3, 5, 0), Capacity(0, 9, 9)])
def test_bytes_are_known_before_anything_is_allocated(capacity: Capacity) -> None:
    cache = KVCache(SPECS, capacity)
    assert capacity.bytes(SPECS) == cache.bytes == sum(buffer.nbytes for buffer in cache.buffers.values())


def test_bytes_are_those_of_the_contract() -> None:
    base = cache_specs(Dimensions(layers=6, heads=8, head_width=64, vocab_size=32_000))
    assert Capacity(1, 1, 0).bytes(base) == Capacity(1, 0, 1).bytes(base) == 24 * 2**10


def test_bytes_count_the_width_of_every_element_type() -> None:
    specs = [TensorSpec("ids", "int64", ("B", "T")), TensorSpec("half", "float16", ("B", 2, "S", 3))]
    assert Capacity(2, 5, 7).bytes(specs) == 2 * 5 * 8 + 2 * 2 * 7 * 3 * 2 == KVCache(specs, Capacity(2, 5, 7)).bytes


def test_buffers_begin_zeroed() -> None:
    assert not any(buffer.any() for buffer in KVCache(SPECS, Capacity(2, 3, 4)).buffers.values())


def test_a_row_that_is_taken_anew_begins_at_length_zero() -> None:
    cache = full_cache(2, 3)
    cache.advance()
    cache.admit(encoded(1), 0)
    assert cache.lengths.tolist() == [0, 1]
    assert cache.source_lengths.tolist() == [1, 3]


def test_only_active_rows_advance() -> None:
    cache = KVCache(SPECS, Capacity(3, 3, 3))
    cache.admit(encoded(1))
    cache.advance()
    assert cache.lengths.tolist() == [1, 0, 0]


def test_the_leading_rows_are_contiguous() -> None:
    cache = full_cache(1, 1, 1)
    assert all(buffer[:n].flags.c_contiguous for buffer in cache.buffers.values() for n in (1, 2, 3))


def test_a_full_cache_admits_nobody() -> None:
    cache = full_cache(1, 1)
    with pytest.raises(CapacityError, match="2 taken"):
        cache.admit(encoded(1))
    assert cache.active == 2


def test_a_row_beyond_the_first_free_one_is_refused() -> None:
    cache = KVCache(SPECS, Capacity(3, 3, 3))
    with pytest.raises(CapacityError):
        cache.admit(encoded(1), 1)


def test_a_source_too_long_is_refused_and_changes_nothing() -> None:
    cache = full_cache(4, source=4)
    with pytest.raises(CapacityError, match="5 positions"):
        cache.admit(encoded(5), 0)
    assert cache.source_lengths.tolist() == [4]


@pytest.mark.parametrize("row", [-1, 1, 2])
def test_releasing_an_idle_row_is_refused(row: int) -> None:
    cache = KVCache(SPECS, Capacity(3, 3, 3))
    cache.admit(encoded(1))
    with pytest.raises(CapacityError, match=f"seat {row}"):
        cache.release(row)
    assert cache.active == 1


def test_releasing_a_row_twice_is_refused() -> None:
    cache = full_cache(1)
    cache.release(0)
    with pytest.raises(CapacityError):
        cache.release(0)


@pytest.mark.parametrize(("target", "source"), [(1, 4), (2, 2)])
def test_resizing_below_what_is_used_is_refused_and_changes_nothing(target: int, source: int) -> None:
    cache = full_cache(3, 1)
    cache.advance()
    cache.advance()
    before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    with pytest.raises(CapacityError, match="the 2 and 3 positions in use"):
        cache.resize(Capacity(cache.capacity.rows, target, source))
    assert cache.generation == 0
    for name, buffer in cache.buffers.items():
        np.testing.assert_array_equal(buffer, before[name])


def test_the_lengths_of_released_rows_do_not_keep_a_cache_large() -> None:
    cache = full_cache(4, 1)
    cache.release(0)
    cache.resize(Capacity(cache.capacity.rows, 1, 1))
    assert cache.source_lengths[:1].tolist() == [1]
