"""Logits that are not finite fail the sentence that has them, and no other."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvx import BeamSearch, Greedy, InputError, Sampling, Translation, Translator
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.decoding.decode import decode, score
from kvx.runtime.decoding.device_loop import LoopState, decode_in_blocks
from kvx.runtime.decoding.filters import Filters, Suppress
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.options import TranslateOptions
from kvx.runtime.translation import strict_json
from kvx.tests.runtime.decoding.test_search import EOS, FakeBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx.runtime.decoding.search import Search

BAD = 66  # the source that the fake model cannot count
SOURCES = [(5, 6), (7, BAD), (8,), (BAD,), (9, 4, 3), (3,), (4, 4)]
FAILING = {number for number, source in enumerate(SOURCES) if BAD in source}
TEXTS = ["twelve", "seven", "thirty thousand", "one", "seven hundred", "two", "ninety-nine"]
GOOD = [text for text in TEXTS if "seven" not in text]
SEARCHES = [Greedy(), BeamSearch(3, n_best=2), Sampling(2, seed=1, top_p=0.9), Sampling(seed=1)]
OPTIONS = {
    "greedy": TranslateOptions(),
    "greedy with scores": TranslateOptions(scores=True),
    "beams": TranslateOptions(beam_size=3, n_best=2, scores=True),
    "samples": TranslateOptions(samples=2, seed=1, scores=True),
    "nucleus": TranslateOptions(samples=1, top_p=0.9, top_k=5, seed=1),
    "a limit and a prefix": TranslateOptions(prefix=(40,), max_new_tokens=4, suppress=(41,)),
    "two workers": TranslateOptions(workers=2, rows=4),
}


class Breaking(FakeBackend):
    """Gives `value` in the row of a bad source from its second token on, and leaves it in the cache."""

    def __init__(self, value: float, *, shared: bool = False, everywhere: bool = True) -> None:
        super().__init__(30, shared=shared)
        plain = self.logits

        def logits(source: tuple[int, ...], target: tuple[int, ...]) -> FloatArray:
            found = plain(source, target)
            if BAD in source and len(target) > 1:
                found = found.copy()
                found[:] = np.where(everywhere | (np.arange(30) == 11), value, found)
            return found

        self.logits = logits


def by_number(outcomes: Iterator[Outcome]) -> dict[tuple[int, int], Outcome]:
    return {(outcome.sentence.number, outcome.target): outcome for outcome in outcomes}


def sources(targets: tuple[tuple[int, ...], ...] = ((),)) -> list[Sentence]:
    return [Sentence(number, ids, targets) for number, ids in enumerate(SOURCES)]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("value", "everywhere"), [(np.nan, True), (np.nan, False), (np.inf, False), (-np.inf, True)])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_fails_the_seat_whose_logits_are_not_finite_and_finds_the_same_for_its_neighbours(
    search: Search, value: float, everywhere: bool, shared: bool, scored: bool
) -> None:
    breaking, whole = Breaking(value, shared=shared, everywhere=everywhere), FakeBackend(30, shared=shared)
    targets = ((),) * search.samples
    plan = whole.plan(beams=search.beams, seats=3, limit=9)
    found = by_number(decode(breaking, sources(targets), search, plan, scored=scored))
    expected = by_number(decode(whole, sources(targets), search, plan, scored=scored))
    assert found.keys() == expected.keys()
    for place, outcome in found.items():
        if place[0] not in FAILING:
            assert outcome.hypotheses == expected[place].hypotheses
            assert not outcome.failed
        elif expected[place].best.ids[0] != EOS:
            assert outcome.failed
            assert (outcome.best.ids, outcome.reason(outcome.best)) == ((), "failed")


def test_what_filters_forbid_is_no_failure_but_a_score_without_a_number_is() -> None:
    everything = Filters([Suppress(tuple(range(30)))])
    whole = FakeBackend(30)
    plan = whole.plan(beams=1, seats=3, limit=3)
    for search in (Greedy(), Sampling(seed=1)):
        assert not any(one.failed for one in decode(whole, sources(), search, plan, filters=everything))
    hidden, hides = Breaking(np.inf, everywhere=False), Filters([Suppress((11, EOS))])
    plain = by_number(decode(hidden, sources(), Greedy(), plan, filters=hides))
    scored = by_number(decode(hidden, sources(), Greedy(), plan, filters=hides, scored=True))
    assert not any(outcome.failed for outcome in plain.values())
    assert {number for (number, _), outcome in scored.items() if outcome.failed} == FAILING


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scoring_fails_the_target_whose_logits_are_not_finite(value: float) -> None:
    fixed = ((5, 6, 7, EOS), (9, EOS))
    whole = FakeBackend(30)
    plan = whole.plan(beams=1, seats=3, limit=4)
    found = by_number(score(Breaking(value, everywhere=False), plan, sources(fixed)))
    expected = by_number(score(whole, plan, sources(fixed)))
    assert {number for (number, _), outcome in found.items() if outcome.failed} == FAILING
    for place, outcome in found.items():
        assert outcome.failed or outcome.hypotheses == expected[place].hypotheses


def test_what_a_failed_sentence_leaves_in_the_cache_is_finite() -> None:
    backend = FakeBackend(30)
    cache = KVCache(backend.cache_specs, Capacity(3, 4, 2))
    for buffer in cache.buffers.values():
        buffer[:] = np.nan
    cache.clear(1)
    for buffer in cache.buffers.values():
        assert [bool(np.isfinite(row).all()) for row in buffer] == [False, True, False]


class BlockRows:
    """Rows that give three tokens and then eos, and to a bad source none after the first."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.bad = np.zeros(capacity.rows, bool)
        self.tainted = np.zeros(capacity.rows, bool)
        self.spoilt = False

    def encode(self, row: int, input_ids: IntArray, source_lengths: IntArray) -> None:
        rows = slice(row, row + len(input_ids))
        assert not self.tainted[rows].any(), "a row with what is not finite in it is taken again"
        self.bad[rows] = (input_ids == BAD).any(axis=-1)

    def write(self, state: LoopState) -> None:
        self.state = state

    def run(self, steps: int) -> None:
        state = self.state
        for _ in range(steps):
            for row in np.flatnonzero(~state.past_finished).tolist():
                length = state.past_lengths[row]
                if self.bad[row] and length == 1:
                    state.past_finished[row] = self.tainted[row] = True
                    continue
                state.past_ids[row, length] = EOS if length == 3 else 20
                state.past_lengths[row] += 1
                state.past_finished[row] = length == 3

    def read(self) -> LoopState:
        return self.state

    def spoil(self) -> None:
        self.spoilt = True


class BlockBackend:
    """Counts the rows that it makes."""

    loops = True

    def __init__(self) -> None:
        self.made: list[BlockRows] = []

    @contextmanager
    def loop_rows(self, capacity: Capacity) -> Iterator[BlockRows]:
        self.made.append(BlockRows(capacity))
        yield self.made[-1]

    def loop_bytes(self, capacity: Capacity) -> int:
        return 1


@pytest.mark.parametrize("seats", [1, 2, 3, 8])
def test_a_looped_step_fails_the_row_that_stops_too_early_and_never_seats_another_in_it(seats: int) -> None:
    backend, plan = BlockBackend(), FakeBackend(30).plan(beams=1, seats=seats, limit=9)
    found = by_number(decode_in_blocks(backend, sources(), plan, DecodeStats()))
    assert {number for (number, _), outcome in found.items() if outcome.failed} == FAILING
    assert {outcome.best.ids for outcome in found.values() if not outcome.failed} == {(20, 20, 20, EOS)}
    assert [rows.spoilt for rows in backend.made] == [bool(rows.tainted.any()) for rows in backend.made]


@pytest.fixture(scope="module", params=["overflow", "nan"])
def broken(request: pytest.FixtureRequest, numbers_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, whose embedding of the source piece "seven" is no number, or overflows in the layers after it."""
    onnx = pytest.importorskip("onnx")
    translator = Translator.load(numbers_bundle, threads=1)
    _, token, _ = translator._model.sources.read_one("seven", 1).ids
    folder = Path(shutil.copytree(numbers_bundle, tmp_path_factory.mktemp("broken") / "bundle"))
    size = translator.manifest.model["source_vocab_size"]
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False).graph
    (table,) = [one for one in graph.initializer if one.name == "model.source_embedding.tokens.weight"]
    data = {entry.key: entry.value for entry in table.external_data}
    path = folder / data["location"]
    content = bytearray(path.read_bytes())
    weights = np.frombuffer(content, np.float32, size * table.dims[1], int(data["offset"])).reshape(size, -1)
    weights[token] = np.nan if request.param == "nan" else 1e38
    path.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_texts_without_numbers_fail_by_name_after_all_others_have_their_translations(
    broken: Path, options: TranslateOptions, caplog: pytest.LogCaptureFixture
) -> None:
    translator, found = Translator.load(broken, threads=1), list[Translation]()
    with pytest.raises(InputError) as error:
        found.extend(translator.translate_iter(TEXTS, options))
    assert str(error.value).startswith("Line 2: The model, in fp32, gives numbers for this text that are not finite.")
    assert error.value.line == 2
    assert [one.finish_reason == "failed" for one in found] == ["seven" in text for text in TEXTS]
    assert {(one.text, one.ids) for one in found if one.finish_reason == "failed"} == {("", ())}
    assert [one for one in found if one.finish_reason != "failed"] == translator.translate(GOOD, options)
    assert [record.getMessage().split(":")[0] for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Line 2",
        "Line 5",
    ]
    assert all("NaN" not in strict_json(list(one.log_probabilities or ())) for one in found)


def test_scoring_and_alternatives_name_the_text_without_numbers(broken: Path) -> None:
    translator = Translator.load(broken, threads=1)
    with pytest.raises(InputError, match=r"^Line 2: The model, in fp32, gives numbers"):
        translator.score(["one", "seven"], ["eins", "sieben"])
    assert translator.score(["one"], ["eins"])[0].sum < 0
    with pytest.raises(InputError, match=r"^Line 9: The model, in fp32, gives numbers"):
        translator.alternatives("seven", "", number=9)


def test_json_has_null_in_place_of_what_is_no_number() -> None:
    form = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": float("-inf")}), "d": "x"}
    assert json.loads(strict_json(form)) == {"a": [1.5, None], "b": [None, {"c": None}], "d": "x"}
