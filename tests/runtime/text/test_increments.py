"""A translation as it comes: what is shown stays, and all of it together is the whole text."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvx.runtime.bundle.vocabulary import TIDIED, Vocabulary
from kvx.runtime.text.alignment import replace_unknown
from kvx.runtime.text.increments import Increments
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.registry import KINDS, open_tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece
from kvx.runtime.text.tokenizers.vocabulary import settled_when_tidied, tidied

WORDS = ["a", "cat", "sat", "on", "the", "mat", "und", "eine", "Katze", "saß", "auf", "der", "Matte", "кот"]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# Pieces that change what stands before them, in one kind or another.
BYTES = [f"<0x{byte:02X}>" for byte in (0x41, 0xC2, 0xA0, 0xE2, 0x96, 0x81, 0xF0, 0x9F, 0xFF)]
OF_WORDS = ["▁cat", "▁sat", "▁the", "cat", "the", "▁", "▁▁", "▁ ", "日", "\ufffd", "Ã", "©"]
OF_ENGLISH = [
    ".",
    "▁.",
    "▁'",
    "'",
    "n",
    "▁n",
    "'t",
    "t",
    "s",
    "▁s",
    "n't",
    "▁n't",
    "▁do",
    "do not",
    "do",
    "not",
    " ",
    "▁?",
    " 've",
    "e",
]
OF_PAIRS = ["ca@@", "t@@", "@@", "@", "a</w>", "ca</w>t", "Ġa</w>", "</w>", "</w", ">", "ab", "ba", "x", "xx"]
OF_PARTS = ["##t", "##", "##<0x41>", "##<0xFF>", "|"]
OF_CODES = ["the", "ca@@", "ma@@", "s@@", "a@@", "o@@", "n", "t", "o"]
ODD = [*OF_WORDS, *OF_ENGLISH, *OF_PAIRS, *OF_PARTS, *BYTES]

Tokenizers = Callable[[str], Tokenizer]
Decoder = dict[str, Any]


def a_model(**settings: Any) -> bytes:  # noqa: ANN401
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=5)) for _ in range(200)]
    size = 330 if settings.get("byte_fallback") else 60
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=3,
        user_defined_symbols=["n't", "<mask>"],
        minloglevel=2,
        **settings,
    )
    return written.getvalue()


def a_rewriting_model() -> bytes:
    """One that makes a dog of a cat, and something else of a cat before an s, when it decodes."""
    with tempfile.NamedTemporaryFile(suffix=".tsv") as rules:
        Path(rules.name).write_text("63 61 74\t64 6F 67\n63 61 74 20 73\t78\n", encoding="utf-8")
        return a_model(denormalization_rule_tsv=rules.name)


def a_vocabulary(pieces: Sequence[str | None], *, tidy: bool = False) -> bytes:
    known = [*SPECIAL, *dict.fromkeys(pieces)]
    return Vocabulary(tuple(known), frozenset({0, 1, 2, 3}), 3, tidy=tidy).to_bytes()


def with_model_vocabulary(*, tidy: bool = False) -> dict[str, bytes]:
    model = a_model(byte_fallback=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [processor.id_to_piece(one) for one in range(4, processor.get_piece_size(), 2)]
    return {"model": model, "vocabulary": a_vocabulary([*ODD, None, *names], tidy=tidy)}


def byte_pairs() -> dict[str, bytes]:
    pytest.importorskip("subword_nmt")
    codes = "#version: 0.2\nt h\nth e</w>\nc a\nm a\n"
    return {"codes": codes.encode(), "vocabulary": a_vocabulary([*ODD, *OF_CODES])}


def with_decoder(decoder: Decoder | None) -> dict[str, bytes]:
    """A tokenizer.json with all odd pieces, which a decoder joins."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {piece: one for one, piece in enumerate([*SPECIAL, *dict.fromkeys(ODD)])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens([*SPECIAL, "<mask>"])
    values = {**json.loads(made.to_str()), "decoder": decoder}
    return {"tokenizer": json.dumps(values).encode()}


def byte_level() -> dict[str, bytes]:
    made = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    made.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, special_tokens=[*SPECIAL], show_progress=False)
    made.add_tokens(["日本"])
    return {"tokenizer": made.to_str().encode()}


def in_order(*decoders: Decoder) -> Decoder:
    return {"type": "Sequence", "decoders": list(decoders)}


def replacing(old: str, new: str) -> Decoder:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


METASPACE: Decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTE_LEVEL: Decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
WORD_PIECE: Decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
CTC: Decoder = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
BPE: Decoder = {"type": "BPEDecoder", "suffix": "</w>"}
FALLBACK: Decoder = {"type": "ByteFallback"}
FUSE: Decoder = {"type": "Fuse"}
STRIP: Decoder = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPACES = replacing("▁", " ")
TIDYING = [replacing(spaced, spaced.strip()) for spaced in TIDIED]

STREAMED: dict[str, Decoder] = {  # decoders that leave words as they are
    "metaspace": METASPACE,
    "byte fallback": in_order(SPACES, FALLBACK, FUSE, STRIP),
    "byte fallback and metaspace": in_order(FALLBACK, METASPACE),
    "pieces stripped": in_order(METASPACE, STRIP, replacing("n't", " not")),
    "one character": in_order(METASPACE, FUSE, replacing("a", "oo"), STRIP),
    "word pieces": WORD_PIECE,
    "ctc": CTC,
    "ends of words": BPE,
    "ends of words, joined": in_order(BPE, FUSE),
    "nothing": in_order(),
    "tidied": in_order(METASPACE, FUSE, *TIDYING),
    "tidied bytes": in_order(in_order(SPACES, FALLBACK, FUSE), FUSE, *TIDYING),
    "bytes of a text": BYTE_LEVEL,
}
# Those that may change a word when others follow, and pieces with which they do.
CHANGED: dict[str, tuple[Decoder, list[str]]] = {
    "across pieces": (in_order(METASPACE, FUSE, replacing("t s", "z")), ["▁cat", "▁sat"]),
    "across bytes": (in_order(BYTE_LEVEL, replacing("\ufffd", "?")), ["Ã", "©"]),
    "word pieces of a text": (in_order(FUSE, WORD_PIECE), ["do", " ", "n", "'t"]),
    "ends of words of a text": (in_order(METASPACE, FUSE, BPE), ["cat", "</w", ">"]),
    "ends of words before spaces": (in_order(BPE, METASPACE), ["ca</w>t", "cat"]),
    "ends of words before bytes": (in_order(BPE, BYTE_LEVEL), ["Ġa</w>", "cat"]),
    "ends of words without an end": ({"type": "BPEDecoder", "suffix": ""}, ["cat", "cat"]),
    "bytes of word pieces": (in_order(WORD_PIECE, FALLBACK, FUSE), ["cat", "##<0x41>", "##<0xFF>"]),
    "bytes of other pieces": (in_order(replacing("##", ""), FALLBACK), ["##<0x41>", "<0xFF>"]),
}
SENTENCEPIECE: dict[str, Callable[[], dict[str, bytes]]] = {
    "sentencepiece": lambda: {"model": a_model()},
    "sentencepiece of bytes": lambda: {"model": a_model(byte_fallback=True)},
    "sentencepiece with spaces after": lambda: {"model": a_model(treat_whitespace_as_suffix=True)},
    "sentencepiece that keeps spaces": lambda: {"model": a_model(remove_extra_whitespaces=False, model_type="bpe")},
}
FILES: dict[str, Callable[[], dict[str, bytes]]] = {
    **SENTENCEPIECE,
    "sentencepiece that rewrites": lambda: {"model": a_rewriting_model()},
    "vocabulary": with_model_vocabulary,
    "vocabulary that tidies": partial(with_model_vocabulary, tidy=True),
    "vocabulary that rewrites": lambda: {"model": a_rewriting_model(), "vocabulary": a_vocabulary([*ODD, "s", "a"])},
    "bytes": dict,
    "words": lambda: {"vocabulary": a_vocabulary([*ODD, *WORDS])},
    "bpe": byte_pairs,
    "huggingface": byte_level,
    "huggingface: none": partial(with_decoder, None),
    **{f"huggingface: {name}": partial(with_decoder, one) for name, one in STREAMED.items()},
    **{f"huggingface: {name}": partial(with_decoder, one) for name, (one, _) in CHANGED.items()},
}

TEXTS = ["the cat sat", "日本", "saß кот", "🐸", "do n't", "don't .", "a ' s", "▁"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """The tokenizers by name."""

    @cache
    def tokenizer(name: str) -> Tokenizer:
        folder, paths = tmp_path_factory.mktemp("tokenizer"), {}
        for role, content in FILES[name]().items():
            paths[role] = folder / role
            paths[role].write_bytes(content)
        return open_tokenizer(name.split(maxsplit=1)[0].strip(":"), paths)

    return tokenizer


@st.composite
def some_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Ids of odd pieces, most of one sort, of special ones, of texts, and of all, with those that are none where the
    tokenizer takes them.
    """
    beyond = 0 if isinstance(tokenizer, SentencePiece) else 1
    sorts = [ids_of(tokenizer, sort) for sort in (OF_WORDS, OF_ENGLISH, OF_PAIRS, [*OF_PARTS, *BYTES], ODD)]
    of_a_sort = st.sampled_from(draw(st.sampled_from(sorts)) or [0])
    any_id = st.integers(-beyond, len(tokenizer) - 1 + beyond)
    of_a_text = st.sampled_from(TEXTS).map(tokenizer.encode)
    one_id = st.one_of(of_a_sort, of_a_sort, of_a_sort, st.integers(0, 3), any_id).map(lambda one: [one])
    parts = st.lists(st.one_of(one_id, one_id, of_a_text), max_size=10)
    return [one for part in draw(parts) for one in part]


def ids_of(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """The ids of those pieces that there are."""
    return [one for piece in pieces if (one := tokenizer.piece_id(piece)) is not None]


def chunks(ids: Sequence[int], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ids in parts of these sizes, and the others together."""
    begin = 0
    for size in sizes:
        yield ids[begin : begin + size]
        begin += size
    yield ids[begin:]


def shown_by(increments: Increments, parts: Iterator[Sequence[int]]) -> list[str]:
    """The text that is shown after each part."""
    shown = [""]
    for part in parts:
        shown.append(shown[-1] + increments.add(part))
    return shown


SIZES = st.lists(st.integers(0, 3), max_size=30)


def test_every_kind_is_here() -> None:
    assert {name.split()[0].strip(":") for name in FILES} == KINDS.keys()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(data=st.data(), sizes=SIZES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_shown_stays_and_all_of_it_is_the_text(
    name: str, data: st.DataObject, sizes: list[int], tokenizers: Tokenizers
) -> None:
    tokenizer = tokenizers(name)
    ids = data.draw(some_ids(tokenizer))
    text, increments = tokenizer.decode(ids), Increments(tokenizer)
    assert all(text.startswith(tokenizer.settled(ids[:end])) for end in range(len(ids) + 1))
    shown = shown_by(increments, chunks(ids, sizes))
    assert [text[: len(one)] for one in shown] == shown
    assert shown[-1] + increments.rest(text) == text


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data(), sizes=SIZES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_shown_stays_where_words_replace_the_unknown(
    name: str, data: st.DataObject, sizes: list[int], tokenizers: Tokenizers
) -> None:
    tokenizer = tokenizers(name)
    unknown = tokenizer.unknown_id
    ids = [*data.draw(some_ids(tokenizer)), unknown, *data.draw(some_ids(tokenizer))]
    words = data.draw(
        st.lists(st.sampled_from(["▁Łódź", "▁n't", "▁.", "▁'", "t", "<0x41>", "##x", "▁a@@", "s"]), min_size=1)
    )
    places = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=len(ids), max_size=len(ids)))
    text = replace_unknown(words, tokenizer.pieces(ids), ids, unknown, places, tokenizer.join)
    increments = Increments(tokenizer, until_unknown=True)
    shown = shown_by(increments, chunks(ids, sizes))
    assert [text[: len(one)] for one in shown] == shown
    assert shown[-1] + increments.rest(text) == text


SPACED = ["▁the", "▁cat", "▁sat", "▁the", "▁cat", "▁sat"]
APART = ["the", "cat", "##t", "the", "cat", "do not"]
# The pieces that are given, or a text's, and how many of its words are not certain before the end.
ORDINARY: dict[str, tuple[list[str] | str, int]] = {
    **dict.fromkeys(SENTENCEPIECE, ("the cat sat on the mat", 0)),
    "vocabulary": ("the cat sat on the mat", 0),
    "vocabulary that tidies": (SPACED, 1),
    "bytes": ("the cat sat on the mat", 0),
    "words": ("the cat sat on the mat", 0),
    "bpe": ("the cat sat on the mat", 0),
    "huggingface": ("the cat sat on the mat", 0),
    **{f"huggingface: {name}": (SPACED, int("tidied" in name)) for name in STREAMED},
    "huggingface: word pieces": (APART, 0),
    "huggingface: ctc": (["the", "|", "cat", "|", "the", "|", "cat"], 0),
    "huggingface: ends of words": (["the", "</w>", "cat", "</w>", "the", "</w>", "cat"], 0),
    "huggingface: ends of words, joined": (["the", "</w>", "cat", "</w>", "the", "</w>", "cat"], 0),
    "huggingface: bytes of a text": (["the", "cat", "the", "cat"], 0),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_words_are_shown_when_they_come(name: str, tokenizers: Tokenizers) -> None:
    tokenizer, (given_text, held) = tokenizers(name), ORDINARY[name]
    found = tokenizer.encode(given_text) if isinstance(given_text, str) else map(tokenizer.piece_id, given_text)
    ids = [one for one in found if one is not None]
    increments, text = Increments(tokenizer), tokenizer.decode(ids)
    shown = ""
    for end, one in enumerate(ids, 1):
        shown += increments.add([one])
        so_far = tokenizer.decode(ids[:end]).split()
        assert shown.split() == so_far[: max(0, len(so_far) - held)]
    assert shown.split() == text.split()[: len(text.split()) - held]


CAT = ["▁cat", "▁sat"]
# Pieces whose text depends on those that follow, and what each of them adds.
TRAPS: dict[str, tuple[str, list[str], list[str]]] = {
    "a wrong byte": ("huggingface: byte fallback", ["▁cat", "<0x41>", "<0xFF>", "cat"], ["cat", "", "", "��cat"]),
    "a special piece": ("huggingface: byte fallback", ["<0x41>", "<s>", "<0xFF>", "cat"], ["", "", "", "��cat"]),
    "an end within": ("huggingface: ends of words", ["cat", "ca</w>t", "cat"], ["cat", "", "ca tcat"]),
    "n't of parts": ("huggingface: tidied", [*CAT, "▁n", "'t", *CAT], ["", "cat", " sat", "", "n't", " cat"]),
    "n't of characters": (
        "vocabulary that tidies",
        [*CAT, "▁n", "▁'", "▁", "t", "▁cat", "▁sat"],
        ["", "cat", " sat", "", "", "", "n't", " cat"],
    ),
    "a space of bytes": ("vocabulary", ["▁cat", "▁", "<0xC2>", "<0xA0>"], ["cat", "", "", ""]),
    "half a space": ("sentencepiece of bytes", ["▁cat", "<0xE2>", "<0x96>", "<0x81>"], ["cat", "", "", "▁"]),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_text_that_later_pieces_may_change_is_held(trap: str, tokenizers: Tokenizers) -> None:
    name, pieces, expected = TRAPS[trap]
    tokenizer = tokenizers(name)
    ids, increments = ids_of(tokenizer, pieces), Increments(tokenizer)
    assert len(ids) == len(pieces)
    shown = [increments.add([one]) for one in ids]
    assert shown == expected
    text = tokenizer.decode(ids)
    assert "".join(shown) + increments.rest(text) == text


def test_ids_beyond_the_vocabulary_do_not_end_a_run_of_bytes(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("huggingface: byte fallback")
    good, wrong = ids_of(tokenizer, ["<0x41>", "<0xFF>"])
    increments = Increments(tokenizer)
    assert [increments.add([one]) for one in (good, 10**6, -1, wrong)] == [""] * 4
    assert increments.rest(tokenizer.decode([good, 10**6, -1, wrong])) == "��"


@pytest.mark.parametrize("name", CHANGED)
def test_nothing_is_shown_where_everything_may_change(name: str, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers(f"huggingface: {name}")
    ids = ids_of(tokenizer, CHANGED[name][1])
    before, text = tokenizer.decode(ids[:-1]), tokenizer.decode(ids)
    assert not text.startswith(before.rstrip("\ufffd "))
    increments = Increments(tokenizer)
    assert increments.add(ids) == ""
    assert increments.rest(text) == text


def test_half_a_character_is_not_shown(tokenizers: Tokenizers) -> None:
    frog = [f"<0x{byte:02X}>" for byte in "🐸".encode()]
    for name in ("sentencepiece of bytes", "bytes"):
        tokenizer = tokenizers(name)
        increments = Increments(tokenizer)
        ids = [one for piece in frog if (one := tokenizer.piece_id(piece)) is not None]
        assert [increments.add([one]) for one in ids] == ["", "", "", "🐸"]
    increments = Increments(tokenizers("huggingface"))
    ids = tokenizers("huggingface").encode("a🐸")
    assert [increments.add([one]) for one in ids] == ["a", "", "", "", "🐸"]


def test_nothing_is_certain_after_an_unknown_id_that_a_word_replaces(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("words")
    the, cat = tokenizer.encode("the cat")
    certain, replaced = Increments(tokenizer), Increments(tokenizer, until_unknown=True)
    ids = [the, cat, tokenizer.unknown_id, cat]
    assert certain.add(ids) == "the cat cat"
    assert [replaced.add(ids), replaced.add([cat])] == ["the cat", ""]
    assert replaced.rest("the cat кот cat cat") == " кот cat cat"


PARTS = [" n", " '", " t", " s", " do", " cat", ".", "'", "t", " ve", " ", "n't", "'s", " ?"]


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=9), place=st.integers(0, 20))
@example(parts=[" do", " n", " '", " t"], place=7)
def test_the_settled_beginning_of_a_tidied_text_stays(parts: list[str], place: int) -> None:
    text = "".join(parts)
    assert tidied(text).startswith(settled_when_tidied(tidied(text[:place])))
