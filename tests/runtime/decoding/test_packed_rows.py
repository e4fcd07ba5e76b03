from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import Translator
from kvx.runtime.arrays import IntArray
from kvx.runtime.bundle.framing import LanguageIds
from kvx.runtime.decoding.backend import Backend, Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, Sentence
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.options import TranslateOptions
from kvx.tests.memory import resident_bytes
from kvx.tests.poison import POISON, poison

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

WORDS = [
    "one",
    "two",
    "three",
    "seven",
    "nine",
    "twelve",
    "thirty-one",
    "forty-six",
    "eighty",
    "hundred",
    "thousand",
    "and",
]

sentences = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), max_size=30)


class Poisoner:
    """A backend that, around every step, fills what must not matter: NaN in idle rows, ±1e30 beyond the lengths."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = backend.name
        self.decodes = 1
        self.query_tokens = False
        self.cache_specs = backend.cache_specs
        self.beam_cache_specs = backend.beam_cache_specs
        self.encode = backend.encode

    def bind_chunk(self, cache: KVCache) -> Step:
        return self.backend.bind_chunk(cache)

    def bind(self, cache: KVCache) -> Step:
        step = self.backend.bind(cache)

        def poisoned(input_ids: IntArray) -> StepOutput:
            poison(cache, beyond=POISON, idle=np.nan)
            output = step(input_ids)
            poison(cache, beyond=-POISON, idle=POISON)
            return output

        return poisoned


@pytest.fixture(scope="module")
def alone(numbers_translator: Translator) -> Alone:
    return Alone(numbers_translator)


class Alone:
    """What each sentence gives by itself, on a cache of one row."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator
        self.answer = functools.cache(self._answer)

    def ids(self, text: str) -> tuple[int, ...]:
        framing = self.translator.manifest.framing
        read = self.translator._model.sources.read_one(text, 1, "truncate")
        return read.ids or framing.source_ids((), LanguageIds())

    def plan(self, rows: int) -> Plan:
        return Plan.of(self.translator.manifest, self.translator._model.backend.cache_specs, rows=rows)

    def _answer(self, text: str) -> tuple[int, ...]:
        sources = [Sentence(0, self.ids(text))]
        (outcome,) = decode(self.translator._model.backend, sources, Greedy(), self.plan(1))
        return outcome.best.ids


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=sentences, rows=st.integers(1, 40), longest_first=st.booleans())
def test_greedy_ids_equal_those_of_each_sentence_alone_whatever_the_neighbours_and_the_poison(
    alone: Alone, texts: list[str], rows: int, longest_first: bool
) -> None:
    sources = [Sentence(index, alone.ids(text)) for index, text in enumerate(texts)]
    if longest_first:
        sources.sort(key=lambda source: -len(source.ids))
    stats = DecodeStats()
    backend = Poisoner(alone.translator._model.backend)
    found = {o.sentence.number: o.best.ids for o in decode(backend, sources, Greedy(), alone.plan(rows), stats)}
    assert found == {index: alone.answer(text) for index, text in enumerate(texts)}
    assert stats.row_steps == sum(map(len, found.values()))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(first=sentences, second=sentences, workers=st.integers(1, 3))
def test_nothing_of_an_earlier_decode_survives_into_the_next(
    numbers_translator: Translator, first: list[str], second: list[str], workers: int
) -> None:
    fresh = [numbers_translator.translate([text])[0] for text in second]
    numbers_translator.translate(first, workers=workers)
    assert numbers_translator.translate(second, rows=3, workers=workers) == fresh


def _texts(numbers: Sequence[int]) -> list[str]:
    return [" ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(number % 9)) for number in numbers]


def test_sentences_longer_than_the_cache_make_it_grow_without_draining_it(numbers_translator: Translator) -> None:
    texts = ["one", " ".join(["ninety-nine"] * 20), "two", " ".join(["seven"] * 40), "three"] * 10
    stats = DecodeStats()
    sources = [Sentence(i, Alone(numbers_translator).ids(text)) for i, text in enumerate(texts)]
    plan = Alone(numbers_translator).plan(4)
    found = {
        o.sentence.number: o.best.ids for o in decode(numbers_translator._model.backend, sources, Greedy(), plan, stats)
    }
    assert stats.repacks > 0
    assert found == {i: Alone(numbers_translator).answer(text) for i, text in enumerate(texts)}


def test_a_cache_budget_lowers_the_rows_and_changes_no_answer(numbers_translator: Translator) -> None:
    texts = _texts(range(60))
    free = list(numbers_translator.translate_iter(texts))
    plan, _ = numbers_translator._model.plan(TranslateOptions(rows=1, workers=1))
    stats = DecodeStats()
    budget = 3 * plan.seat_bytes(plan.source_positions)
    tight = TranslateOptions(cache_bytes=budget, workers=1)
    assert list(numbers_translator.translate_iter(texts, tight, stats)) == free
    assert stats.cache_bytes <= budget


def _equals_the_reference(translator: Translator, seed: Seed, rows: int, lines: int) -> None:
    found = translator.translate(seed.sources[:lines], rows=rows)
    assert [list(translation.ids) for translation in found] == [line["ids"] for line in seed.greedy[:lines]]


@pytest.mark.parametrize(("rows", "lines"), [(1, 40), (2, 80), (7, 200), (64, 1000)])
def test_lines_of_the_reference_test_set_are_equal_at_every_number_of_rows(
    seed_translator: Translator, seed: Seed, rows: int, lines: int
) -> None:
    _equals_the_reference(seed_translator, seed, rows, lines)


@pytest.mark.proof
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 64, 1000])
def test_all_lines_of_the_reference_test_set_are_equal_at_every_number_of_rows(
    seed_translator: Translator, seed: Seed, rows: int
) -> None:
    _equals_the_reference(seed_translator, seed, rows, 1000)


def test_the_rows_stay_in_use_until_the_input_runs_out(seed_translator: Translator, seed: Seed) -> None:
    backend, plan = seed_translator._model.backend, replace(Alone(seed_translator).plan(32), rows=32)
    texts = sorted(seed.sources, key=len, reverse=True)
    drawn = 0

    def sources() -> Iterator[Sentence]:
        nonlocal drawn
        for index, text in enumerate(texts):
            drawn += 1
            yield Sentence(index, Alone(seed_translator).ids(text))

    stats, until_empty = DecodeStats(), 0.0
    for _ in decode(backend, sources(), Greedy(), plan, stats):
        if drawn < len(texts):
            until_empty = stats.occupancy
    assert until_empty >= 0.95
    assert stats.row_steps == stats.tokens


@pytest.mark.proof
def test_memory_does_not_grow_over_twenty_thousand_sentences(seed_translator: Translator, seed: Seed) -> None:
    _memory_stays(seed_translator, seed.sources, sentences=20_000)


def test_memory_does_not_grow_over_many_sentences(numbers_translator: Translator) -> None:
    _memory_stays(numbers_translator, _texts(range(1, 1000)), sentences=20_000)


def _memory_stays(translator: Translator, texts: Sequence[str], sentences: int) -> None:
    """The most that is resident in the second half, against the first."""
    stream = itertools.islice(itertools.cycle(texts), sentences)
    halves = [0, 0]
    for number, _ in enumerate(translator.translate_iter(stream)):
        if number % 100 == 0:
            half = int(number >= sentences // 2)
            halves[half] = max(halves[half], resident_bytes())
    assert halves[1] - halves[0] < 0.02 * halves[0] + 2 * 2**20
