"""The text side of a Hugging Face folder: Marian, M2M100, NLLB, mBART, mBART-50, BART, Pegasus, T5, mT5, UMT5, ByT5.

What each family does is read in its tokenizer of transformers 5.24. Special tokens that are spelled out in a text are
text here, and the texts of Marian are not normalised, as there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvx.models.importers import languages as known
from kvx.models.importers.text import Text
from kvx.models.importers.tokenizer_json import FILE as JSON_FILE
from kvx.models.importers.tokenizer_json import byte_level, describe, read_tokenizer_json
from kvx.models.importers.tokenizer_settings import SETTINGS_FILE, TokenizerSettings, has, refuse_tokens, require
from kvx.models.importers.tokenizer_vocabularies import (
    SAVED_WITH,
    Pieces,
    Side,
    by_id,
    fairseq_pieces,
    make_bytes,
    make_side,
    read_ids,
    read_sentencepiece,
)
from kvx.runtime.bundle.framing import Framed, Framing, Languages
from kvx.runtime.errors import CheckpointError

SPM_FILE = "sentencepiece.bpe.model"
UNIGRAM_SPM_FILE = "spiece.model"  # of Pegasus and T5
IDS_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
MARIAN_FILES = ("source.spm", "target.spm", IDS_FILE)
MARIAN_TARGET_FILE = "target_vocab.json"

MADE_UP = 8  # words that M2M100 has beyond its languages, which stand for nothing
PEGASUS_OFFSET = 103
EXTRA_IDS = 100  # that T5 has beyond its pieces, which stand for text that is left out
MOST_OFFSET = 10_000
MARIAN_LANGUAGE = re.compile(r">>(.+)<<")
NLLB_LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][a-z]{3}")
MBART_LANGUAGE = re.compile(r"[a-z]{2}_[A-Z]{2}")

# The special ids of each class, where no file says them.
DEFAULTS: Mapping[str, Mapping[str, int | None]] = {
    "marian": {"decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0},
    "m2m_100": {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2},
    "bart": {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2},
    "mbart": {"decoder_start_token_id": None, "pad_token_id": 1, "eos_token_id": 2},
    "pegasus": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "t5": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "mt5": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "umt5": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
}


def read_text(
    folder: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    source_vocab_size: int,
    target_vocab_size: int,
) -> Text:
    """The text side of a folder with this config.json and generation_config.json ({} where there is none), for a model
    with so many ids on each side.

    Raises CheckpointError for files that are missing or unreadable and ids that cannot be, TokenizerError for
    vocabularies that are not the model's.
    """
    family = config.get("model_type")
    reader = READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        raise CheckpointError(
            f"{folder} has a model of the type {family!r:.60}",
            expected=f"one of {', '.join(READERS)}",
            remedy="Export a model of these families.",
        )
    sizes = (source_vocab_size, target_vocab_size)
    model = _Model(folder, str(family), config, generation, sizes, TokenizerSettings.read(folder))
    text = reader(model)
    _check(text, model)
    return text


@dataclass(frozen=True, slots=True)
class _Model:
    """A folder with what its files say of the model."""

    folder: Path
    family: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    sizes: tuple[int, int]  # ids of the source and of the target
    settings: TokenizerSettings

    @property
    def joint_size(self) -> int:
        """How many ids both sides have."""
        return min(self.sizes)

    def optional_id(self, name: str) -> int | None:
        """A special id, or None where neither a file nor the class says it. Raises CheckpointError."""
        value = self._value(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and type(value) is not int:
            self.refuse_id(name, value)
        return value

    @property
    def forced(self) -> int | None:
        """The id of the first target token, where the files fix one. Raises CheckpointError."""
        value = self._searching("forced_bos_token_id")
        if value is not None and type(value) is not int:
            self.refuse_id("forced_bos_token_id", value)
        return value

    def id(self, name: str) -> int:
        """A special id that must be known. Raises CheckpointError."""
        value = self.optional_id(name)
        if value is None:
            self.refuse_id(name, None)
        return value

    @property
    def never(self) -> tuple[int, ...]:
        """The ids that generation never gives by themselves."""
        listed = self._searching("bad_words_ids") or []
        if not isinstance(listed, list) or not all(isinstance(one, list) and one for one in listed):
            self.refuse_id("bad_words_ids", listed)
        flat = [one for sequence in listed for one in sequence]
        if not all(type(one) is int for one in flat):
            self.refuse_id("bad_words_ids", listed)
        ids = dict.fromkeys(sequence[0] for sequence in listed if len(sequence) == 1)
        ids.pop(self.id("eos_token_id"), None)  # which the original does not ban either
        return tuple(ids)

    def refuse_id(self, name: str, value: object) -> NoReturn:
        """Raises CheckpointError for a special id."""
        raise CheckpointError(
            f"The {name} of {self.folder} is {value!r:.60}",
            expected=f"one id from 0 to {self.sizes[1] - 1}",
            remedy="Correct it in generation_config.json or config.json.",
        )

    def _searching(self, name: str) -> object:
        """A setting of the search, for which the original asks one file alone."""
        return (self.generation or self.config).get(name)

    def _value(self, name: str) -> object:
        for values in (self.generation, self.config):
            if values.get(name) is not None:
                return values[name]
        return DEFAULTS[self.family].get(name)


def _marian(model: _Model) -> Text:
    """Two sentencepiece models, and a vocabulary file for both or for each. A language is the first source token."""
    settings = model.settings
    require(model.folder, *MARIAN_FILES)
    apart = settings.flag("separate_vocabs")
    if apart:
        require(model.folder, MARIAN_TARGET_FILE)
    source_ids = read_ids(model.folder / IDS_FILE)
    target_ids = read_ids(model.folder / MARIAN_TARGET_FILE) if apart else source_ids
    codes = {match[1]: piece for piece in source_ids if (match := MARIAN_LANGUAGE.fullmatch(piece))}
    source = _marian_side(model, settings, "source.spm", source_ids, codes.values())
    of_target = settings.without_added() if apart else settings  # the ids that the settings name are the source's
    target = _marian_side(model, of_target, "target.spm", target_ids, codes.values())
    ids = source.languages(codes)
    default = settings.text("target_lang")
    chosen = next(iter(ids)) if len(ids) == 1 else default if default in ids else None
    notes = _notes(source, target)
    if len(ids) == 1:
        notes = (*notes, f"took {chosen} as the default target, which is the only language of the vocabulary")
    framing = Framing(
        prefix=("target_language",) if ids else (),
        suffix=(source.id(settings.piece("eos_token", "</s>")),),
        start=model.id("decoder_start_token_id"),
        eos=model.id("eos_token_id"),
        pad=model.id("eos_token_id" if apart else "pad_token_id"),  # an id of both vocabularies
        forced=_fixed(model),
        never=tuple(dict.fromkeys((model.id("pad_token_id"), *model.never))),
    )
    languages = Languages(target=ids, default_target=chosen, marked=bool(ids))
    return Text(source.files, target.files, framing, languages, notes)


def _marian_side(
    model: _Model, settings: TokenizerSettings, name: str, ids: Mapping[str, int], languages: Iterable[str]
) -> Side:
    size = model.sizes[0] if name == "source.spm" else model.sizes[1]
    unknown = settings.piece("unk_token", "<unk>")
    special = {unknown, settings.piece("eos_token", "</s>"), settings.piece("pad_token", "<pad>"), *languages}
    return make_side(model.folder / name, by_id(ids), special=special, unknown=unknown, size=size, settings=settings)


def _m2m_100(model: _Model) -> Text:
    """M2M100 by its two files, else NLLB."""
    if has(model.folder, IDS_FILE) and has(model.folder, SPM_FILE):
        return _m2m100(model)
    if has(model.folder, JSON_FILE) or has(model.folder, SPM_FILE):
        return _nllb(model)
    raise CheckpointError(
        f"{model.folder} has neither {JSON_FILE} nor {SPM_FILE}",
        expected=f"the tokenizer of M2M100 ({IDS_FILE} and {SPM_FILE}) or of NLLB ({JSON_FILE} or {SPM_FILE})",
        remedy="Copy or download the whole folder, its tokenizer included.",
    )


def _m2m100(model: _Model) -> Text:
    settings = model.settings
    ids = read_ids(model.folder / IDS_FILE)
    gaps = sorted(set(range(len(ids))) - set(ids.values()))
    if gaps:
        expected = f"ids from 0 to {len(ids) - 1}, after which the languages follow"
        refuse_tokens(model.folder / IDS_FILE, "ids without a piece", [str(one) for one in gaps], expected, SAVED_WITH)
    codes = {code: f"__{code}__" for code in _m2m100_languages(settings)}
    made_up: Pieces = [None] * settings.number("num_madeup_words", MADE_UP, MOST_OFFSET)
    side = make_side(
        model.folder / SPM_FILE,
        [*by_id(ids), *codes.values(), *made_up],
        special={*_common_special(settings), *codes.values()},
        unknown=settings.piece("unk_token", "<unk>"),
        size=model.joint_size,
        settings=settings,
    )
    return _between_languages(model, side, side.languages(codes), after=False)


def _m2m100_languages(settings: TokenizerSettings) -> tuple[str, ...]:
    lists = {"m2m100": known.M2M100, "wmt21": known.WMT21}
    name = settings.text("language_codes") or "m2m100"
    if name not in lists:
        raise CheckpointError(
            f"{settings.folder / SETTINGS_FILE} has the language_codes {name!r:.60}",
            expected=f"one of {', '.join(lists)}",
            remedy="Export a model of these lists of languages.",
        )
    return lists[name]


def _nllb(model: _Model) -> Text:
    side = _fairseq_side(model, known.NLLB)
    ids = _languages(side, known.NLLB, model.settings, NLLB_LANGUAGE)
    return _between_languages(model, side, ids, after=model.settings.flag("legacy_behaviour"))


def _mbart(model: _Model) -> Text:
    """mBART-50 is told to which language by the first target token, mBART-25 by the one before it."""
    settings = model.settings
    name = settings.text("tokenizer_class") or ""
    side = _fairseq_side(model, _mbart_languages(model, name))
    fifty = name.startswith("MBart50") if name.startswith("MBart") else _has_later_languages(side)
    listed = known.MBART50 if fifty else known.MBART
    ids = _languages(side, listed, settings, MBART_LANGUAGE)
    return _between_languages(model, side, ids, after=False) if fifty else _from_language(model, side, ids)


def _mbart_languages(model: _Model, name: str) -> Sequence[str]:
    """The languages beside a sentencepiece model, which does not list them: the class tells, or the size."""
    if has(model.folder, JSON_FILE):
        return known.MBART50
    if name.startswith("MBart"):
        return known.MBART50 if name.startswith("MBart50") else known.MBART
    if any(token.piece in known.MBART50[len(known.MBART) :] for token in model.settings.added.values()):
        return known.MBART50
    require(model.folder, SPM_FILE)
    room = model.joint_size - len(read_sentencepiece(model.folder / SPM_FILE)) - 2
    return known.MBART50 if room >= len(known.MBART50) else known.MBART


def _has_later_languages(side: Side) -> bool:
    return any(code in side.ids for code in known.MBART50[len(known.MBART) :])


def _fairseq_side(model: _Model, listed: Sequence[str]) -> Side:
    """The tokenizer.json, or the sentencepiece model with fairseq's numbers, its languages and <mask> at the end."""
    settings = model.settings
    if has(model.folder, JSON_FILE):
        return read_tokenizer_json(settings, model.joint_size).side
    require(model.folder, SPM_FILE)
    path = model.folder / SPM_FILE
    first = [settings.piece(*one) for one in (("bos_token", "<s>"), ("pad_token", "<pad>"))]
    first += [settings.piece(*one) for one in (("eos_token", "</s>"), ("unk_token", "<unk>"))]
    mask = settings.piece("mask_token", "<mask>")
    numbered = any(token.piece in listed for token in settings.added.values())
    return make_side(
        path,
        fairseq_pieces(read_sentencepiece(path), first, () if numbered else (*listed, mask)),
        special={*first, *listed, mask},
        unknown=first[-1],
        size=model.joint_size,
        settings=settings,
    )


def _bart(model: _Model) -> Text:
    settings = model.settings
    if has(model.folder, JSON_FILE):
        described = read_tokenizer_json(settings, model.joint_size)
    else:
        require(model.folder, IDS_FILE, MERGES_FILE)
        path = model.folder / IDS_FILE
        described = describe(byte_level(settings), path, settings, model.joint_size, made=True)
    side = described.side
    around = described.around() or (
        (side.id(settings.piece("cls_token", "<s>")),),
        (side.id(settings.piece("sep_token", "</s>")),),
    )
    return _one_language(model, side, *around)


def _pegasus(model: _Model) -> Text:
    settings = model.settings
    around = None
    if has(model.folder, JSON_FILE):
        described = read_tokenizer_json(settings, model.joint_size)
        side, around = described.side, described.around()
    else:
        side = _pegasus_side(model)
    return _one_language(model, side, *(around or ((), (side.id(settings.piece("eos_token", "</s>")),))))


def _pegasus_side(model: _Model) -> Side:
    """Ids up to the offset were used in pretraining only."""
    settings = model.settings
    require(model.folder, UNIGRAM_SPM_FILE)
    path = model.folder / UNIGRAM_SPM_FILE
    offset = settings.number("offset", PEGASUS_OFFSET, MOST_OFFSET)
    pieces = read_sentencepiece(path)
    first = [settings.piece("pad_token", "<pad>"), settings.piece("eos_token", "</s>")]
    first += [settings.piece("mask_token_sent", "<mask_1>"), settings.piece("mask_token", "<mask_2>")]
    first += [f"<unk_{one}>" for one in range(2, offset)]
    return make_side(
        path,
        [*first, *pieces[2:]],
        special=first,
        unknown=settings.piece("unk_token", "<unk>"),
        size=model.joint_size,
        settings=settings,
    )


def _t5(model: _Model) -> Text:
    """Pieces by their own ids, or bytes. What a text is for stands in it, as in "translate English to German: "."""
    settings = model.settings
    if (settings.text("tokenizer_class") or "").startswith("ByT5"):
        side = make_bytes(settings, model.joint_size)
    elif has(model.folder, JSON_FILE):
        side = read_tokenizer_json(settings, model.joint_size).side
    else:
        side = _t5_side(model)
    return _one_language(model, side, (), (side.id(settings.piece("eos_token", "</s>")),))


def _t5_side(model: _Model) -> Side:
    settings = model.settings
    require(model.folder, UNIGRAM_SPM_FILE)
    path = model.folder / UNIGRAM_SPM_FILE
    named = (("pad_token", "<pad>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    special = [settings.piece(*one) for one in named]
    number = settings.number("extra_ids", EXTRA_IDS, MOST_OFFSET)
    pieces = read_sentencepiece(path)
    extra = [f"<extra_id_{number - 1 - one}>" for one in range(number)]
    return make_side(
        path,
        [*pieces, *(piece for piece in extra if piece not in pieces)],
        special=[*special, *extra],
        unknown=special[-1],
        size=model.joint_size,
        settings=settings,
    )


def _between_languages(model: _Model, side: Side, ids: dict[str, int], *, after: bool) -> Text:
    """The language before the text, or after eos, and as the first target token."""
    settings = model.settings
    eos = side.id(settings.piece("eos_token", "</s>"))
    forced_id = model.forced
    chosen = _code(ids, forced_id)
    asked = forced_id is None or chosen is not None
    forced: tuple[Framed, ...] = ("target_language",) if asked else _fixed(model)
    prefix: tuple[Framed, ...] = () if after else ("source_language",)
    suffix: tuple[Framed, ...] = (eos, "source_language") if after else (eos,)
    start = model.optional_id("decoder_start_token_id")
    return _text(
        model,
        side,
        {"prefix": prefix, "suffix": suffix, "start": eos if start is None else start, "forced": forced},
        _default_languages(model, ids, chosen, asked=asked),
    )


def _from_language(model: _Model, side: Side, ids: dict[str, int]) -> Text:
    """The source language after eos, and decoding from the target language."""
    start_id = model.optional_id("decoder_start_token_id")
    chosen = _code(ids, start_id)
    asked = start_id is None or chosen is not None
    start: Framed = "target_language" if asked or start_id is None else start_id
    suffix: tuple[Framed, ...] = (side.id(model.settings.piece("eos_token", "</s>")), "source_language")
    return _text(
        model,
        side,
        {"prefix": (), "suffix": suffix, "start": start, "forced": _fixed(model)},
        _default_languages(model, ids, chosen, asked=asked),
    )


def _one_language(model: _Model, side: Side, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Text:
    start = model.id("decoder_start_token_id")
    framing = {"prefix": prefix, "suffix": suffix, "start": start, "forced": _fixed(model)}
    return _text(model, side, framing, (Languages(), ()))


def _text(model: _Model, side: Side, framing: Mapping[str, Any], languages: tuple[Languages, tuple[str, ...]]) -> Text:
    whole = Framing(**framing, eos=model.id("eos_token_id"), pad=model.id("pad_token_id"), never=model.never)
    return Text(side.files, side.files, whole, languages[0], (*_notes(side), *languages[1]))


def _default_languages(
    model: _Model, ids: dict[str, int], chosen: str | None, *, asked: bool
) -> tuple[Languages, tuple[str, ...]]:
    """The languages with their defaults: what the model's files fix, then what the tokenizer's do; and notes on codes
    that are none. A target is only `asked` for where it has a place.
    """
    source, target = model.settings.text("src_lang"), model.settings.text("tgt_lang")
    odd = [code for code in (source, target) if code is not None and code not in ids]
    notes = tuple(f"the default language {code!r:.60} of {SETTINGS_FILE} is none of the model's" for code in odd)
    if not ids:
        raise CheckpointError(
            f"The tokenizer in {model.folder} has no languages",
            expected="the pieces of the languages that the model translates between",
            remedy="Save the tokenizer with its tokenizer.json, or copy the one of the original model.",
        )
    return (
        Languages(
            source=ids,
            target=ids if asked else {},
            default_source=source if source in ids else None,
            default_target=(chosen or (target if target in ids else None)) if asked else None,
        ),
        notes,
    )


def _languages(
    side: Side, listed: Sequence[str], settings: TokenizerSettings, pattern: re.Pattern[str]
) -> dict[str, int]:
    """The languages of a list, and those that were added to it."""
    added = [*settings.extra, *(token.piece for token in settings.added.values() if token.special)]
    codes = dict.fromkeys((*listed, *filter(pattern.fullmatch, added)))
    return side.languages({code: code for code in codes})


def _fixed(model: _Model) -> tuple[int, ...]:
    """The first target token, where it is always the same."""
    one = model.forced
    return () if one is None else (one,)


def _code(ids: Mapping[str, int], one: int | None) -> str | None:
    return next((code for code, held in ids.items() if held == one), None)


def _common_special(settings: TokenizerSettings) -> set[str]:
    names = (("bos_token", "<s>"), ("pad_token", "<pad>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    return {settings.piece(name, piece) for name, piece in names}


def _notes(*sides: Side) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for side in sides for note in side.notes))


def _check(text: Text, model: _Model) -> None:
    """The ids around a text are ids of the model."""
    wrong = [*text.framing.problems(*model.sizes), *text.languages.problems(*model.sizes)]
    if wrong:
        raise CheckpointError(
            f"The special ids of {model.folder} are wrong ({', '.join(wrong)}): {text.framing}"[:400],
            expected=f"ids below {model.sizes[0]} in sources and below {model.sizes[1]} in targets",
            remedy="Check config.json and generation_config.json, and that the tokenizer is the model's.",
        )


READERS: Mapping[str, Callable[[_Model], Text]] = {
    "marian": _marian,
    "m2m_100": _m2m_100,
    "bart": _bart,
    "mbart": _mbart,
    "pegasus": _pegasus,
    "t5": _t5,
    "mt5": _t5,
    "umt5": _t5,
}
