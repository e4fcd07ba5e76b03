"""The text side of a fairseq checkpoint: its dictionaries, and the subword model beside them.

The facts are those of fairseq/data/dictionary.py, fairseq/data/encoders and fairseq/tasks/translation.py
(https://github.com/facebookresearch/fairseq).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvx.models.importers.subwords import TOKENISED, cutting, read_lines
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.models.importers.tokenizer_settings import refuse_tokens
from kvx.runtime.bundle.framing import Framing, Languages, Place
from kvx.runtime.bundle.vocabulary import MOST_PIECES
from kvx.runtime.errors import CheckpointError, TokenizerError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNKNOWN = range(4)
MOST_MADE_UP = 1024  # rows of the embedding without a piece
LINE = re.compile(r"(.+?)(?: (\d+))?( #fairseq:overwrite)?")
OVERWRITTEN = " #fairseq:overwritten"  # no text has this piece: it holds a space
KINDS = {None: None, "sentencepiece": "sentencepiece", "subword_nmt": "bpe", "fastbpe": "bpe"}
PLAIN, MANY = "translation", "translation_multi_simple_epoch"  # the tasks that are read
LANGUAGE_STYLES = {"multilingual": "__{}__", "mbart": "[{}]"}  # how a language is spelled as a piece
NAME = re.compile(r"[\w.-]+")
REMEDY = "Copy the folder that fairseq-preprocess wrote beside the checkpoint."


def read_text(folder: Path, settings: Mapping[str, Any], source_size: int, target_size: int) -> Text:
    """The text side of the checkpoint in a folder, for a model with so many ids on each side. Raises CheckpointError
    and TokenizerError.
    """
    task = settings.get("task") or PLAIN
    if task == MANY:
        return _of_many_languages(folder, settings, source_size)
    if task != PLAIN:
        raise CheckpointError(
            f"The checkpoint in {folder} is of fairseq's task {task!r:.60}",
            expected=f"the task {PLAIN} or {MANY}",
            remedy="Convert the model to the folder of a Hugging Face family, if it has one.",
        )
    languages = [_language(folder, settings, side) for side in ("source", "target")]
    sides = [
        _side(folder, settings, language, size)
        for language, size in zip(languages, (source_size, target_size), strict=True)
    ]
    framing = Framing(prefix=(), suffix=(EOS,), start=EOS, eos=EOS, pad=PAD, never=(PAD,))
    return Text(sides[0], sides[1], framing, Languages(), _notes(settings, sides[0]))


def _of_many_languages(folder: Path, settings: Mapping[str, Any], size: int) -> Text:
    """One dictionary, to which a piece for each language is appended: before the source, and first in the target."""
    languages = _languages(folder, settings)
    spelled = LANGUAGE_STYLES.get(settings.get("lang_tok_style") or "multilingual")
    before, first = settings.get("encoder_langtok"), settings.get("decoder_langtok")
    if spelled is None or before not in (None, "src", "tgt"):
        raise CheckpointError(
            f"The checkpoint in {folder} has lang_tok_style = {settings.get('lang_tok_style')!r:.40} and "
            f"encoder_langtok = {before!r:.40}",
            expected=f"{' or '.join(LANGUAGE_STYLES)}, and src, tgt or none",
            remedy="This way of naming languages is not supported.",
        )
    pieces = _pieces(_dictionary_of_all(folder, settings, languages))
    codes = {code: spelled.format(code) for code in languages}
    laid = list(dict.fromkeys([*pieces, *(codes.values() if before or first else ())]))
    if not 0 <= size - len(laid) < MOST_MADE_UP:
        raise TokenizerError(
            f"The dictionary in {folder} has {len(laid)} pieces with {len(codes)} languages",
            expected=f"{size}, the rows of the model's embedding, or a few less",
            remedy="Copy the dictionary that the model was trained with.",
        )
    special = [*SPECIAL[:UNKNOWN], *codes.values(), SPECIAL[UNKNOWN]]
    side = cutting(folder, [*laid], special, "all", kind=_kind(folder, settings))
    ids = {code: laid.index(piece) for code, piece in codes.items() if before or first}
    prefix: dict[str | None, tuple[Place, ...]] = {None: (), "src": ("source_language",), "tgt": ("target_language",)}
    framing = Framing(
        prefix=prefix[before],
        suffix=(EOS,),
        start=EOS,
        eos=EOS,
        pad=PAD,
        forced=("target_language",) if first else (),
        never=(PAD,),
    )
    known = Languages(source=ids if before == "src" else {}, target=ids if first or before == "tgt" else {})
    return Text(side, side, framing, known, _notes(settings, side))


def _languages(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The codes in the order of their pieces: those that are listed, or those of the pairs, sorted."""
    listed, pairs = (_names(settings.get(name)) for name in ("langs", "lang_pairs"))
    found = listed or sorted({code for pair in pairs for code in pair.split("-")})
    if not found or not all(map(NAME.fullmatch, found)):
        raise CheckpointError(
            f"The checkpoint in {folder} does not list its languages",
            expected="langs or lang_pairs among its settings",
            remedy="Use a checkpoint as fairseq-train wrote it.",
        )
    return found


def _names(value: object) -> list[str]:
    """Names in a list, or with commas between them."""
    if isinstance(value, str):
        return [name for name in value.split(",") if name]
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def _dictionary_of_all(folder: Path, settings: Mapping[str, Any], languages: list[str]) -> Path:
    """The fixed dictionary, or that of any language: they are equal."""
    fixed = settings.get("fixed_dictionary")
    names = [Path(fixed).name] if isinstance(fixed, str) else []
    names += [f"dict.{code}.txt" for code in languages]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no {names[0]}", expected="the dictionary of all languages", remedy=REMEDY)
    return found


def _notes(settings: Mapping[str, Any], side: TokenizerFiles) -> tuple[str, ...]:
    return (TOKENISED,) if _is_tokenised(settings, side) else ()


def _language(folder: Path, settings: Mapping[str, Any], side: str) -> str:
    """The name of a side's language."""
    name = settings.get(f"{side}_lang")
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    raise CheckpointError(
        f"The checkpoint in {folder} does not name its {side}_lang",
        expected="the language that its dictionary is called after",
        remedy="Use a checkpoint as fairseq-train wrote it.",
    )


def _side(folder: Path, settings: Mapping[str, Any], language: str, size: int) -> TokenizerFiles:
    pieces = _read_dictionary(folder / f"dict.{language}.txt", size)
    return cutting(folder, pieces, SPECIAL, language, kind=_kind(folder, settings))


def _kind(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """What the settings say that cuts texts, if they do. Raises TokenizerError."""
    kind = settings.get("bpe")
    if isinstance(kind, str | None) and kind in KINDS:
        return KINDS[kind]
    raise TokenizerError(
        f"The checkpoint in {folder} cuts texts with bpe = {kind!r:.40}",
        expected="sentencepiece, subword_nmt, fastbpe or none",
        remedy="This tokenizer is not supported.",
    )


def _is_tokenised(settings: Mapping[str, Any], side: TokenizerFiles) -> bool:
    """Whether texts were tokenised before they were cut into pieces."""
    return side.kind != "vocabulary" or settings.get("tokenizer") not in (None, "space")


def _read_dictionary(path: Path, size: int) -> list[str | None]:
    """The pieces of a dictionary for a model with so many ids. Raises CheckpointError and TokenizerError."""
    pieces = _pieces(path)
    if len(pieces) != size or size > MOST_PIECES:
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces with the four special ones",
            expected=f"{size}, the rows of the model's embedding",
            remedy="Copy the dictionary that the model was trained with.",
        )
    return [*pieces]


def _pieces(path: Path) -> list[str]:
    """The pieces of a dictionary by id, four special ones first. Raises CheckpointError and TokenizerError."""
    pieces = list(SPECIAL)
    ids = {piece: one for one, piece in enumerate(SPECIAL)}
    twice = []
    for line in read_lines(path):
        match = LINE.fullmatch(line)
        piece = match[1] if match else line
        if piece in ids and match and match[3]:  # the new one counts, and nothing is spelled as the old one any more
            pieces[ids[piece]] = f"{piece}{OVERWRITTEN}"
        elif piece in ids:
            twice.append(piece)
        ids[piece] = len(pieces)
        pieces.append(piece)
    if twice:
        refuse_tokens(path, "pieces that come twice", twice, "each piece once", REMEDY)
    return pieces
