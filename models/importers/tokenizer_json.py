"""A tokenizer.json as a folder has it: its pieces, what it puts around a text, and whether it can be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvx.models.importers.text import TokenizerFiles
from kvx.models.importers.tokenizer_settings import (
    MOST_VOCABULARY,
    TokenizerSettings,
    read_bounded,
    read_object,
    refuse_tokens,
)
from kvx.models.importers.tokenizer_vocabularies import SAVED_WITH, Side, check_beyond, read_ids
from kvx.runtime.bundle.vocabulary import MOST_PIECES, TIDIED, WORD_START
from kvx.runtime.errors import TokenizerError

FILE = "tokenizer.json"

Processor = Mapping[str, Any] | None
Around = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Described:
    """A side, and what the file itself puts around a text."""

    side: Side
    processor: Processor

    def around(self) -> Around | None:
        """The ids before and after a text, or None where the file puts none. Raises TokenizerError."""
        return _around(self.processor, self.side.path)


def read_tokenizer_json(settings: TokenizerSettings, size: int) -> Described:
    """The tokenizer.json of a folder, whose ids must be below `size` but for special ones, which are then cut off.

    Raises CheckpointError and TokenizerError.
    """
    path = settings.folder / FILE
    return describe(read_object(path, MOST_VOCABULARY), path, settings, size)


def describe(
    values: dict[str, Any], path: Path, settings: TokenizerSettings, size: int, *, made: bool = False
) -> Described:
    """What a tokenizer.json says. A file that was `made` here, or has to be changed, is written anew."""
    try:
        model, added = values["model"], values.get("added_tokens") or []
        ids = _model_ids(model)
        ids_added = {token["content"]: token["id"] for token in added}
        special = {token["content"] for token in added if token["special"]}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise TokenizerError(
            f"{path} has no model with a vocabulary and added tokens",
            expected="a tokenizer.json of the kinds BPE and Unigram",
            remedy=SAVED_WITH,
        ) from None
    _check_ids(path, ids, ids_added)
    ids |= ids_added
    _check_pieces(path, model, ids, special)
    _check_added(path, ids, settings)
    notes = check_beyond(ids, special, size, path)
    if notes:
        _cut(values, size)
    tidy = settings.flag("clean_up_tokenization_spaces") and model.get("type") == "Unigram"
    if tidy:
        values["decoder"] = _tidying(values.get("decoder"))
    changed = made or tidy or bool(notes)
    content = json.dumps(values, ensure_ascii=False).encode() if changed else path
    kept = {piece: one for piece, one in ids.items() if one < size}
    side = Side(TokenizerFiles("huggingface", {"tokenizer": content}), path, kept, notes)
    return Described(side, values.get("post_processor"))


def byte_level(settings: TokenizerSettings) -> dict[str, Any]:
    """The tokenizer.json of a vocab.json and merges.txt, built by the package tokenizers. Raises TokenizerError."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise TokenizerError(
            f"{settings.folder} has vocab.json and merges.txt, and the package tokenizers is not installed",
            expected="the package tokenizers, or a tokenizer.json",
            remedy="Install it with: pip install 'kvx[tokenizers]'",
        ) from None
    path = settings.folder / "vocab.json"
    ids = read_ids(path)
    merges = _read_merges(settings.folder / "merges.txt", ids)
    spaced = settings.flag("add_prefix_space")
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = decoders.ByteLevel()
    for name, piece in _byte_level_special(settings).items():
        backend.add_special_tokens([AddedToken(piece, special=True, normalized=False, lstrip=name == "mask_token")])
    for _, token in sorted(settings.added.items()):
        one = AddedToken(token.piece, special=token.special)
        (backend.add_special_tokens if token.special else backend.add_tokens)([one])
    values: dict[str, Any] = json.loads(backend.to_str())
    values["post_processor"] = _classifying(settings, ids)
    return values


def _byte_level_special(settings: TokenizerSettings) -> dict[str, str]:
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return {f"{name}_token": settings.piece(f"{name}_token", piece) for name, piece in names.items()}


def _classifying(settings: TokenizerSettings, ids: Mapping[str, int]) -> dict[str, Any]:
    """What puts <s> before and </s> after a text."""
    special = _byte_level_special(settings)
    first, last = special["cls_token"], special["sep_token"]
    for piece in (first, last):
        if piece not in ids:
            refuse_tokens(settings.folder / "vocab.json", "special tokens missing", [piece], "them in it", SAVED_WITH)
    return {
        "type": "RobertaProcessing",
        "sep": [last, ids[last]],
        "cls": [first, ids[first]],
        "trim_offsets": True,
        "add_prefix_space": settings.flag("add_prefix_space"),
    }


def _read_merges(path: Path, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that are joined, first to last. Raises CheckpointError and TokenizerError."""
    try:
        lines = read_bounded(path, MOST_VOCABULARY).decode().split("\n")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path} is not in UTF-8", expected="merges of pieces", remedy=SAVED_WITH) from None
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    wrong = [" ".join(pair) for pair in pairs if len(pair) != 2 or not {pair[0], pair[1], "".join(pair)} <= ids.keys()]
    if wrong:
        refuse_tokens(path, "lines that are no merge", wrong, "two pieces of vocab.json that make a third", SAVED_WITH)
    return [(first, second) for first, second in pairs]


def _model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if model.get("type") not in (None, "BPE", "Unigram"):
        raise ValueError(model["type"])
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {piece: one for one, (piece, _) in reversed(list(enumerate(vocabulary)))}  # of two alike the first


def _check_ids(path: Path, ids: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """The ids are numbers, and no two pieces have one."""
    pieces: dict[int, str] = {}
    for piece, one in (*ids.items(), *added.items()):
        if not isinstance(piece, str) or type(one) is not int or not 0 <= one < MOST_PIECES:
            refuse_tokens(path, "pieces without an id", [str(piece)], f"ids from 0 to {MOST_PIECES - 1}", SAVED_WITH)
        if pieces.setdefault(one, piece) != piece:
            refuse_tokens(path, "pieces with the id of another", [piece], "an id for each piece", SAVED_WITH)
    if pieces and max(pieces) >= len(pieces):
        gap = next(one for one in range(max(pieces)) if one not in pieces)
        refuse_tokens(path, "ids without a piece", [str(gap)], "ids without gaps", SAVED_WITH)
    moved = [piece for piece, one in added.items() if ids.get(piece, one) != one]
    if moved:
        refuse_tokens(path, "added tokens with another id in the vocabulary", moved, "one id for each", SAVED_WITH)


def _check_pieces(path: Path, model: Mapping[str, Any], ids: Mapping[str, int], special: set[str]) -> None:
    """There are pieces for texts, and one for what is none of them."""
    if not any(piece not in special and piece != WORD_START for piece in ids):
        raise TokenizerError(
            f"{path} has no pieces but special ones",
            expected="the vocabulary that the model was trained with",
            remedy="Save the tokenizer again from its original files.",
        )
    unknown = model.get("unk_token") or "<unk>"
    if unknown not in ids or ("unk_id" in model and model["unk_id"] not in (None, ids[unknown])):
        raise TokenizerError(
            f"{path} has no {unknown} that stands for unknown pieces",
            expected="a piece for what it does not know",
            remedy=SAVED_WITH,
        )


def _check_added(path: Path, ids: Mapping[str, int], settings: TokenizerSettings) -> None:
    """The files beside it add no other tokens."""
    other = [token.piece for one, token in settings.added.items() if ids.get(token.piece) != one]
    other += [piece for piece in settings.extra if piece not in ids]
    if other:
        refuse_tokens(
            path,
            "tokens missing that the settings beside it add",
            other,
            "them at the same ids",
            "Save the tokenizer again, so that its tokenizer.json has them.",
        )


def _cut(values: dict[str, Any], size: int) -> None:
    """Takes special tokens with ids from `size` on out of the file."""
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, dict):
        values["model"]["vocab"] = {piece: one for piece, one in vocabulary.items() if one < size}
    else:
        values["model"]["vocab"] = vocabulary[:size]
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < size]


def _tidying(decoder: Mapping[str, Any] | None) -> dict[str, Any]:
    """A decoder that also drops the spaces before punctuation."""
    replaced = [{"type": "Replace", "pattern": {"String": spaced}, "content": spaced.strip()} for spaced in TIDIED]
    return {"type": "Sequence", "decoders": [*([decoder] if decoder else []), {"type": "Fuse"}, *replaced]}


def _around(processor: Processor, path: Path) -> Around | None:
    """The ids that a post-processor puts before and after a text."""
    try:
        return _ids_around(processor)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise TokenizerError(
            f"{path} puts special tokens around a text in a way that kvx does not know",
            expected="a post-processor of the kinds TemplateProcessing, RobertaProcessing and BertProcessing",
            remedy=SAVED_WITH,
        ) from None


def _ids_around(processor: Processor) -> Around | None:
    if processor is None or processor["type"] == "ByteLevel":
        return None
    if processor["type"] == "Sequence":
        found = [around for one in processor["processors"] if (around := _ids_around(one)) is not None]
        if len(found) > 1:
            raise ValueError("several")
        return found[0] if found else None
    if processor["type"] in ("RobertaProcessing", "BertProcessing"):
        return (_plain([processor["cls"][1]]), _plain([processor["sep"][1]]))
    if processor["type"] != "TemplateProcessing":
        raise ValueError(processor["type"])
    parts = processor["single"]
    [place] = [index for index, part in enumerate(parts) if "Sequence" in part]
    ids = [
        _plain(processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
        for part in parts
        if "Sequence" not in part
    ]
    return (tuple(one for held in ids[:place] for one in held), tuple(one for held in ids[place:] for one in held))


def _plain(ids: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(one) is int for one in ids):
        raise TypeError("no ids")
    return tuple(ids)
