"""The text side of Hugging Face folders against the original tokenizers, which are trained here."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

from kvx.models.importers import languages as known  # noqa: E402
from kvx.models.importers.huggingface_text import DEFAULTS, read_text  # noqa: E402
from kvx.models.importers.text import Text  # noqa: E402
from kvx.runtime.errors import CheckpointError, KvxError, TokenizerError  # noqa: E402
from kvx.runtime.text.tokenizers.protocol import Tokenizer  # noqa: E402
from kvx.tests.families import numbered, opened, train_sentencepiece  # noqa: E402

SCRIPTS = {
    "latin": "the little frog jumps over a green pond while it rains Straße für naïve café coração Łódź žluťoučký",
    "cyrillic": "маленькая лягушка прыгает через зелёный пруд когда идёт дождь їжак що",
    "greek": "ο μικρός βάτραχος πηδάει πάνω από τη λίμνη όταν βρέχει",
    "arabic": "الضفدع الصغير يقفز فوق البركة الخضراء عندما تمطر",
    "hebrew": "הצפרדע הקטנה קופצת מעל הבריכה כשיורד גשם",
    "devanagari": "छोटा मेंढक हरे तालाब के ऊपर कूदता है जब बारिश होती है",
    "thai": "กบตัวน้อย กระโดดข้าม บึงสีเขียว เมื่อ ฝนตก",
    "chinese": "小青蛙 下雨时 跳过 绿色的 池塘",
    "japanese": "小さな 蛙が 雨の日に 緑の池を 飛び越える カエル",
    "korean": "작은 개구리가 비가 올 때 푸른 연못을 뛰어넘는다",
    "digits": "1 23 456 7,890 3.14 ½ ² № 2024-05-06 १२३ ٣٤",
}
MARKS = [
    "e\u0301",
    "n\u0303o",
    "🐸",
    "👩‍👩‍👧",
    "🇫🇷",
    "☔️",
    "ﬁ",
    "Ａ１",
    "\u200bx",
    "𝔣",
    "𓆏",
    "ǅ",
    "ß",
    "İ",
    "“quoted”",
    "don't",
    "a/b",
]
SPACES = [" "] * 12 + ["  ", "\t", "\u00a0", "\u3000", " \n", "\u2009"]
ENDS = ["", "", "", ".", "!", "?", ",", "。", "؟", " ."]
WORDS = [word for words in SCRIPTS.values() for word in words.split()]


def sentence(chance: random.Random, words: Sequence[str]) -> str:
    parts = [chance.choice(words) for _ in range(chance.randint(1, 9))]
    text = "".join(word + chance.choice(SPACES) for word in parts[:-1]) + parts[-1] + chance.choice(ENDS)
    return chance.choice(["", "", "", "", " ", "\u3000"]) + text + chance.choice(["", "", "", "", " ", "\n"])


def sentences(seed: int, count: int, words: Sequence[str] = WORDS) -> list[str]:
    chance = random.Random(seed)
    return [sentence(chance, words) for _ in range(count)]


TEXTS = ["", " ", "x", *MARKS, *sentences(1, 120), *sentences(2, 60, [*WORDS, *MARKS]), *sentences(3, 20, MARKS)]
PLAIN_SPACES = [" ".join(text.split()) for text in TEXTS]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(WORDS + MARKS + SPACES), st.text(max_size=5)), max_size=8).map("".join)
CHECKED = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def train_of_words(path: Path, words: Sequence[str] = WORDS, kind: str = "unigram", **ids: int) -> list[str]:
    """A model of the corpus at a path; its pieces. Rare characters are unknown to it."""
    size = 420 if words is WORDS else 150
    options = {"vocab_size": size, "model_type": kind, "character_coverage": 0.98}
    return train_sentencepiece(path, sentences(0, 500, words), ids, **options)


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Case:
    """A folder of a family with the tokenizer that wrote it."""

    folder: Path
    family: str
    original: Any
    sizes: tuple[int, int]
    source: str | None = None  # language

    @property
    def framing_begins(self) -> bool:
        """Whether something stands before a text."""
        return bool(self.read().framing.prefix)

    def read(self, generation: Mapping[str, Any] | None = None, **config: object) -> Text:
        last = self.sizes[1] - 1
        special = {"decoder_start_token_id": last, "pad_token_id": last} if self.family == "marian" else {}
        values = {"model_type": self.family, **special, **config}
        return read_text(self.folder, values, generation or {}, *self.sizes)

    def framed(self, text: Text, tokenizer: Tokenizer, content: str) -> list[int]:
        def ids(framed: Sequence[int | str]) -> list[int]:
            return [text.languages.source[str(self.source)] if isinstance(one, str) else one for one in framed]

        return [*ids(text.framing.prefix), *tokenizer.encode(content), *ids(text.framing.suffix)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def marian(trained: Path) -> Case:
    return make_marian(trained / "marian", languages=())


@pytest.fixture(scope="module")
def marian_languages(trained: Path) -> Case:
    return make_marian(trained / "marian-languages", languages=(">>fra<<", ">>deu<<", ">>zho_Hans<<"))


def make_marian(folder: Path, languages: Sequence[str]) -> Case:
    source, target = marian_pieces(folder)
    ids = numbered("</s>", "<unk>", *source[3:], *target[3:], *languages, "<pad>")
    arguments = [folder / "raw" / name for name in ("source.spm", "target.spm")]
    original = transformers.MarianTokenizer(*map(str, arguments), str(write(folder / "raw" / "vocab.json", ids)))
    original.save_pretrained(folder)
    return Case(folder, "marian", original, (len(ids), len(ids)))


def marian_pieces(folder: Path) -> tuple[list[str], list[str]]:
    return (
        train_of_words(folder / "raw" / "source.spm", [*SCRIPTS["latin"].split(), *SCRIPTS["greek"].split()]),
        train_of_words(folder / "raw" / "target.spm", [*SCRIPTS["cyrillic"].split(), *SCRIPTS["chinese"].split()]),
    )


@pytest.fixture(scope="module")
def marian_apart(trained: Path) -> Case:
    folder = trained / "marian-apart"
    source, target = marian_pieces(folder)
    ids = [numbered("</s>", "<unk>", *source[3:], "<pad>"), numbered("</s>", "<unk>", *target[3:], "<pad>")]
    files = [
        write(folder / "raw" / name, one) for name, one in zip(("vocab.json", "target_vocab.json"), ids, strict=True)
    ]
    spm = [folder / "raw" / name for name in ("source.spm", "target.spm")]
    original = transformers.MarianTokenizer(*map(str, (*spm, *files)), separate_vocabs=True)
    original.save_pretrained(folder)
    return Case(folder, "marian", original, (len(ids[0]), len(ids[1])))


@pytest.fixture(scope="module")
def m2m100(trained: Path) -> Case:
    folder = trained / "m2m100"
    pieces = train_of_words(folder / "raw" / "sentencepiece.bpe.model", kind="bpe")
    ids = numbered("<s>", "<pad>", "</s>", "<unk>", *pieces[3:])
    files = (write(folder / "raw" / "vocab.json", ids), folder / "raw" / "sentencepiece.bpe.model")
    original = transformers.M2M100Tokenizer(*map(str, files), src_lang="de", tgt_lang="fr")
    original.save_pretrained(folder)
    size = len(ids) + 108
    return Case(folder, "m2m_100", original, (size, size), "de")


@pytest.fixture(scope="module")
def nllb(trained: Path) -> Case:
    converting = pytest.importorskip("transformers.convert_slow_tokenizer")
    folder = trained / "nllb"
    train_of_words(folder / "raw" / "sentencepiece.bpe.model", kind="bpe")
    kwargs = converting.SentencePieceExtractor(str(folder / "raw" / "sentencepiece.bpe.model")).extract(
        tokenizers.models.BPE
    )
    kwargs = converting.NllbConverter.convert_from_spm(**kwargs)
    del kwargs["additional_special_tokens"]  # which leave no room for the languages
    original = transformers.NllbTokenizer(**kwargs, src_lang="deu_Latn", tgt_lang="fra_Latn")
    original.save_pretrained(folder)
    return Case(folder, "m2m_100", original, (len(original), len(original)), "deu_Latn")


def from_sentencepiece(folder: Path, name: str, kind: Callable[..., Any], **values: object) -> Any:  # noqa: ANN401
    """The original tokenizer that a folder with a sentencepiece model alone makes."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if name == "spiece.model" else {}
    train_of_words(folder / "raw" / name, WORDS, "unigram", **ids)
    original = kind.from_pretrained(folder / "raw", **values)  # type: ignore[attr-defined]  # a class
    original.save_pretrained(folder)
    return original


@pytest.fixture(scope="module")
def mbart50(trained: Path) -> Case:
    folder = trained / "mbart50"
    original = from_sentencepiece(folder, "sentencepiece.bpe.model", transformers.MBart50Tokenizer, src_lang="de_DE")
    return Case(folder, "mbart", original, (len(original), len(original)), "de_DE")


@pytest.fixture(scope="module")
def mbart25(trained: Path) -> Case:
    folder = trained / "mbart25"
    original = from_sentencepiece(folder, "sentencepiece.bpe.model", transformers.MBartTokenizer, src_lang="de_DE")
    return Case(folder, "mbart", original, (len(original), len(original)), "de_DE")


@pytest.fixture(scope="module")
def pegasus(trained: Path) -> Case:
    folder = trained / "pegasus"
    original = from_sentencepiece(folder, "spiece.model", transformers.PegasusTokenizer)
    return Case(folder, "pegasus", original, (len(original), len(original)))


@pytest.fixture(scope="module")
def t5(trained: Path) -> Case:
    folder = trained / "t5"
    original = from_sentencepiece(folder, "spiece.model", transformers.T5Tokenizer)
    return Case(folder, "t5", original, (len(original), len(original)))


@pytest.fixture(scope="module")
def bart(trained: Path) -> Case:
    folder = trained / "bart"
    (folder / "raw").mkdir(parents=True)
    byte_level = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    byte_level.train_from_iterator(sentences(0, 500), vocab_size=600, special_tokens=special, show_progress=False)
    byte_level.save_model(str(folder / "raw"))
    original = transformers.BartTokenizer.from_pretrained(folder / "raw")
    original.save_pretrained(folder)
    return Case(folder, "bart", original, (len(original), len(original)))


FAMILIES = ["marian", "marian_apart", "m2m100", "nllb", "mbart50", "mbart25", "pegasus", "t5", "bart"]
KINDS = {"marian": "vocabulary", "marian_apart": "vocabulary", "m2m100": "vocabulary"}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def test_ids_are_those_of_the_original(case: Case, tmp_path: Path) -> None:
    text = case.read()
    tokenizer = opened(text.source, tmp_path)
    unknown = 0
    for content in TEXTS:
        expected = case.original(content).input_ids
        assert case.framed(text, tokenizer, content) == expected, content
        unknown += expected.count(case.original.unk_token_id)
    assert unknown < sum(len(case.original(content).input_ids) for content in TEXTS) * (
        0.8 if "marian" in str(case.folder) else 0.3
    )


@CHECKED
@given(content=ANY_TEXT)
def test_ids_of_any_text_are_those_of_the_original(
    marian: Case, m2m100: Case, nllb: Case, bart: Case, content: str
) -> None:
    for case in (marian, m2m100, nllb, bart):
        text = case.read()
        tokenizer = opened(text.source, case.folder / "raw")
        assert case.framed(text, tokenizer, content) == case.original(content).input_ids


def decoded(case: Case, ids: Sequence[int]) -> str:
    """What the original makes of ids. Marian's takes source.spm by default where the vocabulary is joint."""
    options = {"use_source_tokenizer": False} if case.family == "marian" else {}
    text: str = case.original.decode(ids, skip_special_tokens=True, **options)
    return text


def test_texts_are_those_of_the_original(case: Case, tmp_path: Path) -> None:
    text = case.read()
    tokenizer = opened(text.target, tmp_path)
    languages = set(text.languages.target.values()) if case.family == "m2m_100" else set()
    chance = random.Random(4)
    for content in TEXTS:
        side = "text_target" if text.source != text.target else "text"
        ids = [one for one in case.original(**{side: content}).input_ids if one not in languages]
        assert tokenizer.decode(ids) == decoded(case, ids), content
        some = [chance.randrange(4, len(tokenizer)) for _ in range(6)]
        if case.family == "m2m_100":  # its languages are no special tokens there, and ids beyond them are <unk>
            some = [one for one in some if one < case.sizes[0] - 210]
        if case.sizes[0] != case.sizes[1]:  # the original takes the source's <pad> for the target's
            some = [one for one in some if one not in (case.original.pad_token_id, case.sizes[1] - 1)]
        assert tokenizer.decode(some) == decoded(case, some), some


def test_pieces_have_the_ids_of_the_original(case: Case, tmp_path: Path) -> None:
    text = case.read()
    assert text.source.kind == KINDS.get(case.folder.name.replace("-", "_"), "huggingface")
    tokenizer = opened(text.source, tmp_path)
    assert tokenizer.unknown_id == case.original.unk_token_id
    for piece, one in case.original.get_vocab().items():
        assert tokenizer.piece_id(piece) == one
        assert tokenizer.pieces([one]) == (piece,)
    assert tokenizer.piece_id("no such piece") is None
    assert len(tokenizer) == case.sizes[0]


def test_surfaces_are_one_for_each_id(case: Case, tmp_path: Path) -> None:
    tokenizer = opened(case.read().source, tmp_path)
    for content in TEXTS:
        surfaces = tokenizer.surfaces(content)
        assert len(surfaces) == len(tokenizer.encode(content))
        for unknown in tokenizer.unknown_surfaces(content):
            assert tokenizer.piece_id(unknown) in (None, tokenizer.unknown_id)
    words = [piece for piece in tokenizer.surfaces("the green pond") if piece.startswith("▁")]
    assert len(words) in (2, 3)  # a byte-level alphabet marks no first word


LITERALS = [
    "a </s> b",
    "<pad>",
    "x<unk>",
    "<s>",
    "a <mask> b",
    ">>fra<< a",
    "deu_Latn a",
    "de_DE",
    "__fr__ a",
    "<unk_2>",
]


def test_special_tokens_spelled_out_in_a_text_are_text(case: Case, tmp_path: Path) -> None:
    """The original makes most of them the ids of the special tokens; kvx never does."""
    text = case.read()
    tokenizer = opened(text.source, tmp_path)
    special = {case.original.convert_tokens_to_ids(piece) for piece in ("</s>", "<pad>", "<s>", "<mask>", "<mask_2>")}
    special |= {*text.languages.source.values(), *text.languages.target.values()}
    for content in LITERALS:
        ids = tokenizer.encode(content)
        assert not special.difference({tokenizer.unknown_id, None}).intersection(ids), content
        assert len(tokenizer.surfaces(content)) == len(ids)


def test_the_original_makes_special_ids_of_them(case: Case) -> None:
    def inner(content: str) -> list[int]:
        """The ids of a text without those around it."""
        around = len(case.original("").input_ids)
        ids: list[int] = case.original(content).input_ids
        last = len(ids) - around + bool(case.framing_begins)
        return ids[bool(case.framing_begins) : last]

    for name in ("eos_token", "pad_token", "unk_token"):
        piece = getattr(case.original, name)
        assert case.original.convert_tokens_to_ids(piece) in inner(f"a {piece} b")


def test_the_original_makes_languages_of_codes_but_for_m2m100(nllb: Case, mbart50: Case, m2m100: Case) -> None:
    for case, code, expected in ((nllb, "fra_Latn", True), (mbart50, "fr_XX", True), (m2m100, "fr", False)):
        one = case.read().languages.target[code]
        spelled = f"__{code}__" if case is m2m100 else code
        assert (one in case.original(f"a {spelled} b").input_ids) == expected


def test_a_language_of_marian_is_text_within_a_text(marian_languages: Case, tmp_path: Path) -> None:
    """The original takes the language from the beginning of a text; in a bundle it has its own place."""
    text = marian_languages.read()
    tokenizer = opened(text.source, tmp_path)
    assert text.languages.target.keys() == {"fra", "deu", "zho_Hans"}
    assert text.framing.prefix == ("target_language",)
    fra = text.languages.target["fra"]
    assert marian_languages.original(">>fra<< the frog").input_ids == [
        fra,
        *tokenizer.encode(" the frog"),
        *text.framing.suffix,
    ]
    assert fra not in tokenizer.encode(">>fra<< the frog")
    assert tokenizer.decode([fra, *tokenizer.encode("the frog")]) == "the frog"


def test_bytes_are_those_of_the_original(tmp_path: Path) -> None:
    original = transformers.ByT5Tokenizer()
    original.save_pretrained(tmp_path)
    case = Case(tmp_path, "t5", original, (384, 384))
    text = case.read()
    assert text.source.kind == "bytes"
    tokenizer, chance = opened(text.source, tmp_path), random.Random(6)
    for content in TEXTS:
        ids = original(content).input_ids
        assert case.framed(text, tokenizer, content) == ids
        assert tokenizer.decode(ids) == content == original.decode(ids, skip_special_tokens=True)
        assert len(tokenizer.surfaces(content)) == len(ids) - 1
        some = [chance.randrange(3, 384) for _ in range(9)]
        assert tokenizer.decode(some) == original.decode(some, skip_special_tokens=True)
    with pytest.raises(TokenizerError, match="at least 259"):
        dataclasses.replace(case, sizes=(258, 258)).read()


def raw(case: Case, **values: object) -> Case:
    """The folder with the sentencepiece model alone, as older versions saved it."""
    if values:
        write(case.folder / "raw" / "tokenizer_config.json", values)
    return dataclasses.replace(case, folder=case.folder / "raw")


@pytest.mark.parametrize(
    ("name", "offset", "listed"),
    [
        ("nllb", 1, known.NLLB),
        ("mbart50", 1, known.MBART50),
        ("mbart25", 1, known.MBART),
        ("pegasus", 103, ()),
        ("t5", 0, ()),
    ],
)
def test_sentencepiece_alone_has_the_ids_of_the_family(
    name: str, offset: int, listed: Sequence[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = raw(request.getfixturevalue(name))
    text = case.read()
    tokenizer = opened(text.source, tmp_path)
    assert text.source.kind == "vocabulary"
    [path] = [path for path in case.folder.iterdir() if path.name.endswith(".model")]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    unknown = {"pegasus": 105, "t5": 2}.get(name, 3)
    for content in TEXTS:
        ids = [one + offset if one != processor.unk_id() else unknown for one in processor.encode(content)]
        assert tokenizer.encode(content) == ids
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, text.framing.eos])
    size = processor.get_piece_size()
    assert dict(text.languages.source) == {code: size + offset + one for one, code in enumerate(listed)}
    if listed:
        assert tokenizer.piece_id("<mask>") == size + offset + len(listed)
    if name == "t5":
        extra = case.original.convert_tokens_to_ids("<extra_id_0>")
        assert tokenizer.piece_id("<extra_id_0>") == size + 99 == extra


@pytest.mark.parametrize("name", ["mbart50", "pegasus", "t5"])
def test_sentencepiece_alone_cuts_as_the_original_converts_it(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """But where white space is odd: the original does not strip what sentencepiece strips. That of mBART-25 does not
    even normalise what sentencepiece does.
    """
    case = raw(request.getfixturevalue(name))
    text = case.read()
    tokenizer = opened(text.source, tmp_path)
    same = 0
    for content in PLAIN_SPACES:
        same += case.framed(text, tokenizer, content) == case.original(content).input_ids
    assert same > len(PLAIN_SPACES) * 0.9


def test_byte_pairs_without_a_tokenizer_json(bart: Case, tmp_path: Path) -> None:
    case = raw(bart)
    text = case.read()
    assert isinstance(text.source.files["tokenizer"], bytes)
    tokenizer = opened(text.source, tmp_path)
    for content in TEXTS:
        assert case.framed(text, tokenizer, content) == case.original(content).input_ids
        assert tokenizer.decode(case.original(content).input_ids) == decoded(case, case.original(content).input_ids)


class TestFraming:
    def test_defaults_are_those_of_the_classes(self) -> None:
        kinds = {"marian": "Marian", "m2m_100": "M2M100", "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus"}
        for family, name in kinds.items():
            config = getattr(transformers, f"{name}Config")()
            for setting, value in DEFAULTS[family].items():
                assert getattr(config, setting) == value, (family, setting)

    def test_marian(self, marian: Case) -> None:
        pad = marian.sizes[0] - 1
        text = marian.read(decoder_start_token_id=pad, pad_token_id=pad, bad_words_ids=[[pad]], eos_token_id=0)
        assert (text.framing.prefix, text.framing.suffix) == ((), (0,))
        assert (text.framing.start, text.framing.eos, text.framing.pad) == (pad, 0, pad)
        assert text.framing.never == (pad,)
        assert not text.languages.target

    def test_the_languages_of_m2m100(self, m2m100: Case) -> None:
        text = m2m100.read()
        assert text.framing.prefix == ("source_language",)
        assert text.framing.suffix == (2,)
        assert text.framing.start == 2
        assert text.framing.forced == ("target_language",)
        assert {code: text.languages.source[code] for code in known.M2M100} == m2m100.original.lang_code_to_id
        assert (text.languages.default_source, text.languages.default_target) == ("de", "fr")

    def test_the_languages_of_wmt21(self, m2m100: Case, tmp_path: Path) -> None:
        copied = copy(m2m100, tmp_path)
        original = transformers.M2M100Tokenizer.from_pretrained(m2m100.folder, language_codes="wmt21")
        original.save_pretrained(tmp_path)
        assert copied.read().languages.target == original.lang_code_to_id

    def test_the_only_language_of_marian_is_the_default(self, trained: Path) -> None:
        languages = make_marian(trained / "marian-one", (">>fra<<",)).read().languages
        assert (languages.default_target, languages.default_source) == ("fra", None)

    def test_a_forced_language_is_the_default(self, m2m100: Case, nllb: Case, mbart50: Case) -> None:
        for case, code in ((m2m100, "en"), (nllb, "zul_Latn"), (mbart50, "sl_SI")):
            one = case.read().languages.target[code]
            text = case.read({"forced_bos_token_id": one})
            assert text.framing.forced == ("target_language",)
            assert text.languages.default_target == code
        fixed = mbart50.read(forced_bos_token_id=7)
        assert fixed.framing.forced == (7,)
        assert not fixed.languages.target

    def test_generation_comes_before_config(self, nllb: Case) -> None:
        text = nllb.read({"decoder_start_token_id": 0, "eos_token_id": [3]}, decoder_start_token_id=1, pad_token_id=0)
        assert (text.framing.start, text.framing.eos, text.framing.pad) == (0, 3, 0)

    def test_legacy_nllb_has_the_language_after_eos(self, nllb: Case, tmp_path: Path) -> None:
        kind = transformers.NllbTokenizer
        original = kind.from_pretrained(nllb.folder, legacy_behaviour=True, src_lang="deu_Latn")
        original.save_pretrained(tmp_path)
        case = dataclasses.replace(nllb, folder=tmp_path, original=original)
        text = case.read()
        assert text.framing.suffix == (2, "source_language")
        assert case.framed(text, opened(text.source, tmp_path), "the frog") == original("the frog").input_ids

    def test_mbart25_starts_from_the_language(self, mbart25: Case) -> None:
        assert mbart25.read().framing.start == "target_language"
        chosen = mbart25.read(decoder_start_token_id=mbart25.read().languages.target["ro_RO"])
        assert chosen.framing.start == "target_language"
        assert chosen.languages.default_target == "ro_RO"
        fixed = mbart25.read(decoder_start_token_id=2)
        assert fixed.framing.start == 2
        assert not fixed.languages.target
        assert fixed.languages.source

    def test_bart_may_force_its_first_token(self, bart: Case) -> None:
        assert bart.read().framing.forced == ()
        text = bart.read(forced_bos_token_id=0)
        assert (text.framing.prefix, text.framing.suffix, text.framing.forced) == ((0,), (2,), (0,))

    def test_pegasus(self, pegasus: Case) -> None:
        framing = pegasus.read().framing
        assert (framing.prefix, framing.suffix, framing.start, framing.eos, framing.pad) == ((), (1,), 0, 1, 0)

    def test_ids_that_never_come(self, bart: Case) -> None:
        text = bart.read({"bad_words_ids": [[5], [2], [6, 7], [5]]})
        assert text.framing.never == (5,)  # eos is not banned in the original either
        assert bart.read({"max_length": 9}, bad_words_ids=[[5]]).framing.never == ()  # one file alone is asked
        assert bart.read({}, bad_words_ids=[[5]]).framing.never == (5,)


class TestRefusals:
    def test_another_family_is_named(self, tmp_path: Path) -> None:
        for family in ("longt5", None, 3, ["bart"]):
            with pytest.raises(CheckpointError, match="marian, m2m_100, bart, mbart, pegasus"):
                read_text(tmp_path, {"model_type": family}, {}, 10, 10)

    @pytest.mark.parametrize("family", ["marian", "m2m_100", "bart", "mbart", "pegasus"])
    def test_missing_files_are_named(self, family: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"spm|\.model|vocab\.json"):
            read_text(tmp_path, {"model_type": family}, {}, 10, 10)

    def test_an_embedding_that_is_too_small(self, case: Case) -> None:
        small = dataclasses.replace(case, sizes=(50, 50))
        with pytest.raises(KvxError, match="beyond the model's embedding"):
            small.read()

    def test_languages_beyond_the_embedding(self, nllb: Case, m2m100: Case, mbart25: Case) -> None:
        for case in (nllb, m2m100, mbart25):
            last = max(case.read().languages.target.values())
            with pytest.raises(TokenizerError, match="beyond the model's embedding"):
                dataclasses.replace(case, sizes=(last, last)).read()

    def test_a_tokenizer_json_with_gaps(self, bart: Case, tmp_path: Path) -> None:
        copied = copy(bart, tmp_path)
        values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        values["model"]["vocab"]["new"] = bart.sizes[0] + 1
        write(tmp_path / "tokenizer.json", values)
        with pytest.raises(TokenizerError, match=str(bart.sizes[0])):
            dataclasses.replace(copied, sizes=(9999, 9999)).read()

    def test_special_tokens_beyond_the_embedding_are_cut(self, bart: Case, tmp_path: Path) -> None:
        vocabulary = {piece: one for piece, one in bart.original.get_vocab().items() if piece != "<mask>"}
        values = json.loads((bart.folder / "tokenizer.json").read_text(encoding="utf-8"))
        moved = {piece: one - (one > 4) for piece, one in vocabulary.items()} | {"<mask>": len(vocabulary)}
        values["model"]["vocab"] = moved
        for token in values["added_tokens"]:
            token["id"] = moved[token["content"]]
        write(tmp_path / "tokenizer.json", values)
        text = dataclasses.replace(bart, folder=tmp_path, sizes=(len(vocabulary), len(vocabulary))).read()
        assert any("<mask>" in note for note in text.notes)
        assert len(opened(text.source, tmp_path)) == len(vocabulary)

    @pytest.mark.parametrize(
        "ids",
        [
            {},
            [],
            3,
            {"<unk>": 1, "a": "2"},
            {"<unk>": 1, "a": -1},
            {"<unk>": 1, "a": 1},
            {"<unk>": 1, "a": 10**12},
            {"<unk>": True, "a": 0},
            {"<unk>": None},
            {"</s>": 0, "a": 1},
            {"</s>": 0, "<unk>": 1, "▁nothing-of-it": 2},
        ],
    )
    def test_vocabularies_that_are_none(self, marian: Case, m2m100: Case, ids: object, tmp_path: Path) -> None:
        for case in (marian, m2m100):
            folder = tmp_path / case.family
            folder.mkdir()
            for path in case.folder.iterdir():
                if path.suffix in (".spm", ".model"):
                    (folder / path.name).write_bytes(path.read_bytes())
            write(folder / "vocab.json", ids)
            with pytest.raises((CheckpointError, TokenizerError)):
                dataclasses.replace(case, folder=folder).read()

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": NaN}', b"null"]
    )
    @pytest.mark.parametrize(
        "name", ["vocab.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
    )
    def test_garbage_is_an_error_that_names_the_file(
        self, marian: Case, name: str, content: bytes, tmp_path: Path
    ) -> None:
        copied = copy(marian, tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            copied.read()

    def test_a_pointer_of_git_lfs_says_what_to_do(self, mbart50: Case, tmp_path: Path) -> None:
        copied = copy(mbart50, tmp_path)
        (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        with pytest.raises(CheckpointError, match="git lfs pull"):
            copied.read()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100])
    def test_a_sentencepiece_model_that_is_none(self, marian: Case, content: bytes, tmp_path: Path) -> None:
        copied = copy(marian, tmp_path)
        (tmp_path / "source.spm").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"source\.spm"):
            copied.read()

    def test_pipes_and_broken_links_are_refused(self, marian: Case, tmp_path: Path) -> None:
        copied = copy(marian, tmp_path)
        (tmp_path / "vocab.json").unlink()
        os.mkfifo(tmp_path / "vocab.json")
        with pytest.raises(CheckpointError, match=r"vocab\.json"):
            copied.read()
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "vocab.json").symlink_to(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match=r"vocab\.json"):
            copied.read()

    def test_links_are_followed(self, marian: Case, tmp_path: Path) -> None:
        for path in marian.folder.iterdir():
            if path.is_file():
                (tmp_path / path.name).symlink_to(path)
        assert dataclasses.replace(marian, folder=tmp_path).read().framing == marian.read().framing

    @pytest.mark.parametrize(
        "values",
        [
            {"separate_vocabs": "yes"},
            {"added_tokens_decoder": [1]},
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            {"added_tokens_decoder": {"5": {"content": 3}}},
            {"added_tokens_decoder": {"5": {"content": "a", "special": "no"}}},
            {"added_tokens_decoder": {"999999999": {"content": "<x>", "special": True}}},
            {"eos_token": 3},
            {"additional_special_tokens": 3},
            {"additional_special_tokens": [None]},
            {"additional_special_tokens": ["<nowhere>"]},
            {"target_lang": 5},
            {"clean_up_tokenization_spaces": 1},
            {"unk_token": "<nowhere>"},
            {"eos_token": "<nowhere>"},
            {"separate_vocabs": True},
        ],
    )
    def test_settings_that_are_wrong(self, marian: Case, values: dict[str, object], tmp_path: Path) -> None:
        copied = copy(marian, tmp_path)
        write(tmp_path / "tokenizer_config.json", values)
        with pytest.raises((CheckpointError, TokenizerError)):
            copied.read()

    @pytest.mark.parametrize("value", ["2", 2.0, True, -1, 10**9, [1, 2], [], {}])
    @pytest.mark.parametrize("name", ["decoder_start_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id"])
    def test_special_ids_that_are_none(self, bart: Case, name: str, value: object) -> None:
        with pytest.raises(CheckpointError):
            bart.read({name: value})

    @pytest.mark.parametrize("value", [3, ["a"], [[]], [["a"]], [[-1]], [[10**9]], [3], [[True]]])
    def test_banned_ids_that_are_none(self, bart: Case, value: object) -> None:
        with pytest.raises(CheckpointError):
            bart.read(bad_words_ids=value)

    def test_an_empty_vocabulary_does_not_pass(self, tmp_path: Path) -> None:
        """In the original it does, and every text is unknown."""
        for family, kind in (("m2m_100", "Nllb"), ("mbart", "MBart50"), ("bart", "Bart")):
            folder = tmp_path / family
            empty = getattr(transformers, f"{kind}Tokenizer")()
            empty.save_pretrained(folder)
            with pytest.raises(TokenizerError, match="no pieces but special ones"):
                read_text(folder, {"model_type": family}, {}, 1000, 1000)

    def test_a_default_language_that_is_none_is_noted(self, nllb: Case, tmp_path: Path) -> None:
        copied = copy(nllb, tmp_path)
        values = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        write(tmp_path / "tokenizer_config.json", values | {"src_lang": "xyz_Latn"})
        text = copied.read()
        assert text.languages.default_source is None
        assert any("xyz_Latn" in note for note in text.notes)

    def test_huge_settings_are_not_read(self, marian: Case, tmp_path: Path) -> None:
        copied = copy(marian, tmp_path)
        with (tmp_path / "tokenizer_config.json").open("wb") as file:
            file.truncate((16 << 20) + 1)
        with pytest.raises(CheckpointError, match="larger than"):
            copied.read()

    def test_unknown_lists_of_languages(self, m2m100: Case, tmp_path: Path) -> None:
        copied = copy(m2m100, tmp_path)
        write(tmp_path / "tokenizer_config.json", {"language_codes": "other"})
        with pytest.raises(CheckpointError, match="m2m100, wmt21"):
            copied.read()


class TestAddedTokens:
    def test_special_ones_are_honoured(self, marian: Case, tmp_path: Path) -> None:
        copied = copy(marian, tmp_path)
        size = marian.sizes[0]
        write(tmp_path / "added_tokens.json", {"<new>": size})
        write(tmp_path / "tokenizer_config.json", {"additional_special_tokens": ["<new>"]})
        text = dataclasses.replace(copied, sizes=(size + 1, size + 1)).read()
        tokenizer = opened(text.source, tmp_path)
        assert tokenizer.piece_id("<new>") == size
        assert size not in tokenizer.encode("a <new> b")
        assert tokenizer.decode([size]) == ""

    @pytest.mark.parametrize("one", [0, 5, None])
    def test_others_are_refused_by_name(self, marian: Case, m2m100: Case, one: int | None, tmp_path: Path) -> None:
        for case in (marian, m2m100):
            (tmp_path / case.family).mkdir()
            copied = copy(case, tmp_path / case.family)
            write(copied.folder / "added_tokens.json", {"Wort": case.sizes[0] if one is None else one})
            with pytest.raises((TokenizerError, CheckpointError), match="Wort"):
                copied.read()

    @pytest.mark.parametrize("name", ["nllb", "mbart50", "bart"])
    def test_those_of_a_tokenizer_json_are_cut_as_there(
        self, name: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        case = request.getfixturevalue(name)
        original = type(case.original).from_pretrained(case.folder)
        original.add_tokens(["Frosch"])
        original.save_pretrained(tmp_path)
        tuned = dataclasses.replace(case, folder=tmp_path, original=original, sizes=(len(original), len(original)))
        text = tuned.read()
        tokenizer = opened(text.source, tmp_path)
        for content in ("Frosch", "der Frosch springt", "Froschteich </s> Frosch"):
            ids = tokenizer.encode(content)
            assert tokenizer.piece_id("Frosch") in ids
            if "</s>" not in content:
                assert [i for i in original(content).input_ids if i not in original.all_special_ids] == ids

    def test_a_new_language_of_nllb(self, nllb: Case, tmp_path: Path) -> None:
        original = transformers.NllbTokenizer.from_pretrained(nllb.folder)
        original.add_special_tokens({"additional_special_tokens": ["tyv_Cyrl"]}, replace_extra_special_tokens=False)
        original.save_pretrained(tmp_path)
        size = len(original)
        text = dataclasses.replace(nllb, folder=tmp_path, sizes=(size, size)).read()
        assert text.languages.target["tyv_Cyrl"] == original.convert_tokens_to_ids("tyv_Cyrl")
        assert len(text.languages.target) == 203

    def test_those_that_the_tokenizer_json_lacks_are_refused(self, nllb: Case, tmp_path: Path) -> None:
        copied = copy(nllb, tmp_path)
        write(tmp_path / "added_tokens.json", {"Frosch": nllb.sizes[0]})
        with pytest.raises(TokenizerError, match="Frosch"):
            copied.read()


def test_spaces_are_tidied_where_the_original_does(mbart50: Case, marian: Case, bart: Case, tmp_path: Path) -> None:
    content = "the frog . do n't ? it 's , a ! we 're"
    for case in (mbart50, marian, bart):
        folder = tmp_path / case.family
        folder.mkdir()
        copied = copy(case, folder)
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        write(folder / "tokenizer_config.json", values | {"clean_up_tokenization_spaces": True})
        original = type(case.original).from_pretrained(folder)
        ids = original(content).input_ids
        tokenizer = opened(copied.read().target, folder)
        assert tokenizer.decode(ids) == decoded(dataclasses.replace(copied, original=original), ids)
        assert (" ." in tokenizer.decode(ids)) == (case.family == "bart")  # the original spares byte pairs


def copy(case: Case, folder: Path) -> Case:
    for path in case.folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return dataclasses.replace(case, folder=folder)
