"""sentencepiece with a vocabulary file: ids of another model, strictly read."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.runtime.bundle.vocabulary import MOST_BYTES, Vocabulary
from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.tokenizers.vocabulary import SentencePieceVocabulary, tidied

WORDS = ["a", "cat", "sat", "on", "the", "mat", "und", "eine", "Katze", "saß", "auf", "der", "Matte", "кот"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=5)) for _ in range(200)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    path = tmp_path_factory.mktemp("vocabulary") / "source.spm"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def tokenizer(model: Path, processor: sentencepiece.SentencePieceProcessor) -> SentencePieceVocabulary:
    """Its pieces backwards, after eos and unk, with a hole, a piece of another model and a language at the end."""
    names = [processor.id_to_piece(one) for one in range(3, processor.get_piece_size())]
    pieces = ("</s>", "<unk>", *reversed(names), None, "日本", "{}", ">>fra<<")
    special = frozenset({0, 1, len(pieces) - 2, len(pieces) - 1})
    return opened(model, Vocabulary(pieces, special, 1))


def opened(model: Path, vocabulary: Vocabulary) -> SentencePieceVocabulary:
    path = model.with_suffix(".json")
    path.write_bytes(vocabulary.to_bytes())
    return SentencePieceVocabulary(model, path)


def test_ids_are_those_of_the_file(
    tokenizer: SentencePieceVocabulary, processor: sentencepiece.SentencePieceProcessor
) -> None:
    pieces = tokenizer.surfaces("the cat sat")
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.pieces(ids) == pieces
    assert ids != processor.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat"
    assert [tokenizer.piece_id(piece) for piece in pieces] == ids
    assert len(tokenizer) == processor.get_piece_size() + 3


def test_what_sentencepiece_does_not_know_may_be_a_piece(tokenizer: SentencePieceVocabulary) -> None:
    ids = tokenizer.encode("the 日本 cat")
    assert tokenizer.piece_id("日本") in ids
    assert tokenizer.unknown_id not in ids
    assert tokenizer.encode("日")[-1] == tokenizer.unknown_id
    assert tokenizer.unknown_surfaces("日 the 中") == ["日", "中"]


@pytest.mark.parametrize("text", ["</s>", ">>fra<<", "<unk>", "a </s> b", "{}", "a {} b"])
def test_a_special_piece_spelled_out_is_text(tokenizer: SentencePieceVocabulary, text: str) -> None:
    """Also where none of its characters is known, so that sentencepiece gives them as one piece."""
    special = {0, len(tokenizer) - 2, len(tokenizer) - 1}
    assert not special.intersection(tokenizer.encode(text))


def test_special_pieces_and_ids_without_a_piece_vanish(tokenizer: SentencePieceVocabulary) -> None:
    ids = tokenizer.encode("the cat")
    hole = len(tokenizer) - 4
    assert tokenizer.pieces([hole, len(tokenizer) + 5, -1]) == ("", "", "")
    assert tokenizer.decode([len(tokenizer) - 1, ids[0], hole, 1, *ids[1:], 0, 10**9, -3]) == "the cat"
    assert tokenizer.join([">>fra<<", *tokenizer.pieces(ids), "</s>"]) == "the cat"


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4))).map(" ".join))
def test_surfaces_are_one_for_each_id(tokenizer: SentencePieceVocabulary, text: str) -> None:
    ids, surfaces = tokenizer.encode(text), tokenizer.surfaces(text)
    assert len(ids) == len(surfaces)
    for one, surface in zip(ids, surfaces, strict=True):
        assert tokenizer.unknown_id == one or tokenizer.piece_id(surface) == one
    assert all(0 <= one < len(tokenizer) for one in ids)


def test_spaces_are_dropped_where_the_vocabulary_says_so(model: Path, tokenizer: SentencePieceVocabulary) -> None:
    pieces = tuple(tokenizer.pieces(range(len(tokenizer) - 4)))
    tidy = opened(model, Vocabulary((*pieces, "▁.", "▁n't"), frozenset({0, 1}), 1, tidy=True))
    assert tidy.join(["▁cat", "▁.", "▁n't"]) == "cat.n't"
    assert tidied("it 's a ' b ' c") == "it's a'b'c"


GOOD = {
    "format": "kvx-vocabulary-1",
    "pieces": ["</s>", "<unk>", None, "a"],
    "special": [0],
    "unknown": 1,
    "tidy": False,
}


def test_a_vocabulary_reads_what_it_wrote() -> None:
    held = Vocabulary(("</s>", "<unk>", None, "▁ä"), frozenset({0, 1}), 1, tidy=True)
    assert Vocabulary.from_bytes(held.to_bytes()) == held
    assert Vocabulary.from_bytes(json.dumps(GOOD).encode()).pieces[2] is None


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": []},
        {"pieces": ["a", "a"]},
        {"pieces": ["a", 3]},
        {"pieces": ["a", ["b"]]},
        {"pieces": {"a": 1}},
        {"pieces": "abcd"},
        {"pieces": 7},
        {"pieces": ["</s>", "\ud800", "a"]},
        {"special": [9]},
        {"special": [-1]},
        {"special": [2]},
        {"special": [True]},
        {"special": [0.0]},
        {"special": ["</s>"]},
        {"special": [[0]]},
        {"special": 1},
        {"unknown": 2},
        {"unknown": 4},
        {"unknown": -1},
        {"unknown": True},
        {"unknown": None},
        {"unknown": "<unk>"},
        {"tidy": 1},
        {"tidy": None},
        {"format": "kvx-vocabulary-2"},
        {"more": 1},
    ],
    ids=str,
)
def test_wrong_values_are_refused(change: dict[str, object], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(GOOD | change), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"vocabulary\.json is no vocabulary"):
        SentencePieceVocabulary(model, path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"null", b"[" * 200_000, b"[1]", b"{}"], ids=len)
def test_garbage_is_refused(content: bytes, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"vocabulary\.json is no vocabulary"):
        SentencePieceVocabulary(model, path)


def test_a_huge_file_is_not_read(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(TokenizerError, match="larger than"):
        SentencePieceVocabulary(model, path)


def test_files_that_are_missing_or_no_models_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nothing"):
        SentencePieceVocabulary(tmp_path / "nothing", model)
    with pytest.raises(TokenizerError, match="nothing"):
        SentencePieceVocabulary(model, tmp_path / "nothing")
    (tmp_path / "garbage").write_bytes(b"garbage")
    with pytest.raises(TokenizerError, match="garbage"):
        SentencePieceVocabulary(tmp_path / "garbage", model)
