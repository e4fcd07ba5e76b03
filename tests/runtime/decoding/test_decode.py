"""The scheduler on a backend without a model.

A source's ids say how long its translation is. The fake encoder writes them into the cross keys, and the fake step
knows nothing but what it finds in the cache: whatever is lost or mixed up in there shows in the translations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.signature import Dimensions, TensorSpec, cache_specs
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.plan import GROUP_POSITIONS, SMALLEST_CAPACITY, Plan
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.decoding.search import Greedy

PAD, BOS, EOS, FIRST = 0, 1, 2, 3
VOCABULARY = 40
SPECS: tuple[TensorSpec, ...] = cache_specs(Dimensions(layers=1, heads=2, head_width=1, vocab_size=VOCABULARY))
PLAN = Plan(
    start=(BOS,),
    eos=EOS,
    pad=PAD,
    rows=4,
    group=4,
    max_new_tokens=12,
    source_positions=200,
    cache_bytes=2**30,
    target_bytes=Capacity(1, 1, 0).bytes(SPECS),
    source_bytes=Capacity(1, 0, 1).bytes(SPECS),
)


class FakeBackend:
    """Translates source (length, seed, …) into `length` tokens that depend on all of its ids, the last one eos."""

    name = "fake"
    decodes = 1
    query_tokens = False

    def __init__(self) -> None:
        self.cache_specs = self.beam_cache_specs = SPECS
        self.groups: list[int] = []
        self.rows: list[int] = []
        self.caches: list[KVCache] = []

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        self.groups.append(len(input_ids))
        for ids, length in zip(input_ids, source_lengths, strict=True):
            assert PAD not in ids[:length]
            assert (ids[length:] == PAD).all()
        content = np.where(input_ids == PAD, np.nan, input_ids).astype(np.float32)  # beyond a length nothing is read
        tensor = np.repeat(content[:, None, :, None], 2, axis=1)
        return {spec.name: tensor for spec in self.cache_specs if "S" in spec.axes}

    def bind_chunk(self, cache: KVCache) -> Step:
        raise NotImplementedError  # it takes one token of a row

    def bind(self, cache: KVCache) -> Step:
        self.caches.append(cache)

        def step(input_ids: IntArray) -> StepOutput:
            assert len(input_ids) == cache.active > 0
            self.rows.append(cache.active)
            logits = np.zeros((cache.active, VOCABULARY), np.float32)
            for row, fed in enumerate(input_ids.tolist()):
                logits[row, self._next_id(cache, row, fed)] = 1
            return StepOutput(logits)

        return step

    def _next_id(self, cache: KVCache, row: int, fed: int) -> int:
        position, length = int(cache.lengths[row]), int(cache.source_lengths[row])
        sources, pasts = [], []
        for spec in self.cache_specs:
            buffer = cache.buffers[spec.name][row]
            if "S" in spec.axes:
                sources.append(buffer[:, :length])
            else:
                buffer[:, position] = fed
                pasts.append(buffer[:, : position + 1])
        ids = tuple(sources[0][0, :, 0].astype(int).tolist())
        target = (BOS, *translation(ids))
        assert all((source[..., 0] == ids).all() for source in sources)
        assert all((past[..., 0] == target[: position + 1]).all() for past in pasts)  # eos among them would be a miss
        return target[position + 1]


def translation(ids: Sequence[int]) -> tuple[int, ...]:
    length, seed = ids[0] - FIRST, sum(ids)
    return (*(FIRST + (seed + position) % (VOCABULARY - FIRST) for position in range(length - 1)), EOS)


def source(index: int, length: int, *, seed: int = 0, positions: int = 3) -> Sentence:
    """A sentence of so many source positions whose translation has `length` tokens, eos included."""
    return Sentence(index, (FIRST + length, *[FIRST + seed % 1000] * (positions - 1)))


def sources_of(lengths: Sequence[int]) -> list[Sentence]:
    return [source(index, length, seed=7 * index, positions=1 + index % 5) for index, length in enumerate(lengths)]


def taken_from(waiting: deque[Sentence]) -> Iterator[Sentence]:
    while waiting:
        yield waiting.popleft()


def run(
    sources: Sequence[Sentence], plan: Plan, *, scores: bool = False
) -> tuple[list[Outcome], FakeBackend, DecodeStats]:
    backend, stats = FakeBackend(), DecodeStats()
    return list(decode(backend, sources, Greedy(), plan, stats, scored=scores)), backend, stats


def with_rows(rows: int, max_new_tokens: int = PLAN.max_new_tokens) -> Plan:
    return dataclasses.replace(PLAN, rows=rows, group=rows, max_new_tokens=max_new_tokens)


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=80), rows=st.integers(1, 40), group=st.integers(1, 40))
@example(lengths=[1, 12, 1, 12, 1], rows=3, group=3)
@example(lengths=[1] * 50, rows=7, group=2)
def test_every_sentence_gets_its_own_translation_once(lengths: list[int], rows: int, group: int) -> None:
    sources = sources_of(lengths)
    outcomes, backend, stats = run(sources, dataclasses.replace(PLAN, rows=rows, group=group))
    assert Counter(outcome.sentence.number for outcome in outcomes) == Counter(range(len(sources)))
    for outcome in outcomes:
        assert outcome.best.ids == translation(sources[outcome.sentence.number].ids)
        assert outcome.best.ended
        assert outcome.best.score is None
    assert stats.row_steps == sum(backend.rows) == sum(lengths)
    assert (stats.sentences, stats.tokens, stats.steps) == (len(lengths), sum(lengths), len(backend.rows))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), rows=st.integers(1, 9), limit=st.integers(1, 30))
def test_a_translation_stops_at_the_limit(lengths: list[int], rows: int, limit: int) -> None:
    sources = sources_of(lengths)
    outcomes, _, stats = run(sources, with_rows(rows, limit))
    assert len(outcomes) == len(sources)
    for outcome in outcomes:
        whole = translation(sources[outcome.sentence.number].ids)
        assert outcome.best.ids == whole[:limit]
        assert outcome.best.ended == (len(whole) <= limit)
    assert stats.row_steps == sum(min(length, limit) for length in lengths)


def test_rows_stay_full_until_the_input_runs_out() -> None:
    lengths = [1 + index * 5 % 11 for index in range(60)]
    waiting, left = deque(sources_of(lengths)), list[int]()

    class Counting(FakeBackend):
        def bind(self, cache: KVCache) -> Step:
            step = super().bind(cache)

            def counted(input_ids: IntArray) -> StepOutput:
                left.append(len(waiting))
                return step(input_ids)

            return counted

    backend = Counting()
    assert len(list(decode(backend, taken_from(waiting), Greedy(), with_rows(4)))) == len(lengths)
    drawing = [rows for rows, more in zip(backend.rows, left, strict=True) if more]
    assert set(drawing) == {4}
    assert len(drawing) > len(backend.rows) / 2
    assert backend.rows == sorted(backend.rows, reverse=True)


def test_a_freed_row_is_taken_in_the_same_step() -> None:
    _, backend, stats = run(sources_of([1] * 9), with_rows(3))
    assert backend.rows == [3, 3, 3]
    assert stats.steps == 3


def test_no_step_is_run_for_a_row_that_has_ended() -> None:
    _, backend, _ = run(sources_of([5, 1, 3, 1]), with_rows(4))
    assert backend.rows == [4, 2, 2, 1, 1]


def test_nothing_is_run_without_sources() -> None:
    outcomes, backend, stats = run([], PLAN)
    assert (outcomes, backend.groups, backend.rows) == ([], [], [])
    assert (stats.sentences, stats.steps) == (0, 0)


def test_sources_are_encoded_in_groups() -> None:
    _, backend, _ = run(sources_of([3] * 10), dataclasses.replace(PLAN, rows=2, group=4))
    assert backend.groups == [4, 4, 2]


def test_sources_are_drawn_only_as_rows_fall_free() -> None:
    drawn: list[int] = []

    def feed() -> Iterator[Sentence]:
        for each in sources_of([4] * 40):
            drawn.append(each.number)
            yield each

    for done, _ in enumerate(decode(FakeBackend(), feed(), Greedy(), PLAN), 1):
        assert len(drawn) <= done + PLAN.rows + PLAN.group
    assert len(drawn) == 40


def test_scores_are_each_sentences_own_sum() -> None:
    lengths = [1 + index * 7 % 12 for index in range(30)]
    outcomes, _, _ = run(sources_of(lengths), with_rows(5), scores=True)
    chosen = 1 - np.log(np.e + VOCABULARY - 1)  # one logit of 1 among zeros
    assert [outcome.best.score for outcome in outcomes] == pytest.approx(
        [lengths[outcome.sentence.number] * chosen for outcome in outcomes]
    )


def test_a_cache_that_grows_keeps_what_it_holds() -> None:
    lengths = [SMALLEST_CAPACITY * 3, 2, SMALLEST_CAPACITY + 5, 1, 90, 3]
    sources = [source(i, length, seed=11 * i, positions=1 + 30 * i) for i, length in enumerate(lengths)]
    outcomes, backend, stats = run(sources, with_rows(3, 120))
    assert {outcome.sentence.number: outcome.best.ids for outcome in outcomes} == {
        each.number: translation(each.ids) for each in sources
    }
    assert stats.repacks >= 2
    assert backend.caches[0].generation >= stats.repacks


def test_a_cache_begins_small_and_is_never_larger_than_the_limits() -> None:
    plan = with_rows(3, 100)
    _, backend, stats = run(sources_of([5] * 6), plan)
    small = stats.cache_bytes
    assert (backend.caches[0].capacity.target, stats.repacks) == (SMALLEST_CAPACITY, 0)
    _, backend, stats = run([source(i, 100, positions=200) for i in range(4)], plan)
    assert (
        small
        < stats.cache_bytes
        == dataclasses.replace(backend.caches[0].capacity, target=100, source=200).bytes(backend.cache_specs)
    )


def test_a_cache_gives_room_back_that_nobody_needs() -> None:
    sources = [source(0, 2, positions=200), *(source(i, 2, positions=3) for i in range(1, 20))]
    outcomes, backend, stats = run(sources, with_rows(2))
    assert len(outcomes) == 20
    assert backend.caches[0].capacity.source < 200
    assert backend.caches[0].bytes < stats.cache_bytes


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_decode_may_be_closed_half_way(taken: int) -> None:
    backend, waiting = FakeBackend(), deque(sources_of([3] * 30))
    outcomes = decode(backend, taken_from(waiting), Greedy(), PLAN)
    for _ in range(taken):
        next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    steps, left = len(backend.rows), len(waiting)
    assert list(outcomes) == []
    assert (len(backend.rows), len(waiting)) == (steps, left)
    assert left >= 30 - taken - PLAN.rows - PLAN.group
    rest = list(decode(backend, taken_from(waiting), Greedy(), PLAN))  # the next decode has a cache of its own
    assert len(rest) == left


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_cancelling_ends_every_source_as_far_as_it_has_come_however_many_there_are(steps: int) -> None:
    backend = FakeBackend()
    sources = (source(index, 5, seed=index, positions=200) for index in itertools.count())
    plan = dataclasses.replace(PLAN, group=30)  # more than there are rows, and than the encoder gets at once
    outcomes = decode(backend, sources, Greedy(), plan, cancelled=lambda: len(backend.rows) >= steps)
    found = list(itertools.islice(outcomes, 60))
    assert [outcome.sentence.number for outcome in sorted(found, key=lambda outcome: outcome.sentence.number)] == list(
        range(60)
    )
    assert backend.groups == [GROUP_POSITIONS // 200]
    assert len(backend.rows) == steps
    for outcome in found:
        ids = outcome.best.ids
        assert (
            ids
            == translation(source(outcome.sentence.number, 5, seed=outcome.sentence.number, positions=200).ids)[
                : len(ids)
            ]
        )
        assert outcome.reason(outcome.best) == ("end" if len(ids) == 5 else "cancelled")
        assert outcome.best.score is None
    assert sum(len(outcome.best.ids) for outcome in found) == sum(backend.rows)


def test_two_decodes_on_one_backend_do_not_disturb_each_other() -> None:
    backend, sources = FakeBackend(), sources_of([1 + index % 9 for index in range(25)])
    first, second = (decode(backend, sources, Greedy(), with_rows(rows)) for rows in (3, 5))
    pairs = list(zip(first, second, strict=True))
    for side in (0, 1):
        found = {pair[side].sentence.number: pair[side].best.ids for pair in pairs}
        assert found == {each.number: translation(each.ids) for each in sources}
