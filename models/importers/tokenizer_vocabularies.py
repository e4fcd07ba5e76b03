"""Pieces by id, of sentencepiece models and of the files of pieces beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kvx.models.importers.text import TokenizerFiles
from kvx.models.importers.tokenizer_settings import (
    ADDED_FILE,
    MOST_VOCABULARY,
    SETTINGS_FILE,
    TokenizerSettings,
    read_bounded,
    read_object,
    refuse_tokens,
)
from kvx.runtime.bundle.vocabulary import BYTES, MOST_PIECES, Vocabulary
from kvx.runtime.errors import TokenizerError

Pieces = list[str | None]

LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z]\w+|__\w+__|>>.+<<")  # as the families spell them
SAVED_WITH = "Save the tokenizer again with the model, and copy the whole folder."


@dataclass(frozen=True, slots=True)
class Side:
    """The tokenizer of one side: its files, and what its pieces are called in the model."""

    files: TokenizerFiles
    path: Path  # the file that says so
    ids: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def id(self, piece: str) -> int:
        """The id of a piece that must be there. Raises TokenizerError."""
        if piece not in self.ids:
            raise TokenizerError(
                f"{self.path} has no {piece}", expected="a vocabulary with its special tokens", remedy=SAVED_WITH
            )
        return self.ids[piece]

    def languages(self, codes: Mapping[str, str]) -> dict[str, int]:
        """The ids of languages, from their pieces by code; without those that the vocabulary does not have."""
        return {code: self.ids[piece] for code, piece in codes.items() if piece in self.ids}


def read_ids(path: Path) -> dict[str, int]:
    """A file of pieces and their ids, which are distinct. Raises CheckpointError and TokenizerError."""
    ids = read_object(path, MOST_VOCABULARY)
    wrong = [piece for piece, one in ids.items() if type(one) is not int or not 0 <= one < MOST_PIECES]
    if wrong:
        refuse_tokens(path, "pieces without an id", wrong, f"ids from 0 to {MOST_PIECES - 1}", SAVED_WITH)
    if not ids:
        raise TokenizerError(f"{path} has no pieces", expected="a vocabulary", remedy=SAVED_WITH)
    by_id = {one: piece for piece, one in ids.items()}
    twice = [piece for piece, one in ids.items() if by_id[one] != piece]
    if twice:
        refuse_tokens(path, "pieces with the id of another", twice, "an id for each piece", SAVED_WITH)
    return ids


def by_id(ids: Mapping[str, int]) -> Pieces:
    """Pieces in the order of their ids, None where an id has none."""
    pieces: Pieces = [None] * (1 + max(ids.values()))
    for piece, one in ids.items():
        pieces[one] = piece
    return pieces


def read_sentencepiece(path: Path) -> list[str]:
    """The pieces of a sentencepiece model. Raises CheckpointError and TokenizerError."""
    content = read_bounded(path, MOST_VOCABULARY)
    import sentencepiece  # slow to import

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        return [processor.id_to_piece(one) for one in range(processor.get_piece_size())]
    except (RuntimeError, ValueError, TypeError):
        raise TokenizerError(
            f"sentencepiece cannot load {path}",
            expected="a sentencepiece model whose pieces are text",
            remedy="Copy or download the whole folder (git lfs pull).",
        ) from None


def make_side(
    model: Path, pieces: Pieces, *, special: Collection[str], unknown: str, size: int, settings: TokenizerSettings
) -> Side:
    """A sentencepiece model with its pieces by id, to which those that the settings add are added. `size` is the number
    of ids that the model has. Raises TokenizerError for tokens that sentencepiece does not cut, and for ids beyond it.
    """
    laid, added_special = _with_added(pieces, settings)
    special = {*special, *added_special, *settings.extra, unknown}
    notes = _check_size(laid, special, size, settings.folder)
    kept = laid[:size]
    ids = {piece: one for one, piece in enumerate(kept) if piece is not None}
    missing = [piece for piece in settings.extra if piece not in laid]
    if missing:
        refuse_tokens(settings.folder, "special tokens without an id", missing, "tokens of the vocabulary", SAVED_WITH)
    if unknown not in ids:
        raise TokenizerError(
            f"The vocabulary in {settings.folder} has no {unknown}",
            expected="a piece for what it does not know",
            remedy=SAVED_WITH,
        )
    _check_shared(model, ids, special)
    held = Vocabulary(
        tuple(kept),
        frozenset(ids[piece] for piece in special if piece in ids),
        ids[unknown],
        settings.flag("clean_up_tokenization_spaces"),
    )
    return Side(TokenizerFiles("vocabulary", {"model": model, "vocabulary": held.to_bytes()}), model, ids, notes)


def make_bytes(settings: TokenizerSettings, size: int) -> Side:
    """The tokenizer of ByT5, which needs no file. Raises TokenizerError."""
    folder, added = settings.folder, settings.added.values()
    plain = [token.piece for token in added if not token.special and token.piece not in BYTES]
    if plain:
        _refuse_added(settings, "added tokens that are no bytes", plain)
    if size < len(BYTES):
        raise TokenizerError(
            f"The model in {folder} has {size} ids, and its tokenizer reads bytes",
            expected=f"at least {len(BYTES)}, for special tokens and all bytes",
            remedy="Copy the tokenizer that the model was trained with.",
        )
    return Side(TokenizerFiles("bytes", {}), folder, {piece: one for one, piece in enumerate(BYTES)})


def _with_added(pieces: Pieces, settings: TokenizerSettings) -> tuple[Pieces, list[str]]:
    """The pieces with those that were added, and the special ones of them."""
    laid, added = list(pieces), settings.added
    plain = [token.piece for token in added.values() if not token.special]
    if plain:
        _refuse_added(settings, "added tokens that sentencepiece does not cut", plain)
    known = {piece: one for one, piece in enumerate(pieces) if piece is not None}
    moved = [token.piece for one, token in added.items() if known.get(token.piece, one) != one]
    if moved:
        _refuse_added(settings, "added tokens with another id in the vocabulary", moved)
    if max(added, default=0) >= MOST_PIECES:
        _refuse_added(settings, f"added tokens with an id from {MOST_PIECES} on", [added[max(added)].piece])
    laid += [None] * (1 + max(added, default=-1) - len(laid))
    taken = [token.piece for one, token in added.items() if laid[one] not in (None, token.piece)]
    if taken:
        _refuse_added(settings, "added tokens with the id of another piece", taken)
    for one, token in added.items():
        laid[one] = token.piece
    return laid, [token.piece for token in added.values()]


def _refuse_added(settings: TokenizerSettings, what: str, pieces: list[str]) -> NoReturn:
    name = ADDED_FILE if settings.loose else SETTINGS_FILE
    refuse_tokens(
        settings.folder / name,
        what,
        pieces,
        "special tokens, at ids that are free",
        "Save the tokenizer with its tokenizer.json, or export the model that this one was tuned from.",
    )


def _check_size(laid: Sequence[str | None], special: Collection[str], size: int, folder: Path) -> tuple[str, ...]:
    """Special pieces beyond the model are never used, and only those: what was left out, in a note."""
    return check_beyond({piece: one for one, piece in enumerate(laid) if piece is not None}, special, size, folder)


def check_beyond(ids: Mapping[str, int], special: Collection[str], size: int, folder: Path) -> tuple[str, ...]:
    """A note on the special pieces beyond the model's `size`. Raises TokenizerError for others, and for languages."""
    beyond = [piece for piece, one in ids.items() if one >= size]
    plain = [piece for piece in beyond if piece not in special or LANGUAGE.fullmatch(piece)]
    if plain:
        refuse_tokens(
            folder,
            "pieces beyond the model's embedding",
            plain,
            f"ids from 0 to {size - 1}, the rows of the model's embedding",
            "Copy the tokenizer that the model was trained with.",
        )
    if not beyond:
        return ()
    return (f"left out {', '.join(beyond[:3])}{', …' if len(beyond) > 3 else ''}: the model has no such ids",)


def _check_shared(model: Path, ids: Mapping[str, int], special: Collection[str]) -> None:
    """A model and a vocabulary without a common piece are not of one tokenizer."""
    if not any(piece in ids and piece not in special for piece in read_sentencepiece(model)):
        raise TokenizerError(
            f"The vocabulary has none of the pieces of {model}",
            expected="the files of one tokenizer",
            remedy=SAVED_WITH,
        )


def fairseq_pieces(pieces: Sequence[str], special: Sequence[str], tail: Iterable[str]) -> Pieces:
    """The pieces of a sentencepiece model as fairseq numbers them: its four special tokens, the pieces but the first
    three, which are control pieces, and what the task appended.
    """
    return [*special, *pieces[3:], *tail]
