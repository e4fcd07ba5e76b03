from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvx import InputError
from kvx.runtime.text.alignment import align, replace_unknown
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

UNKNOWN = 1
NUMBERS = Path(__file__).resolve().parents[3] / "artifacts" / "numbers-checkpoint"


@pytest.fixture(scope="module")
def tokenizer() -> SentencePiece:
    return SentencePiece(NUMBERS / "source.model")


def replaced(source: str, target: str, alignment: list[int]) -> str:
    """Pieces with spaces between, `?` for an unknown target token."""
    pieces = target.split()
    ids = [UNKNOWN if piece == "?" else 9 for piece in pieces]
    shown = ["<unk>" if piece == "?" else piece for piece in pieces]
    return replace_unknown(source.split(), shown, ids, UNKNOWN, alignment)


def test_a_token_is_aligned_with_the_piece_it_attends_to_most() -> None:
    attention = np.array([[0, 0.2, 0.5, 0.3, 0], [0, 0.6, 0.2, 0.2, 0]], np.float32)
    assert align(attention) == (1, 0)


def test_bos_and_eos_are_never_aligned_with_and_the_first_of_equals_wins() -> None:
    attention = np.array([[0.8, 0.05, 0.05, 0.1], [0.1, 0.05, 0.05, 0.8], [0.9, 0.01, 0.02, 0.07]], np.float32)
    assert align(attention) == (0, 0, 1)


@pytest.mark.parametrize("shape", [(2, 2), (5,), (1, 2, 5)])
def test_attention_without_a_piece_to_align_with_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="1 columns, those of the source"):
        align(np.zeros(shape, np.float32))


def test_no_token_has_no_alignment() -> None:
    assert align(np.zeros((0, 5), np.float32)) == ()


def test_an_unknown_token_becomes_the_whole_word_it_is_aligned_with() -> None:
    assert replaced("▁Herr ▁Mü ll er ▁schläft", "▁Mr ▁ ? ▁sleeps", [0, 2, 2, 4]) == "Mr Müller sleeps"


def test_a_word_whose_start_is_a_piece_of_its_own_is_whole() -> None:
    assert replaced("▁drei ▁ ☃☃ ▁hier", "▁three ▁ ?", [0, 1, 1]) == "three ☃☃"
    assert replaced("▁drei ▁ ☃☃ ▁hier", "▁three ▁ ?", [0, 2, 2]) == "three ☃☃"


def test_pieces_before_the_first_word_start_are_a_word() -> None:
    assert replaced("漢 字 ▁ist", "▁ ? ▁is", [0, 1, 2]) == "漢字 is"


def test_punctuation_around_the_word_stays_behind_and_within_it_is_kept() -> None:
    assert replaced("▁bei ▁( O ' Hara ).", "▁at ▁( ? ).", [0, 1, 3, 5]) == "at (O'Hara)."
    assert replaced("▁was ▁?!", "▁what ▁ ?", [0, 1, 1]) == "what ?!"


def test_several_unknown_tokens_side_by_side_are_one_word_where_they_are_aligned_with_one() -> None:
    assert replaced("▁Mü ller ▁Schmidt", "▁ ? ? ?", [0, 0, 1, 2]) == "MüllerSchmidt"
    assert replaced("▁Müller", "▁ ? ▁and ▁ ?", [0] * 5) == "Müller and Müller"


def test_what_is_known_stays_as_it_is() -> None:
    assert replaced("▁Hunde", "▁dog s", [0, 0]) == "dogs"
    assert replaced("▁Hunde", "", []) == ""


def test_as_many_alignments_as_tokens_are_wanted() -> None:
    with pytest.raises(ValueError, match="zip"):
        replaced("▁Hunde", "▁dog s", [0])


@pytest.mark.parametrize("text", ["twelve ☃☃ thousand", "漢字", "  one  hundred ", ""])
def test_surfaces_are_one_for_each_id_and_keep_what_no_piece_has(tokenizer: SentencePiece, text: str) -> None:
    surfaces, ids = tokenizer.surfaces(text), tokenizer.encode(text)
    assert len(surfaces) == len(ids)
    assert "".join(surfaces).replace("▁", " ").strip() == " ".join(text.split())
    known = [(piece, index) for piece, index in zip(surfaces, ids, strict=True) if index != tokenizer.unknown_id]
    assert [piece for piece, _ in known] == list(tokenizer.pieces([index for _, index in known]))


def test_a_tokenizer_joins_what_stands_for_unknown_pieces(tokenizer: SentencePiece) -> None:
    text = "twelve ☃☃ thousand"
    source, ids = tokenizer.surfaces(text), tokenizer.encode(text)
    shown = tokenizer.pieces(ids)
    assert "☃" not in tokenizer.decode(ids)
    joined = replace_unknown(source, shown, ids, tokenizer.unknown_id, range(len(ids)), tokenizer.join)
    assert joined == text
