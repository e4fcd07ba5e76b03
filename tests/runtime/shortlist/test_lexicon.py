from __future__ import annotations

import importlib.util
import itertools
import math
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.shortlist import lexicon as module
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary
from kvx.runtime.shortlist.lexicon import (
    Coverage,
    Lexicon,
    LexiconOptions,
    Model1,
    ParallelIds,
    coverage,
    read_table,
    train,
)
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "artifacts" / "numbers-checkpoint"
SIZE = 6  # pieces on either side of the drawn texts

Pairs = list[tuple[list[int], list[int]]]
Oracle = dict[tuple[int | None, int], float]  # None is the null word

sentence = st.lists(st.integers(0, SIZE - 1), max_size=5)
pairs = st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6).filter(
    lambda drawn: any(source for source, _ in drawn) and any(target for _, target in drawn)
)


def parallel(text: Pairs) -> ParallelIds:
    sources, targets = ([np.array(one, np.int32) for one in side] for side in zip(*text, strict=True))
    return ParallelIds(sources, targets)


def probabilities(lexicon: Lexicon) -> Oracle:
    entries = zip(lexicon.sources.tolist(), lexicon.targets.tolist(), lexicon.probabilities.tolist(), strict=True)
    return {(source, target): probability for source, target, probability in entries}


def model_1(text: Pairs, iterations: int) -> tuple[Oracle, list[float]]:
    """Brown et al. (1993), model 1, as in the textbook: p(target | source), and the log-likelihood before each
    iteration.
    """
    probability: Oracle = defaultdict(lambda: 1 / SIZE)
    log_likelihoods = []
    for _ in range(iterations):
        expected: Oracle = defaultdict(float)
        log_likelihood = 0.0
        for source, target in text:
            for token in target:
                total = sum(probability[piece, token] for piece in (None, *source))
                log_likelihood += math.log(total / (len(source) + 1))
                for piece in (None, *source):
                    expected[piece, token] += probability[piece, token] / total
        of_source: dict[int | None, float] = defaultdict(float)
        for (piece, _), count in expected.items():
            of_source[piece] += count
        probability = {pair: count / of_source[pair[0]] for pair, count in expected.items()}
        log_likelihoods.append(log_likelihood)
    return {pair: value for pair, value in probability.items() if pair[0] is not None}, log_likelihoods


class TestModel1:
    @settings(deadline=None)
    @given(text=pairs, iterations=st.integers(1, 4), chunk=st.sampled_from([1, 3, 2**20]))
    def test_it_is_the_textbooks_em_however_the_text_is_cut(self, text: Pairs, iterations: int, chunk: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK_CELLS", chunk)
            model = Model1(parallel(text), SIZE, SIZE)
            log_likelihoods = [model.iterate() for _ in range(iterations)]
        expected, expected_log_likelihoods = model_1(text, iterations)
        assert probabilities(model.lexicon()) == pytest.approx(expected)
        assert log_likelihoods == pytest.approx(expected_log_likelihoods)

    @settings(deadline=None)
    @given(text=pairs)
    def test_the_likelihood_never_falls(self, text: Pairs) -> None:
        model = Model1(parallel(text), SIZE, SIZE)
        found = [model.iterate() for _ in range(12)]
        for before, after in itertools.pairwise(found):
            assert after >= before - 1e-9 * abs(before)

    @settings(deadline=None)
    @given(text=pairs, iterations=st.integers(1, 5))
    def test_the_targets_of_a_source_piece_share_out_one(self, text: Pairs, iterations: int) -> None:
        lexicon = train(parallel(text), SIZE, SIZE, iterations)
        sums = np.bincount(lexicon.sources, lexicon.probabilities, minlength=SIZE)
        seen = {piece for source, target in text for piece in source if target}
        assert sums.tolist() == pytest.approx([float(piece in seen) for piece in range(SIZE)])

    def test_it_finds_which_words_belong_together(self) -> None:
        german, english = ["das", "haus", "buch", "ein", "klein"], ["the", "house", "book", "a", "small"]
        text = ["das haus/the house", "das buch/the book", "ein buch/a book", "das klein haus/the small house"]
        text.append("ein klein buch/a small book")
        halves = (line.split("/") for line in text)
        ids = [([german.index(w) for w in de.split()], [english.index(w) for w in en.split()]) for de, en in halves]
        found = probabilities(train(parallel(ids), 5, 5, 10))
        for source in range(5):
            assert max(range(5), key=lambda target: found.get((source, target), 0)) == source

    def test_very_many_iterations_stay_probabilities(self) -> None:
        lexicon = train(parallel([([0, 1], [0, 1]), ([0], [0]), ([1, 2, 3], [1, 1, 3])]), 4, 4, 3000)
        assert ((lexicon.probabilities >= 0) & (lexicon.probabilities <= 1 + 1e-9)).all()

    def test_more_cells_than_the_limit_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = parallel([([0, 1, 2], [0, 1]), ([], [0])])  # 2 tokens with 3 pieces and null, 1 with null alone
        monkeypatch.setattr(module, "MOST_CELLS", 9)
        Model1(text, SIZE, SIZE)
        monkeypatch.setattr(module, "MOST_CELLS", 8)
        with pytest.raises(InputError, match=r"9 pairs of tokens .* at most 8"):
            Model1(text, SIZE, SIZE)


@pytest.mark.parametrize(
    ("sources", "targets", "says"),
    [
        ([[1]], [[1], [2]], "1 sources and 2 targets"),
        ([], [], "no word in the sources and targets"),
        ([[], []], [[1], [2]], "no word in the sources"),
        ([[1]], [[]], "no word in the targets"),
    ],
)
def test_text_that_is_not_parallel_is_refused(sources: list[list[int]], targets: list[list[int]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ParallelIds(*([np.array(one, np.int32) for one in side] for side in (sources, targets)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"iterations": 0, "per_source": -1, "frequent": 0}, "`iterations` is 0. `per_source` is -1. `frequent` is 0"),
        ({"least_probability": 1.5}, "`least_probability` is 1.5"),
        ({"iterations": 10_001, "frequent": 2**24 + 1}, "`iterations` is 10001. `frequent` is 16777217"),
        ({"least_probability": math.nan}, "`least_probability` is nan"),
    ],
)
def test_options_that_cannot_work_are_all_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        LexiconOptions(**options)


SOURCE, TARGET = Vocabulary(SIZE, 3, "5" * 64), Vocabulary(40, 3, "7" * 64)


def rows(shortlist: Shortlist) -> list[list[int]]:
    offsets, targets = shortlist.offsets.tolist(), shortlist.targets.tolist()
    return [targets[start:end] for start, end in itertools.pairwise(offsets)]


@given(
    entries=st.dictionaries(
        st.tuples(st.integers(0, SIZE - 1), st.integers(0, TARGET.size - 1)), st.sampled_from([0.0, 0.1, 0.2, 0.5])
    ),
    weights=st.lists(st.integers(0, 3), min_size=TARGET.size, max_size=TARGET.size),
    per_source=st.integers(1, 5),
    frequent=st.integers(1, 50),
    least=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_the_shortlist_has_the_best_targets_and_the_most_common_pieces(
    entries: dict[tuple[int, int], float], weights: list[int], per_source: int, frequent: int, least: float
) -> None:
    sources, targets = ([pair[side] for pair in entries] for side in (0, 1))
    lexicon = Lexicon(
        np.array(sources, np.int32),
        np.array(targets, np.int32),
        np.array([*entries.values()], np.float64),
        np.array(weights, np.float64),
    )
    options = LexiconOptions(per_source=per_source, frequent=frequent, least_probability=least)
    found = lexicon.shortlist(SOURCE, TARGET, options)
    for piece, row in enumerate(rows(found)):
        own = {target: value for (source, target), value in entries.items() if source == piece and value >= least}
        assert row == sorted(own, key=lambda target: (-own[target], target))[:per_source]
    common = sorted(filter(weights.__getitem__, range(TARGET.size)), key=lambda one: (-weights[one], one))
    assert found.frequent.tolist() == common[:frequent]
    assert (found.source_vocab, found.target_vocab) == (SOURCE, TARGET)


def test_coverage_counts_the_target_tokens_among_their_sentences_candidates() -> None:
    offsets, targets = np.array([0, 2, 3, 3, 3, 3, 3]), np.array([10, 11, 12], np.int32)
    shortlist = Shortlist(SOURCE, TARGET, offsets, targets, np.array([20], np.int32))
    text = parallel([([0], [10, 10, 12, 20]), ([1], [12, 11, 3]), ([], [9])])
    assert coverage(shortlist, text) == Coverage((4 + 3 + 2) / 3, 5 / 8)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    return SentencePiece(CHECKPOINT / "source.model"), SentencePiece(CHECKPOINT / "target.model")


@pytest.fixture(scope="module")
def numbers() -> ModuleType:
    """scripts/train_numbers.py"""
    specification = importlib.util.spec_from_file_location("numbers_script", ROOT / "scripts" / "train_numbers.py")
    assert specification
    assert specification.loader
    script = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = script  # where its dataclasses look for their annotations
    specification.loader.exec_module(script)
    return script


def number_text(script: ModuleType, chosen: Sequence[int], tokenizers: tuple[Tokenizer, Tokenizer]) -> ParallelIds:
    return ParallelIds.read(map(script.english, chosen), map(script.german, chosen), *tokenizers)


@pytest.fixture(scope="module")
def learnt(numbers: ModuleType, tokenizers: tuple[Tokenizer, Tokenizer]) -> Lexicon:
    text = number_text(numbers, random.Random(0).sample(numbers.split().training, 1000), tokenizers)
    return train(text, len(tokenizers[0]), len(tokenizers[1]), iterations=5)


class TestNumbers:
    @pytest.mark.parametrize(
        ("english", "german"),
        [("seven", "sieben"), ("hundred", "hundert"), ("ninety", "undneun"), ("twelve", "zw"), ("thirty", "dreißig")],
    )
    def test_the_best_target_of_a_number_word_is_its_translation(
        self, learnt: Lexicon, tokenizers: tuple[Tokenizer, Tokenizer], english: str, german: str
    ) -> None:
        source, target = tokenizers
        [piece] = source.encode(english)
        own = learnt.sources == piece
        best = learnt.targets[own][learnt.probabilities[own].argmax()]
        assert target.pieces([int(best)]) == (german,)

    def test_few_candidates_cover_numbers_that_were_never_seen(
        self, learnt: Lexicon, numbers: ModuleType, tokenizers: tuple[Tokenizer, Tokenizer]
    ) -> None:
        source, target = Vocabulary(len(tokenizers[0]), 3, "5" * 64), Vocabulary(len(tokenizers[1]), 3, "7" * 64)
        shortlist = learnt.shortlist(source, target, LexiconOptions(per_source=6, frequent=1))
        held_out = number_text(numbers, numbers.split().held_out[:500], tokenizers)
        found = coverage(shortlist, held_out)
        assert found.share >= 0.99
        assert found.candidates <= 0.25 * target.size


class TestTable:
    def test_an_entry_is_target_source_probability(self, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        source, target = tokenizers
        lines = ["sieben ▁seven 0.75", "hundert\t▁hundred\t1", "  und   ▁seven  2.5e-1 ", "zw ▁hundred 0"]
        found = read_table(lines, source, target)
        assert (found.entries, found.unknown, found.first_unknown) == (4, 0, None)
        entries = {
            (*source.pieces([cast("int", piece)]), *target.pieces([word])): value
            for (piece, word), value in probabilities(found.lexicon).items()
        }
        assert entries == {
            ("▁seven", "sieben"): 0.75,
            ("▁seven", "und"): 0.25,
            ("▁hundred", "hundert"): 1.0,
            ("▁hundred", "zw"): 0.0,
        }

    def test_how_common_a_target_is_comes_from_its_sources(self, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        lines = ["und ▁seven 0.4", "und ▁hundred 0.3", "sieben ▁seven 0.6", "zw ▁hundred 0.05"]
        vocabularies = [Vocabulary(len(one), 3, "0" * 64) for one in tokenizers]
        read = read_table(lines, *tokenizers)
        frequent = read.lexicon.shortlist(vocabularies[0], vocabularies[1], LexiconOptions(frequent=2)).frequent
        assert tokenizers[1].pieces(frequent.tolist()) == ("und", "sieben")

    def test_a_pair_that_comes_again_counts_once_with_its_best(self, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        found = read_table(["und ▁seven 0.2", "und ▁seven 0.5", "und ▁seven 0.3"], *tokenizers)
        assert found.lexicon.probabilities.tolist() == [0.5]

    def test_null_words_and_unknown_pieces_are_passed_over(self, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        lines = ["NULL ▁seven 0.9", "und NULL 0.9", "sieben ▁seven 0.5", "Sieben ▁seven 0.3", "und ▁hundred 0.1"]
        found = read_table([*lines, "und ▁zillion 1"], *tokenizers)
        assert found.lexicon.probabilities.tolist() == [0.1, 0.5]
        assert (found.entries, found.unknown, found.first_unknown) == (4, 2, 4)

    def test_a_table_of_other_pieces_is_refused(self, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        lines = ["sieben ▁seven 0.5", "Haus house 0.5", "Buch book 0.5"]
        with pytest.raises(InputError, match=r"Line 2: .* do not know .* 2 of 3 entries"):
            read_table(lines, *tokenizers)

    @pytest.mark.parametrize("lines", [[], ["NULL NULL 1"]])
    def test_a_table_without_an_entry_is_refused(
        self, tokenizers: tuple[Tokenizer, Tokenizer], lines: list[str]
    ) -> None:
        with pytest.raises(InputError, match="0 of 0 entries"):
            read_table(lines, *tokenizers)

    @pytest.mark.parametrize(
        "line",
        [
            "",
            "und ▁seven",
            "und ▁seven 0.5 0.5",
            "und ▁seven\u00a00.5",
            *(f"und ▁seven {number}" for number in ("x", "nan", "inf", "1.1", "-0.1")),
        ],
    )
    def test_any_other_line_is_refused_by_its_number(self, tokenizers: tuple[Tokenizer, Tokenizer], line: str) -> None:
        with pytest.raises(InputError, match=r"Line 2: .*target source probability"):
            read_table(["sieben ▁seven 0.5", line], *tokenizers)

    def test_a_table_over_the_limit_is_refused(
        self, tokenizers: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MOST_ENTRIES", 2)
        assert read_table(["und ▁seven 0.5"] * 2, *tokenizers).entries == 2
        with pytest.raises(InputError, match=r"Line 3: .* at most 2 lines"):
            read_table(["und ▁seven 0.5"] * 3, *tokenizers)

    def test_a_piece_may_hold_white_space_that_is_not_ascii(self) -> None:
        class Odd:
            def __len__(self) -> int:
                return 2

            def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
                return tuple(("a\u3000b", "\u00a0")[one] for one in ids)

        odd = cast("Tokenizer", Odd())
        found = read_table(["a\u3000b \u00a0 0.5"], odd, odd)
        assert probabilities(found.lexicon) == {(1, 0): 0.5}
