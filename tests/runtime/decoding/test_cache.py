from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from kvx.runtime.bundle.signature import Dimensions, TensorSpec, cache_specs
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.errors import CapacityError

SPECS = cache_specs(Dimensions(layers=2, heads=2, head_width=3, vocab_size=5))
SHARED_SPECS = cache_specs(Dimensions(layers=2, heads=2, head_width=3, vocab_size=5), shared_sources=True)
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


def _common(one: list[float], other: list[float]) -> int:
    """How many values two rows begin with alike."""
    return next((at for at, (left, right) in enumerate(zip(one, other, strict=True)) if left != right), len(one))


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


class Seats(RuleBasedStateMachine):
    """Several rows a seat against lists: a seat of the model is its source and what each of its rows has written."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0.0
        self.seats: list[tuple[EncodedSource, list[list[float]]]] = []

    @initialize(seats=st.integers(1, 4), beams=st.integers(2, 4), spare=st.integers(0, 1), shared=st.booleans())
    def begin(self, seats: int, beams: int, spare: int, shared: bool) -> None:
        self.beams = beams
        self.specs = SHARED_SPECS if shared else SPECS
        self.cache = KVCache(self.specs, Capacity(seats * beams + spare, 2, 2, beams))
        assert self.cache.shared_sources == shared

    @rule(length=st.integers(0, LARGEST), batch=st.integers(1, 3), data=st.data())
    def admit(self, length: int, batch: int, data: st.DataObject) -> None:
        self.counter += 10_000
        source = encoded(length, batch=batch, index=data.draw(st.integers(0, batch - 1)), start=self.counter)
        seat = data.draw(st.none() | st.integers(0, len(self.seats)))
        target = len(self.seats) if seat is None else seat
        if length > self.cache.capacity.source or target >= self.cache.capacity.seats:
            with pytest.raises(CapacityError):
                self.cache.admit(source, seat)
            return
        assert self.cache.admit(source, seat) == target
        self.seats[target : target + 1] = [(source, [[] for _ in range(self.beams)])]

    @precondition(lambda self: self.seats and self.longest() < self.cache.capacity.target)
    @rule()
    def step(self) -> None:
        for row, written in enumerate(self.written()):
            self.counter += 1
            for spec in (spec for spec in self.specs if "T" in spec.axes):
                self.cache.buffers[spec.name][row, :, self.cache.lengths[row]] = self.counter
            written.append(self.counter)
        self.cache.advance()

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        """Within each seat any row may go on from any other, also two from each other."""
        beams = st.integers(0, self.beams - 1)
        choices = data.draw(st.lists(beams, min_size=self.cache.active, max_size=self.cache.active))
        parents = [row // self.beams * self.beams + choice for row, choice in enumerate(choices)]
        before = [list(written) for written in self.written()]
        common = [_common(before[row], before[parent]) for row, parent in enumerate(parents)]
        self.cache.follow(np.array(parents), data.draw(st.none() | st.just(np.array(common))))
        for written, parent in zip(self.written(), parents, strict=True):
            written[:] = before[parent]

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seat = data.draw(st.integers(0, len(self.seats) - 1))
        assert self.cache.release(seat) == len(self.seats) - 1
        self.seats[seat] = self.seats[-1]
        self.seats.pop()

    @rule(beyond=st.integers(0, 2))
    def release_nobody(self, beyond: int) -> None:
        with pytest.raises(CapacityError):
            self.cache.release(len(self.seats) + beyond)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        origin, destination = (data.draw(st.integers(0, len(self.seats) - 1)) for _ in range(2))
        self.cache.move(origin, destination)
        source, rows = self.seats[origin]
        self.seats[destination] = source, [list(written) for written in rows]

    @rule(seats=st.integers(0, 5), own=st.integers(1, LARGEST), source=st.integers(1, LARGEST), other=st.booleans())
    def resize(self, seats: int, own: int, source: int, other: bool) -> None:
        generation, held = self.cache.generation, self.cache.capacity
        wanted = Capacity(seats * self.beams, own, source, self.beams + other)
        longest_source = max((source.length for source, _ in self.seats), default=0)
        if other or seats < len(self.seats) or own < self.longest() or source < longest_source:
            with pytest.raises(CapacityError):
                self.cache.resize(wanted)
            assert (self.cache.generation, self.cache.capacity) == (generation, held)
            return
        self.cache.resize(wanted)
        assert self.cache.generation > generation
        assert self.cache.capacity == wanted

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        cache = self.cache
        assert cache.active == len(self.seats) * self.beams
        assert cache.seated == len(self.seats)
        assert cache.bytes == cache.capacity.bytes(self.specs)
        for spec in self.specs:
            assert cache.buffers[spec.name].shape == spec.shape(cache.capacity.sizes)
            assert np.isfinite(cache.buffers[spec.name]).all()
        assert cache.lengths[: cache.active].tolist() == [len(written) for written in self.written()]
        per_seat = 1 if cache.shared_sources else self.beams
        assert len(cache.source_lengths) == len(cache.lengths) // (self.beams if cache.shared_sources else 1)
        lengths = [source.length for source, _ in self.seats for _ in range(per_seat)]
        assert cache.source_lengths[: len(lengths)].tolist() == lengths
        for spec in self.specs:
            buffer = cache.buffers[spec.name]
            if "T" in spec.axes:
                for row, written in enumerate(self.written()):
                    assert (buffer[row, :, : len(written)] == np.array(written)[:, None]).all()
            else:
                for place in range(len(lengths)):
                    source, _ = self.seats[place // per_seat]
                    expected = source.tensors[spec.name][source.index, :, : source.length]
                    np.testing.assert_array_equal(buffer[place, :, : source.length], expected)

    def written(self) -> list[list[float]]:
        return [written for _, rows in self.seats for written in rows]

    def longest(self) -> int:
        return max(map(len, self.written()), default=0)


TestSeats = Seats.TestCase
TestSeats.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_following_copies_nothing_where_all_stay() -> None:
    cache = KVCache(SPECS, Capacity(4, 3, 4, 2))
    for _ in range(2):
        cache.admit(encoded(2))
    cache.advance()
    for buffer in cache.buffers.values():
        buffer.flags.writeable = False
    cache.follow(np.arange(4))


def test_following_touches_neither_sources_nor_what_is_not_written() -> None:
    cache = KVCache(SPECS, Capacity(2, 3, 4, 2))
    cache.admit(encoded(2))
    cache.advance()
    for spec in SPECS:
        if "S" in spec.axes:
            cache.buffers[spec.name].flags.writeable = False
        else:
            cache.buffers[spec.name][0], cache.buffers[spec.name][1] = 5, 7
    cache.follow(np.array([0, 0]))
    for spec in SPECS:
        if "T" in spec.axes:
            assert (cache.buffers[spec.name][1, :, :1] == 5).all()
            assert (cache.buffers[spec.name][1, :, 1:] == 7).all()


def test_following_copies_nothing_that_a_row_and_its_parent_have_in_common() -> None:
    cache = KVCache(SPECS, Capacity(2, 4, 4, 2))
    cache.admit(encoded(2))
    own = [cache.buffers[spec.name] for spec in SPECS if "T" in spec.axes]
    for _ in range(3):
        cache.advance()
    for buffer in own:
        buffer[0], buffer[1] = 5, 7
    cache.follow(np.array([0, 0]), np.array([3, 2]))
    for buffer in own:
        assert (buffer[1, :, 2] == 5).all()
        assert (buffer[1, :, [0, 1, 3]] == 7).all()


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_shared_sources_take_the_bytes_of_one_row_of_a_seat(beams: int) -> None:
    shared, copied = (Capacity(4 * beams, 7, 9, beams).bytes(specs) for specs in (SHARED_SPECS, SPECS))
    sources = Capacity(4, 0, 9).bytes(SPECS)
    assert copied - shared == (beams - 1) * sources
    assert Capacity(4 * beams, 7, 0, beams).bytes(SHARED_SPECS) == Capacity(4 * beams, 7, 0).bytes(SPECS)


def test_rows_that_make_no_whole_seat_are_never_taken() -> None:
    cache = KVCache(SPECS, Capacity(5, 3, 3, 2))
    assert [cache.admit(encoded(1)) for _ in range(2)] == [0, 1]
    with pytest.raises(CapacityError, match="with 2 seats taken"):
        cache.admit(encoded(1))
    assert cache.active == 4


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
    with pytest.raises(CapacityError, match="with 2 seats taken"):
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
    with pytest.raises(CapacityError, match=f"Seat {row}"):
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


@pytest.mark.parametrize("target", [2**44, 2**62])
def test_memory_that_is_not_there_is_refused_with_its_bytes_and_changes_nothing(target: int) -> None:
    huge = Capacity(2, target, 4)
    with pytest.raises(CapacityError, match=f"{huge.bytes(SPECS):,} bytes") as caught:
        KVCache(SPECS, huge)
    assert caught.value.option == "cache_bytes"
    assert f"2 rows with {target} target and 4 source positions" in str(caught.value)
    cache = full_cache(3, 1)
    before, capacity = dict(cache.buffers), cache.capacity
    with pytest.raises(CapacityError, match="not enough memory"):
        cache.resize(huge)
    assert (cache.buffers, cache.capacity, cache.generation) == (before, capacity, 0)


def test_the_lengths_of_released_rows_do_not_keep_a_cache_large() -> None:
    cache = full_cache(4, 1)
    cache.release(0)
    cache.resize(Capacity(cache.capacity.rows, 1, 1))
    assert cache.source_lengths[:1].tolist() == [1]
