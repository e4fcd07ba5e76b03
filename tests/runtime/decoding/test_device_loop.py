"""The loop that looks only between blocks of steps, on the CPU: the rows, buffers and graph that a device has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import CapacityError, TranslateOptions, Translator
from kvx.runtime.backends.device import HOST
from kvx.runtime.backends.device_rows import DeviceRows, IdleRows
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.device_loop import LoopState, decode_in_blocks
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.engine.loaded import LoadedModel

WORDS = ("one", "seven", "twelve", "thirty", "thousand", "hundred", "and", "ninety-nine")
sentences = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=20)


class Looping:
    """A translator of the demo model with the looped graph, its rows poisoned beyond what is written."""

    def __init__(self, bundle: Path) -> None:
        self.translator = Translator.load(bundle, threads=1)
        assert isinstance(self.translator._model.backend, OnnxBackend)
        self.backend = self.translator._model.backend

    def sources(self, texts: list[str]) -> list[Sentence]:
        read = self.translator._model.sources.read(texts)
        return [Sentence(index, text.ids) for index, text in enumerate(read)]

    def run(self, texts: list[str], *, rows: int, block: int, limit: int | None = None) -> dict[int, Outcome]:
        plan, _ = self.translator._model.plan(self.options(rows, limit))
        self.stats = DecodeStats()
        found = decode_in_blocks(self.backend, iter(self.sources(texts)), plan, self.stats, block=block)
        return {outcome.sentence.number: outcome for outcome in found}

    def plain(self, texts: list[str], limit: int | None = None) -> list[tuple[int, ...]]:
        return [found.ids for found in self.translator.translate(texts, max_new_tokens=limit)]

    def options(self, rows: int, limit: int | None) -> TranslateOptions:
        return TranslateOptions(rows=rows, max_new_tokens=limit, workers=1)


@pytest.fixture(scope="module")
def bundle(loop_bundle: Path) -> Path:
    return loop_bundle


@pytest.fixture(scope="module")
def looping(bundle: Path) -> Looping:
    return Looping(bundle)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=sentences, rows=st.integers(1, 12), block=st.integers(1, 9), limit=st.sampled_from([None, 1, 3, 6]))
def test_blocks_give_the_ids_of_the_plain_loop_for_any_number_of_sentences_rows_and_steps(
    looping: Looping, texts: list[str], rows: int, block: int, limit: int | None
) -> None:
    found = looping.run(texts, rows=rows, block=block, limit=limit)
    assert [found[index].best.ids for index in range(len(texts))] == looping.plain(texts, limit)
    for outcome in found.values():
        assert outcome.reason(outcome.best) == ("end" if outcome.best.ended else "length")
    assert looping.stats.sentences == len(texts)
    assert looping.stats.tokens == looping.stats.row_steps == sum(len(outcome.best.ids) for outcome in found.values())


@pytest.mark.parametrize("block", [1, 2, 5, 8])
def test_the_host_looks_at_most_a_block_late(looping: Looping, block: int) -> None:
    found = looping.run(["seven", "twelve thousand and one"], rows=2, block=block)
    longest = max(len(outcome.best.ids) for outcome in found.values())
    assert longest <= looping.stats.steps < longest + block


@pytest.mark.parametrize("poison", [1e30, -1e30, 3.0])
def test_what_stands_in_rows_without_a_sentence_changes_nothing(
    looping: Looping, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    texts = ["seven hundred", "one", "thirty thousand"]
    expected = looping.plain(texts)
    made: list[DeviceRows] = []

    def poisoned(self: OnnxBackend, capacity: Capacity) -> DeviceRows:
        rows = plain_rows(self, capacity)
        for value in rows._values.values():
            if value.data_type() == "tensor(float)":
                value.update_inplace(np.full(value.shape(), poison, np.float32))
        made.append(rows)
        return rows

    plain_rows = OnnxBackend._new_rows
    idle = IdleRows(lambda capacity: poisoned(looping.backend, capacity), HOST)
    monkeypatch.setattr(looping.backend, "_idle_rows", idle)
    found = looping.run(texts, rows=8, block=3)
    assert [found[index].best.ids for index in range(3)] == expected
    assert made[0].capacity.rows == 4  # one of them without a sentence


def test_a_longer_source_waits_for_empty_rows_and_gets_larger_ones(looping: Looping) -> None:
    texts = ["one", "two", " ".join(["ninety-nine"] * 20), "seven", " ".join(["forty"] * 30)]
    found = looping.run(texts, rows=2, block=4)
    assert [found[index].best.ids for index in range(len(texts))] == looping.plain(texts)


def test_sources_are_drawn_only_as_rows_fall_free(looping: Looping) -> None:
    drawn = 0

    def stream() -> Iterator[Sentence]:
        nonlocal drawn
        for source in looping.sources(["seven"] * 50):
            drawn += 1
            yield source

    plan, _ = looping.translator._model.plan(looping.options(4, None))
    outcomes = decode_in_blocks(looping.backend, stream(), plan, DecodeStats())
    next(outcomes)
    assert drawn <= 8
    assert len(list(outcomes)) == 49


def test_rows_that_were_given_back_serve_again(looping: Looping) -> None:
    with looping.backend.loop_rows(Capacity(2, 64, 32)) as first:
        pass
    with looping.backend.loop_rows(Capacity(2, 64, 32)) as again:
        assert again is first
        with looping.backend.loop_rows(Capacity(2, 64, 32)) as other:
            assert other is not first


def test_cancelling_ends_all_as_they_are_and_loses_none(looping: Looping) -> None:
    texts = [" ".join(["ninety-nine"] * 4)] * 9
    plan, _ = looping.translator._model.plan(looping.options(3, None))
    looks = iter([False, True])
    found = list(
        decode_in_blocks(
            looping.backend,
            iter(looping.sources(texts)),
            plan,
            DecodeStats(),
            block=2,
            cancelled=lambda: next(looks),
        )
    )
    whole = looping.plain(texts[:1])[0]
    assert sorted(outcome.sentence.number for outcome in found) == list(range(9))
    assert {outcome.reason(outcome.best) for outcome in found} == {"cancelled"}
    assert {outcome.best.ids for outcome in found} == {whole[:2], ()}


def test_a_translator_takes_this_way_where_the_backend_loops(looping: Looping, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["seven hundred", "", "one", "thirty thousand and four"]
    plain = looping.translator.translate(texts)
    scored = looping.translator.translate(texts, scores=True)
    begun = looping.translator.translate(texts, prefix="ein")
    monkeypatch.setattr(looping.backend, "loops", True)
    calls: list[Capacity] = []

    def noted(capacity: Capacity) -> AbstractContextManager[DeviceRows]:
        calls.append(capacity)
        return OnnxBackend.loop_rows(looping.backend, capacity)

    monkeypatch.setattr(looping.backend, "loop_rows", noted)
    translator = Translator(looping.translator._model)
    assert translator.translate(texts) == plain
    assert len(calls) == 1
    assert translator.translate(texts, scores=True) == scored  # log-probabilities need logits
    assert translator.translate(texts, prefix="ein") == begun
    assert len(calls) == 1


def test_several_devices_share_the_texts_and_keep_their_order(bundle: Path, looping: Looping) -> None:
    texts = [f"{WORDS[index % 8]} {WORDS[index % 5]}" for index in range(200)]
    plain = looping.translator.translate(texts)
    backends = [Looping(bundle).backend for _ in range(3)]
    for backend in backends:
        backend.loops = True
    several = Translator(LoadedModel(Bundle.open(bundle), *backends))
    assert several.translate(texts, rows=4, workers=1) == plain


class NoMemory:
    """Makes rows while there are few enough of them."""

    def __init__(self, backend: OnnxBackend, most: int) -> None:
        self.backend, self.most, self.tried = backend, most, list[int]()

    def __call__(self, capacity: Capacity) -> DeviceRows:
        self.tried.append(capacity.rows)
        if capacity.rows > self.most:
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")
        return self.backend._new_rows(capacity)


def test_out_of_memory_names_the_bytes_and_the_rows_that_fit_and_leaves_the_rest_usable(looping: Looping) -> None:
    idle = IdleRows(NoMemory(looping.backend, 16), HOST)
    names_both = pytest.raises(CapacityError, match=r"64 rows .* 12,345 bytes.* at most 16 rows")
    with names_both, idle.taken(Capacity(64, 64, 32), 12_345):
        pass
    with idle.taken(Capacity(8, 64, 32), 1) as rows:
        rows.run(1)
        assert rows.read().past_finished.all()


def test_another_fault_than_memory_is_not_taken_for_it() -> None:
    def broken(capacity: Capacity) -> DeviceRows:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"), IdleRows(broken, HOST).taken(Capacity(2, 2, 2), 1):
        pass


def test_idle_rows_do_not_advance(looping: Looping) -> None:
    with looping.backend.loop_rows(Capacity(3, 64, 32)) as rows:
        rows.write(LoopState.idle(rows.capacity, forced=0))
        rows.run(5)
        state = rows.read()
    assert state.past_lengths.tolist() == [0, 0, 0]
    assert state.past_finished.all()
