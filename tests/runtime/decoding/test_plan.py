from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import CapacityError, InputError, OptionError, Translator
from kvx.runtime.bundle.signature import Dimensions, TensorSpec, cache_specs
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.decoding.plan import DEFAULT_ROWS, SMALLEST_CAPACITY, Plan
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.options import TranslateOptions


def _plan(
    translator: Translator,
    *,
    rows: int | None = None,
    cache_bytes: int | None = None,
    max_new_tokens: int | None = None,
) -> Plan:
    specs = translator._model.backend.cache_specs
    return Plan.of(translator.manifest, specs, rows=rows, cache_bytes=cache_bytes, max_new_tokens=max_new_tokens)


def whole_capacity(plan: Plan, source: int) -> Capacity:
    """With all seats that fit, at their full length."""
    seats = plan.seats_that_fit(longest=plan.target_positions, source=source)
    return plan.capacity(seats=seats, target=plan.max_new_tokens, source=source, longest=plan.target_positions)


def test_a_plan_takes_as_many_rows_as_fit_up_to_the_default(numbers_translator: Translator) -> None:
    plan = _plan(numbers_translator)
    smallest = plan.seat_bytes(SMALLEST_CAPACITY)
    assert plan.rows == DEFAULT_ROWS
    assert _plan(numbers_translator, cache_bytes=5 * smallest + 1).rows == 5


def test_what_a_plan_allows_is_never_more_than_its_bytes(numbers_translator: Translator) -> None:
    specs = numbers_translator._model.backend.cache_specs
    budget = 10 * _plan(numbers_translator).seat_bytes(40)
    plan = _plan(numbers_translator, cache_bytes=budget)
    for source in range(1, plan.source_positions + 1):
        capacity = whole_capacity(plan, source)
        assert capacity.rows >= 1
        assert capacity.source >= source
        assert KVCache(specs, capacity).bytes == capacity.bytes(specs) <= budget


def test_rows_that_cannot_fit_are_refused_with_the_numbers(numbers_translator: Translator) -> None:
    smallest = _plan(numbers_translator).seat_bytes(SMALLEST_CAPACITY)
    with pytest.raises(CapacityError, match=rf"8 rows × {smallest:,} bytes .* which hold 7 such rows"):
        _plan(numbers_translator, rows=8, cache_bytes=8 * smallest - 1)


def test_a_budget_below_one_row_is_refused(numbers_translator: Translator) -> None:
    with pytest.raises(CapacityError, match="which hold 0 such rows"):
        _plan(numbers_translator, cache_bytes=1000)


@pytest.mark.parametrize("limit", [0, 65, -1])
def test_more_new_tokens_than_positions_are_refused(numbers_translator: Translator, limit: int) -> None:
    with pytest.raises(OptionError, match=rf"`max_new_tokens` is {limit}\. Expected 1 to 64"):
        _plan(numbers_translator, max_new_tokens=limit)


def test_a_sentence_that_the_budget_cannot_hold_is_named_with_what_it_needs(numbers_translator: Translator) -> None:
    budget = _plan(numbers_translator).seat_bytes(40)
    options = TranslateOptions(cache_bytes=budget, workers=1)
    texts = ["one", " ".join(["seven"] * 50), "two"]
    results = numbers_translator.translate_iter(texts, options)
    assert next(results).text == "eins"
    with pytest.raises(
        InputError, match=rf"Line 2: The text has 52 tokens, which need a cache of [\d,]+ bytes\. .* {budget:,} bytes"
    ):
        list(results)


def test_workers_share_the_bytes_and_take_no_rows_away(numbers_translator: Translator) -> None:
    smallest = _plan(numbers_translator).seat_bytes(SMALLEST_CAPACITY)
    options = TranslateOptions(cache_bytes=2 * 8 * smallest, rows=8, workers=2)
    assert numbers_translator._model.plan(options)[0].rows == 8
    with pytest.raises(CapacityError, match=r"for 2 workers, which is room for 7 rows each\. Expected 8 ×"):
        numbers_translator._model.plan(TranslateOptions(cache_bytes=2 * 8 * smallest - 2, rows=8, workers=2))
    with pytest.raises(CapacityError, match="room for 0 rows each"):
        numbers_translator._model.plan(TranslateOptions(cache_bytes=3 * smallest, workers=4))


def test_by_default_there_are_no_more_workers_than_the_bytes_have_rows_for(numbers_translator: Translator) -> None:
    smallest = _plan(numbers_translator).seat_bytes(SMALLEST_CAPACITY)
    plan, workers = numbers_translator._model.plan(TranslateOptions(cache_bytes=DEFAULT_ROWS * smallest))
    assert (plan.rows, workers) == (DEFAULT_ROWS, 1)


def test_a_cache_never_holds_more_than_planned_for_all_workers(numbers_translator: Translator) -> None:
    budget = 2 * 6 * _plan(numbers_translator).seat_bytes(40)
    stats = DecodeStats()
    texts = [" ".join(["seven"] * (1 + i % 30)) for i in range(200)]
    options = TranslateOptions(cache_bytes=budget, workers=2)
    assert len(list(numbers_translator.translate_iter(texts, options, stats))) == 200
    assert 0 < stats.cache_bytes <= budget


def _specs(translator: Translator, *, shared: bool) -> tuple[TensorSpec, ...]:
    return cache_specs(Dimensions.of_model(translator.manifest.model), shared_sources=shared)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    beams=st.integers(1, 70),
    shared=st.booleans(),
    workers=st.integers(1, 4),
    room=st.integers(1, 12),
)
def test_what_a_plan_with_beams_allows_is_never_more_than_its_bytes(
    numbers_translator: Translator, beams: int, shared: bool, workers: int, room: int
) -> None:
    specs = _specs(numbers_translator, shared=shared)
    one = Plan.of(numbers_translator.manifest, specs, rows=beams, beams=beams)
    budget = room * workers * one.seat_bytes(SMALLEST_CAPACITY) + 1
    whole = Plan.of(numbers_translator.manifest, specs, cache_bytes=budget, beams=beams)
    assert whole.seats == min(max(1, DEFAULT_ROWS // beams), room * workers)
    plan = whole.share_of(workers)
    assert plan.rows == plan.seats * beams
    assert plan.seats == min(whole.seats, room)
    for source in range(1, plan.source_positions + 1):
        capacity = whole_capacity(plan, source)
        assert (capacity.beams, capacity.rows % beams) == (beams, 0)
        assert 1 <= capacity.seats <= plan.seats
        assert capacity.source >= source
        assert workers * capacity.bytes(specs) <= budget
        assert capacity.seats * plan.seat_bytes(capacity.source) == capacity.bytes(specs)


def test_rows_are_rounded_down_to_whole_sentences(numbers_translator: Translator) -> None:
    specs = _specs(numbers_translator, shared=True)
    for rows, seats in ((4, 1), (7, 1), (8, 2), (11, 2)):
        plan = Plan.of(numbers_translator.manifest, specs, rows=rows, beams=4)
        assert (plan.seats, plan.rows) == (seats, 4 * seats)
    with pytest.raises(OptionError, match=r"4 beams, but only 3 rows\. Expected at least one row for every beam"):
        Plan.of(numbers_translator.manifest, specs, rows=3, beams=4)


def test_sentences_with_beams_that_cannot_fit_are_refused_with_the_numbers(numbers_translator: Translator) -> None:
    specs = _specs(numbers_translator, shared=True)
    smallest = Plan.of(numbers_translator.manifest, specs, beams=4).seat_bytes(SMALLEST_CAPACITY)
    with pytest.raises(CapacityError, match=rf"3 sentences of 4 rows × {smallest:,} bytes .* which hold 2 such"):
        Plan.of(numbers_translator.manifest, specs, rows=12, beams=4, cache_bytes=3 * smallest - 1)
    plan = Plan.of(numbers_translator.manifest, specs, rows=12, beams=4, cache_bytes=3 * smallest)
    assert plan.share_of(1, least_rows=12).rows == 12
    with pytest.raises(CapacityError, match=r"for 2 workers, which is room for 4 rows each\. Expected 3 ×"):
        plan.share_of(2, least_rows=12)


def test_a_cache_with_beams_never_holds_more_than_planned_for_all_workers(beams_translator: Translator) -> None:
    options = TranslateOptions(beam_size=3, n_best=2, workers=2)
    one, _ = beams_translator._model.plan(replace(options, rows=3))
    budget = 2 * 3 * one.seat_bytes(40)
    stats = DecodeStats()
    texts = [" ".join(["seven"] * (1 + i % 30)) for i in range(60)]
    found = list(beams_translator.translate_iter(texts, replace(options, cache_bytes=budget), stats))
    assert 0 < stats.cache_bytes <= budget
    assert found == beams_translator.translate(texts, options)
