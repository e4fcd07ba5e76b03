"""A tokenizer.json: nothing around a text, special tokens in a text are text, surfaces for words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.alignment import replace_unknown
from kvx.runtime.text.tokenizers.huggingface import HuggingFaceTokenizer

tokenizers = pytest.importorskip("tokenizers")

CHARACTERS = "abcdeknsu<>/_ABDE.-"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
METASPACE = {"replacement": "▁", "prepend_scheme": "always", "split": True}


def unigram() -> Any:  # noqa: ANN401  # of a package without types where it is not installed
    """A model that holds its special tokens among the pieces, as mBART's does."""
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [("▁", -2.0), ("▁abc", -3.0), *((one, -4.0) for one in CHARACTERS), ("de_DE", 0.0), ("<mask>", 0.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**METASPACE)
    made.decoder = tokenizers.decoders.Metaspace(**METASPACE)
    made.add_special_tokens([*SPECIAL, "de_DE"])
    made.add_special_tokens([tokenizers.AddedToken("<mask>", special=True, normalized=True, lstrip=True)])
    made.add_tokens(["Wort"])
    return made


def pairs() -> Any:  # noqa: ANN401
    """Byte pairs whose languages come after the vocabulary, as NLLB's do."""
    pieces = [*SPECIAL, "▁", *CHARACTERS]
    vocabulary = {piece: one for one, piece in enumerate([*pieces, "▁a"])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**METASPACE)
    made.decoder = tokenizers.decoders.Metaspace(**METASPACE)
    made.add_special_tokens([*SPECIAL, "<mask>", "deu_Latn"])
    return made


def byte_level() -> Any:  # noqa: ANN401
    made = tokenizers.ByteLevelBPETokenizer(trim_offsets=True)
    texts = ["the cat sat on the mat", "die Katze saß"] * 3
    made.train_from_iterator(texts, vocab_size=300, special_tokens=[*SPECIAL, "<mask>"], show_progress=False)
    return made


MAKERS = {"unigram": unigram, "pairs": pairs, "byte_level": byte_level}


def opened(path: Path, made: Any) -> HuggingFaceTokenizer:  # noqa: ANN401
    path.write_text(made.to_str(), encoding="utf-8")
    return HuggingFaceTokenizer(path)


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> HuggingFaceTokenizer:
    return opened(tmp_path / "tokenizer.json", MAKERS[request.param]())


def test_a_text_comes_back(tokenizer: HuggingFaceTokenizer) -> None:
    ids = tokenizer.encode("abc a sa")
    assert tokenizer.decode(ids) == "abc a sa"
    assert tokenizer.join(tokenizer.pieces(ids)) == "abc a sa"
    assert [tokenizer.piece_id(piece) for piece in tokenizer.pieces(ids)] == ids
    assert tokenizer.unknown_id == 3


def test_special_and_impossible_ids_vanish(tokenizer: HuggingFaceTokenizer) -> None:
    ids = tokenizer.encode("abc a")
    assert tokenizer.decode([0, *ids, 2, 10**9, -1, len(tokenizer)]) == "abc a"
    assert tokenizer.join(["<s>", *tokenizer.pieces(ids), "</s>", ""]) == "abc a"
    assert tokenizer.pieces([10**9, -1]) == ("", "")


@pytest.mark.parametrize(
    "text",
    ["</s>", "a </s> b", "a</s>b", "<mask> a", "a <mask>", "<unk>", "a <unk>", "de_DE a", "deu_Latn", "<pad><s>"],
)
def test_a_special_token_spelled_out_is_text(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    special = {tokenizer.piece_id(piece) for piece in (*SPECIAL, "<mask>", "de_DE", "deu_Latn")} - {None}
    unknown = tokenizer.unknown_surfaces(text)
    assert not (special - {3}).intersection(tokenizer.encode(text))
    assert "<unk>" not in unknown
    assert len(tokenizer.surfaces(text)) == len(tokenizer.encode(text))
    if not unknown:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_special_keep_their_ids_beside_special_ones(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path / "tokenizer.json", unigram())
    word = tokenizer.piece_id("Wort")
    assert word == len(tokenizer) - 1
    assert tokenizer.encode("a Wort b").count(word) == 1
    assert tokenizer.encode("a Wort </s>").count(word) == 1


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.one_of(st.sampled_from(["abc", "</s>", "Katze", "é", "👩‍👧", " "]), st.text(max_size=4))).map(
        "".join
    )
)
@pytest.mark.parametrize("name", MAKERS)
def test_surfaces_are_one_for_each_id(name: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = opened(tmp_path_factory.getbasetemp() / f"{name}.json", MAKERS[name]())
    assert len(tokenizer.surfaces(text)) == len(tokenizer.encode(text))


def test_surfaces_of_bytes_are_the_words(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path / "tokenizer.json", byte_level())
    for text in ("the cat sat", "die Katze saß 👩‍👧 naïve", "Łódź is"):
        surfaces = tokenizer.surfaces(text)
        assert "".join(surfaces).replace("▁", " ") == text
        assert [piece.startswith("▁") for piece in surfaces].count(True) == text.count(" ")


def test_unknown_tokens_are_replaced_by_words(tmp_path: Path) -> None:
    """Which are spelled in the alphabet of the target, whatever it is."""
    for name, make in MAKERS.items():
        tokenizer = opened(tmp_path / f"{name}.json", make())
        source = tokenizer.surfaces("a Łódź abc.")
        place = next(place for place, piece in enumerate(source) if "d" in piece or "ź" in piece)
        ids = [*tokenizer.encode("abc "), tokenizer.unknown_id]
        text = replace_unknown(
            source, tokenizer.pieces(ids), ids, tokenizer.unknown_id, [place] * len(ids), tokenizer.join
        )
        assert text.split() == ["abc", "Łódź"], name


def test_unknown_surfaces_are_the_text(tmp_path: Path) -> None:
    for make in (unigram, pairs):
        tokenizer = opened(tmp_path / "tokenizer.json", make())
        assert tokenizer.unknown_surfaces("a日本 s") in (["日本"], ["日", "本"])
        assert tokenizer.unknown_surfaces("abc") == []
    assert opened(tmp_path / "tokenizer.json", pairs()).unknown_surfaces("n\u0303") == ["n\u0303"]


def test_limits_and_padding_of_the_file_are_not_ours(tmp_path: Path) -> None:
    made = unigram()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    tokenizer = opened(tmp_path / "tokenizer.json", made)
    ids = tokenizer.encode("abc abc abc abc abc")
    assert tokenizer.pieces(ids) == ("▁abc",) * 5


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    values = json.loads(unigram().to_str())
    change(values)
    return json.dumps(values).encode()


BROKEN = {
    "empty": b"",
    "no json": b"{",
    "no utf-8": b"\xff\xfe",
    "null": b"null",
    "no model": b"{}",
    "deep": b"[" * 100_000,
    "no pieces": changed(lambda values: values["model"].update(vocab=[])),
    "no unknown piece": changed(lambda values: values["model"].update(unk_id=10**6)),
    "a kind that is none": changed(lambda values: values["model"].update(type="Magic")),
    "a merge of nothing": json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
        }
    ).encode(),
    "no <unk>": json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    ).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(BROKEN[name])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nothing"):
        HuggingFaceTokenizer(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match="regular"):
        HuggingFaceTokenizer(tmp_path)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(unigram().to_str(), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"kvx\[tokenizers\]"):
        HuggingFaceTokenizer(path)
