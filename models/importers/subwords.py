"""What cuts texts into the pieces of a vocabulary: a sentencepiece model or merges beside a model, or white space."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from kvx.models.importers.text import TokenizerFiles
from kvx.models.importers.tokenizer_settings import MOST_VOCABULARY, TokenizerSettings, read_bounded, refuse_tokens
from kvx.models.importers.tokenizer_vocabularies import Pieces, make_side
from kvx.runtime.bundle.vocabulary import CONTINUED, WORD_START, Vocabulary
from kvx.runtime.errors import TokenizerError

SENTENCEPIECE = (  # names of files, in which {} is the language or side
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm.{}.model", "{}.spm.model", "{}.model"),
)
CODES = ("bpecodes", "bpe.codes", "codes", "code", "bpe.{}.codes", "{}.codes")
OTHER_MARK = "\N{HALFWIDTH BLACK SQUARE}"  # of joined pieces in pyonmttok
VERSION = "#version: 0.2\n"
VERSIONS = ("0.1", "0.2")
TOKENISED = "texts must be tokenised as those for training were"
REMEDY = "Copy the folder that the model was trained with."


def cutting(
    folder: Path,
    pieces: Pieces,
    special: Sequence[str],
    language: str,
    *,
    listed: Sequence[str] = (),
    kind: str | None = None,
) -> TokenizerFiles:
    """The tokenizer of pieces by id, the last of the `special` ones being what is unknown. Files beside the checkpoint
    are found by usual names or those that are `listed`; of the `kind` "sentencepiece" or "bpe" alone, where it is
    known. Raises CheckpointError and TokenizerError.
    """
    unknown, size = special[-1], len(pieces)
    spm = _beside(folder, listed, SENTENCEPIECE, language) if kind in (None, "sentencepiece") else None
    codes = _beside(folder, listed, CODES, language) if kind in (None, "bpe") else None
    if spm is not None and (kind or _any(pieces, special, WORD_START)):
        settings = TokenizerSettings(folder)
        return make_side(spm, pieces, special=special, unknown=unknown, size=size, settings=settings).files
    held = _vocabulary(folder, pieces, special, language)
    if codes is not None and (kind or _any(pieces, special, CONTINUED)):
        return TokenizerFiles("bpe", {"codes": _read_codes(codes), "vocabulary": held.to_bytes()})
    if kind is not None or any(_any(pieces, special, mark) for mark in (WORD_START, CONTINUED, OTHER_MARK)):
        names = {"sentencepiece": SENTENCEPIECE, "bpe": CODES}.get(kind or "", (*SENTENCEPIECE, *CODES))
        raise TokenizerError(
            f"{folder} has no model that cuts texts into the pieces of the vocabulary for {language}",
            expected=f"one of {', '.join(name.format(language) for name in names)}",
            remedy="Copy it beside the checkpoint under one of these names.",
        )
    return TokenizerFiles("words", {"vocabulary": held.to_bytes()})


def read_lines(path: Path) -> list[str]:
    """A file's lines, which only line feeds end: other separators may be pieces. Raises CheckpointError and
    TokenizerError.
    """
    try:
        lines = read_bounded(path, MOST_VOCABULARY).decode().split("\n")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path} is not in UTF-8", expected="pieces in UTF-8", remedy=REMEDY) from None
    return [line.removesuffix("\r") for line in lines if line.strip("\r")]


def _any(pieces: Pieces, special: Collection[str], mark: str) -> bool:
    """Whether a piece begins or ends with a mark."""
    return any(piece and piece not in special and (piece.startswith(mark) or piece.endswith(mark)) for piece in pieces)


def _vocabulary(folder: Path, pieces: Pieces, special: Sequence[str], language: str) -> Vocabulary:
    """The pieces by id, the last of the special ones being what is unknown. Raises TokenizerError."""
    ids = {piece: one for one, piece in enumerate(pieces) if isinstance(piece, str)}
    try:
        known = frozenset(ids[piece] for piece in special if piece in ids)
        return Vocabulary(tuple(pieces), known, ids.get(special[-1], -1))
    except ValueError as error:
        raise TokenizerError(
            f"The vocabulary for {language} in {folder} cannot be used: {error}",
            expected=f"each piece once, and {special[-1]}",
            remedy=REMEDY,
        ) from None


def _beside(folder: Path, listed: Sequence[str], usual: Sequence[str], language: str) -> Path | None:
    """The first of these files that is there. Those of the two kinds are told apart by the ends of their names."""
    own = [name for name in listed if name.endswith((".model", ".spm")) is (usual is SENTENCEPIECE)]
    paths = (folder / name for name in (*own, *(name.format(language) for name in usual)))
    return next((path for path in paths if path.is_file()), None)


def _read_codes(path: Path) -> bytes:
    """The merges of subword-nmt, or those of fastBPE with counts. Raises CheckpointError and TokenizerError."""
    lines = read_lines(path)
    versioned = bool(lines) and lines[0].startswith("#version:")
    if versioned and lines[0].split()[-1] not in VERSIONS:
        refuse_tokens(path, "versions that are not known", lines[:1], " or ".join(VERSIONS), REMEDY)
    merges = [line.split(" ") for line in lines[versioned:]]
    counted = not versioned and all(len(merge) == 3 and merge[2].isdecimal() for merge in merges)
    wrong = [" ".join(merge) for merge in merges if len(merge) != 2 + counted]
    if wrong or not merges:
        refuse_tokens(path, "lines that are no merge", wrong or [""], "two pieces in each", REMEDY)
    header = f"{lines[0]}\n" if versioned else VERSION if counted else ""
    return (header + "\n".join(f"{merge[0]} {merge[1]}" for merge in merges) + "\n").encode()
