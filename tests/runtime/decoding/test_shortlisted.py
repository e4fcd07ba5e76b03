"""Decoding by a shortlist: every sentence as eager PyTorch gives it alone, with all but its candidates at −∞."""

from __future__ import annotations

import shutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the oracle is eager PyTorch")

from kvx import BundleError, InputError, OptionError, TranslateOptions, Translation, Translator
from kvx.models.eager import TorchBackend
from kvx.models.importers import load_checkpoint
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import LanguageIds
from kvx.runtime.bundle.manifest import PROJECTION_FILE
from kvx.runtime.decoding.backend import ShortlistStep, Step, StepOutput, shortlisting_of
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, Hypothesis, Sentence
from kvx.runtime.decoding.rows import Rows, Seat
from kvx.runtime.decoding.search import BeamSearch, Greedy, Search
from kvx.runtime.decoding.shortlisted import COLUMNS, LEAST_COLUMNS, SPARE, Columns, ShortlistedStep
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary

CHECKPOINT = Path(__file__).resolve().parents[3] / "artifacts" / "numbers-checkpoint" / "model.pt"
WORDS = ["one", "two", "seven", "twelve", "thirty-one", "eighty", "hundred", "thousand", "and"]
TEXTS = [" ".join(WORDS[(number * 5 + i * 2) % len(WORDS)] for i in range(1 + number % 6)) for number in range(40)]
LIMIT = 12
FLOAT32_NOISE = 2e-5

Candidates = IntArray | None


@pytest.fixture(scope="module")
def translator(shortlist_bundle: Path) -> Translator:
    return Translator.load(shortlist_bundle, threads=1)


def vocabularies(translator: Translator) -> tuple[Vocabulary, Vocabulary]:
    return Vocabulary.of(translator.manifest, "source"), Vocabulary.of(translator.manifest, "target")


def make(translator: Translator, rows: Sequence[Sequence[int]], frequent: Sequence[int] = ()) -> Shortlist:
    offsets = np.cumsum([0, *map(len, rows)])
    targets = np.array([one for row in rows for one in row], np.int32)
    return Shortlist(*vocabularies(translator), offsets, targets, np.array(frequent, np.int32))


def drawn(translator: Translator, seed: int, *, known: float = 1.0) -> Shortlist:
    """Some targets for each source piece by chance, for a share of the pieces."""
    random = np.random.default_rng(seed)
    source, target = vocabularies(translator)
    rows = [
        random.choice(target.size, random.integers(1, 9), replace=False).tolist() if random.random() < known else []
        for _ in range(source.size)
    ]
    return make(translator, rows, random.choice(target.size, 6, replace=False).tolist())


@pytest.fixture
def everything(translator: Translator, tmp_path: Path) -> Path:
    """A file with all target pieces for each source piece."""
    source, target = vocabularies(translator)
    make(translator, [[0]] * source.size, range(target.size)).write(tmp_path / "everything.npz")
    return tmp_path / "everything.npz"


@pytest.fixture
def some(translator: Translator, tmp_path: Path) -> Path:
    """A file that knows most pieces."""
    drawn(translator, 7, known=0.9).write(tmp_path / "some.npz")
    return tmp_path / "some.npz"


def ids_of(translations: Sequence[Translation]) -> list[list[tuple[int, ...]]]:
    return [[one.ids, *(other.ids for other in one.others)] for one in translations]


class Masked(TorchBackend):
    """Eager for one sentence: logits of what is no candidate of it are −∞."""

    candidates: Candidates = None

    def bind(self, cache: KVCache) -> Step:
        step, candidates = super().bind(cache), self.candidates

        def masked(input_ids: IntArray) -> StepOutput:
            output = step(input_ids)
            if candidates is None:
                return output
            logits = np.full_like(output.logits, -np.inf)
            logits[:, candidates] = output.logits[:, candidates]
            return output._replace(logits=logits)

        return masked


class Oracle:
    """What each sentence is by itself, to the ids and their log-probabilities."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator
        self.eager = Masked(load_checkpoint(CHECKPOINT).model)
        self._found: dict[object, tuple[Hypothesis, ...]] = {}

    def plan(self, rows: int, beams: int) -> Plan:
        specs = self.translator._model.backend.cache_specs
        return Plan.of(self.translator.manifest, specs, rows=rows * beams, max_new_tokens=LIMIT, beams=beams)

    def source(self, index: int, text: str, given: tuple[int, ...] = ()) -> Sentence:
        return Sentence(index, self.translator._model.sources.read_one(text, index, "truncate").ids, (given,))

    def alone(self, source: Sentence, search: Search, candidates: tuple[int, ...] | None) -> tuple[Hypothesis, ...]:
        key = source.ids, source.targets, search, candidates
        if key not in self._found:
            self.eager.candidates = None if candidates is None else np.array(candidates)
            (outcome,) = decode(self.eager, [source], search, self.plan(1, search.beams), scored=True)
            self._found[key] = outcome.hypotheses
        return self._found[key]

    def check(self, shortlist: Shortlist, sources: Sequence[Sentence], search: Search, rows: int) -> DecodeStats:
        stats = DecodeStats()
        plan, backend = self.plan(rows, search.beams), self.translator._model.backend
        known = [one for one in sources if shortlist.knows(one.ids)]
        others = [one for one in sources if not shortlist.knows(one.ids)]
        found = {
            outcome.sentence.number: outcome.hypotheses
            for some, candidates in ((known, shortlist), (others, None))
            for outcome in decode(backend, some, search, plan, stats, scored=True, candidates=candidates)
        }
        for source in sources:
            candidates = plain_candidates(shortlist, source)
            expected = self.alone(source, search, candidates)
            assert [one.ids for one in found[source.number]] == [one.ids for one in expected]
            for got, wanted in zip(found[source.number], expected, strict=True):
                assert got.log_probabilities == pytest.approx(wanted.log_probabilities, abs=1e-4)
                if candidates is not None:
                    assert set(got.ids) <= set(candidates)
        return stats


def plain_candidates(shortlist: Shortlist, source: Sentence) -> tuple[int, ...] | None:
    """By the definition: the pieces' targets, the frequent ones, eos and what is given; all where a piece has none."""
    pieces, offsets = source.ids[1:-1], shortlist.offsets
    rows = [shortlist.targets[offsets[piece] : offsets[piece + 1]].tolist() for piece in pieces]
    if not all(rows):
        return None
    ends = [
        shortlist.targets[offsets[piece] : offsets[piece + 1]].tolist() for piece in (source.ids[0], source.ids[-1])
    ]
    always = {shortlist.target_vocab.eos, *shortlist.frequent.tolist(), *source.targets[0]}
    return tuple(sorted(always.union(*rows, *ends)))


@pytest.fixture(scope="module")
def oracle(translator: Translator) -> Oracle:
    return Oracle(translator)


class TestAnswers:
    @pytest.mark.parametrize(
        "options",
        [
            TranslateOptions(),
            TranslateOptions(rows=3, workers=2, window=8),
            TranslateOptions(beam_size=4, n_best=3),
            TranslateOptions(samples=2, seed=3, top_p=0.9),
            TranslateOptions(scores=True, no_repeated_ngrams=2, suppress=("hundert",)),
        ],
        ids=["greedy", "workers", "beams", "samples", "constraints"],
    )
    def test_a_shortlist_of_everything_changes_nothing(
        self, translator: Translator, everything: Path, options: TranslateOptions
    ) -> None:
        plain = list(translator.translate_iter(TEXTS, options))
        with_list = list(translator.translate_iter(TEXTS, TranslateOptions(**_fields(options), shortlist=everything)))
        assert ids_of(with_list) == ids_of(plain)
        for one, other in zip(with_list, plain, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        texts=st.lists(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=14
        ),
        seed=st.integers(0, 30),
        known=st.sampled_from([1.0, 0.97, 0.8]),
        rows=st.integers(1, 9),
        beams=st.sampled_from([1, 1, 3]),
    )
    def test_each_sentence_is_what_eager_makes_of_its_own_candidates_whoever_is_beside_it(
        self, oracle: Oracle, texts: list[str], seed: int, known: float, rows: int, beams: int
    ) -> None:
        shortlist = drawn(oracle.translator, seed, known=known)
        search = Greedy() if beams == 1 else BeamSearch(size=beams, n_best=beams)
        sources = [oracle.source(index, text) for index, text in enumerate(texts)]
        stats = oracle.check(shortlist, sources, search, rows)
        listed = sum(plain_candidates(shortlist, source) is not None for source in sources)
        assert (stats.columns > 0) == (stats.listed_steps > 0) == (listed > 0)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_what_is_given_comes_though_no_list_has_it(self, oracle: Oracle, beams: int) -> None:
        shortlist = make(oracle.translator, [[20, 21]] * vocabularies(oracle.translator)[0].size)
        search = Greedy() if beams == 1 else BeamSearch(size=beams)
        sources = [oracle.source(index, text, (40 + index, 9)) for index, text in enumerate(TEXTS[:6])]
        oracle.check(shortlist, sources, search, rows=4)

    def test_a_prefix_of_the_options_comes_too(self, translator: Translator, tmp_path: Path) -> None:
        make(translator, [[20]] * vocabularies(translator)[0].size).write(tmp_path / "list.npz")
        for one in translator.translate(TEXTS[:5], shortlist=tmp_path / "list.npz", prefix=(40, 9), max_new_tokens=5):
            assert one.ids[:2] == (40, 9)
            assert set(one.ids[2:]) <= {20, 40, 9, translator.manifest.framing.eos}

    def test_alternatives_are_candidates(self, translator: Translator, some: Path) -> None:
        found = translator.alternatives("twelve", "", 3, TranslateOptions(shortlist=some))
        plain = translator.alternatives("twelve", "", 3)
        assert len({one.ids[0] for one in found}) == 3
        assert [one.ids for one in found] != [one.ids for one in plain]

    def test_given_targets_are_not_scored_by_a_part(self, translator: Translator, some: Path) -> None:
        with pytest.raises(OptionError, match=r"`shortlist` is .*, but translations are scored"):
            translator.score(["one", "twelve"], ["eins", "zwölf"], TranslateOptions(shortlist=some))


class TestFallback:
    def test_a_sentence_with_an_unknown_piece_is_translated_as_without_and_counted(
        self, translator: Translator, tmp_path: Path
    ) -> None:
        reader = Oracle(translator)
        known = set(reader.source(0, "one seven").ids)
        rows = [[20, 21] if piece in known else [] for piece in range(vocabularies(translator)[0].size)]
        make(translator, rows).write(tmp_path / "list.npz")
        stats, texts = DecodeStats(), ["one", "twelve", "seven one", "eighty", "one seven"]
        options = TranslateOptions(shortlist=tmp_path / "list.npz", workers=1, max_new_tokens=LIMIT)
        found = list(translator.translate_iter(texts, options, stats))
        plain = translator.translate(texts, max_new_tokens=LIMIT)
        assert stats.fallbacks == 2
        assert [one.ids for one in found][1::2] == [one.ids for one in plain][1::2]
        assert all(set(one.ids) <= {20, 21, translator.manifest.framing.eos} for one in found[::2])

    def test_a_window_of_one_answers_every_text_before_it_reads_the_next(
        self, translator: Translator, some: Path
    ) -> None:
        taken = 0

        def feed() -> Iterator[str]:
            nonlocal taken
            for text in TEXTS:
                taken += 1
                yield text

        options = TranslateOptions(shortlist=some, window=1)
        for answered, _ in enumerate(translator.translate_iter(feed(), options), 1):
            assert taken == answered

    def test_control_pieces_need_no_row(self, translator: Translator) -> None:
        framing = translator.manifest.framing
        bos, eos = framing.source_ids((), LanguageIds())
        rows = [[] if piece in (bos, eos) else [20] for piece in range(vocabularies(translator)[0].size)]
        shortlist = make(translator, rows)
        assert shortlist.knows((bos, 9, 10, eos))
        assert shortlist.knows((bos, eos))
        assert not shortlist.knows((bos, 9, bos, eos))


class TestRefusals:
    def test_a_bundle_without_the_graph(self, numbers_translator: Translator, everything: Path) -> None:
        with pytest.raises(OptionError, match="`n_best` is 2, but there are no beams") as caught:
            TranslateOptions(n_best=2, shortlist=everything)
        with pytest.raises(
            OptionError, match=r"`shortlist` does not work with the onnx backend.*exported with a shortlist"
        ):
            numbers_translator.translate(["one"], shortlist=everything)
        with pytest.raises(
            OptionError, match=r"`top_k` is 1000\. `shortlist` does not work .*; the onnx backend"
        ) as caught:
            numbers_translator.translate(["one"], shortlist=everything, samples=1, top_k=1000)
        assert caught.value.remedy

    def test_a_backend_without_such_steps(self, shortlist_bundle: Path, everything: Path) -> None:
        eager = Translator(LoadedModel(Bundle.open(shortlist_bundle), TorchBackend(load_checkpoint(CHECKPOINT).model)))
        with pytest.raises(OptionError, match="with the torch backend"):
            eager.translate(["one"], shortlist=everything)

    def test_a_file_for_other_tokenizers_or_none_at_all(self, translator: Translator, tmp_path: Path) -> None:
        source, target = vocabularies(translator)
        other = Vocabulary(source.size, source.eos, "0" * 64)
        rows = np.zeros(source.size + 1, np.int64), np.zeros(0, np.int32), np.array([4], np.int32)
        Shortlist(other, target, *rows).write(tmp_path / "other.npz")
        for name in ("other.npz", "none.npz"):
            with pytest.raises(InputError, match=name):
                translator.translate_iter(["one"], TranslateOptions(shortlist=tmp_path / name))

    def test_a_file_is_read_again_only_where_it_has_changed(
        self, translator: Translator, everything: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = translator.translate(["twelve"], shortlist=everything)
        with monkeypatch.context() as reading:
            reading.setattr(Shortlist, "read", lambda *_, **__: pytest.fail("read again"))
            assert translator.translate(["twelve"], shortlist=str(everything)) == first
        everything.write_bytes(b"")
        with pytest.raises(InputError, match=everything.name):
            translator.translate(["twelve"], shortlist=everything)

    @pytest.mark.parametrize("change", ["gone", "cut", "flat", "doubles", "objects"])
    def test_a_projection_that_is_not_the_models(self, shortlist_bundle: Path, tmp_path: Path, change: str) -> None:
        folder = shutil.copytree(shortlist_bundle, tmp_path / "bundle")
        translator = Translator.load(folder, threads=1)
        path, rows = folder / PROJECTION_FILE, np.load(folder / PROJECTION_FILE)
        path.unlink()
        if change == "cut":
            path.write_bytes((shortlist_bundle / PROJECTION_FILE).read_bytes()[:-1])
        elif change != "gone":
            arrays: dict[str, Any] = {"flat": rows.ravel(), "doubles": rows.astype(np.float64), "objects": None}
            np.save(path, np.array([{}]) if change == "objects" else arrays[change])
        shortlisting = shortlisting_of(translator._model.backend)
        assert shortlisting is not None
        with pytest.raises(BundleError, match=PROJECTION_FILE):
            _ = shortlisting.projection

    def test_a_projection_that_was_altered_is_found_as_it_is_loaded(
        self, shortlist_bundle: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(shortlist_bundle, tmp_path / "bundle")
        content = bytearray((folder / PROJECTION_FILE).read_bytes())
        content[-1] ^= 1
        (folder / PROJECTION_FILE).write_bytes(content)
        with pytest.raises(BundleError, match=PROJECTION_FILE):
            Translator.load(folder)


VOCABULARY, WIDTH = 700, 5
WHOLE: FloatArray = np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
listed = st.lists(st.integers(0, VOCABULARY - 1), max_size=400).map(lambda ids: np.unique(np.array(ids, np.int64)))


class Hidden:
    """Steps without a model: every row has a hidden state of its own."""

    projection = WHOLE
    cache_specs = ()

    def __init__(self, rows: int) -> None:
        self.states = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)

    def bind(self, cache: KVCache) -> ShortlistStep:
        return lambda ids, projection: StepOutput(self.states[: len(ids)] @ projection.T)


class TestSteps:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.lists(listed, min_size=1, max_size=5), max_size=8), st.sampled_from([1, 3]))
    def test_rows_have_the_logits_of_their_candidates_and_no_others_however_seats_change(
        self, turns: list[list[IntArray]], beams: int
    ) -> None:
        rows, hidden, stats = types.SimpleNamespace(), Hidden(5 * beams), DecodeStats()
        rows.cache, rows.seats, rows.beams, rows.tokens = None, [], beams, np.zeros((5 * beams, 1))
        step = ShortlistedStep(hidden, cast("Rows", rows), stats)
        for turn in turns:
            rows.seats = [
                Seat(Sentence(index, (1,)), 0, None, None, candidates) for index, candidates in enumerate(turn)
            ]
            for _ in range(2):
                n = len(turn) * beams
                logits = step(np.zeros(n, np.int64)).logits
                expected = np.full((n, VOCABULARY), -np.inf, np.float32)
                for row in range(n):
                    ids = turn[row // beams]
                    expected[row, ids] = (hidden.states[row] @ WHOLE.T)[ids]
                np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32_NOISE)

    @given(st.lists(listed, max_size=12))
    def test_columns_hold_what_is_needed_and_little_more(self, turns: list[IntArray]) -> None:
        columns = Columns(WHOLE)
        for ids in turns:
            columns.hold(ids)
            assert (columns.projection[columns.of[ids]] == WHOLE[ids]).all()
            assert (np.sort(columns.of[columns.of >= 0]) == np.arange(columns.count)).all()
            assert columns.count <= SPARE * len(ids) + COLUMNS
            assert len(columns.projection) % COLUMNS == 0
            assert len(columns.projection) >= max(LEAST_COLUMNS, columns.count)

    def test_nothing_is_copied_where_nothing_is_missing(self) -> None:
        whole = WHOLE.copy()
        columns = Columns(whole)
        columns.hold(np.arange(0, 600, 2))
        before = columns.projection
        whole[:] = np.nan
        columns.hold(np.arange(0, 590, 2))
        assert columns.projection is before
        assert np.isfinite(columns.projection).all()
        columns.hold(np.array([*range(0, 590, 2), 3, 5, 699]))
        assert np.flatnonzero(np.isnan(columns.projection).any(axis=1)).tolist() == [300, 301, 302]


def _fields(options: TranslateOptions) -> dict[str, Any]:
    named = {name: getattr(options, name) for name in TranslateOptions.__dataclass_fields__}
    return {name: value for name, value in named.items() if name != "shortlist"}
