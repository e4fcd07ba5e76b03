"""The text side of a fairseq checkpoint: its dictionaries, and the subword model beside them.

The facts are those of fairseq/data/dictionary.py, fairseq/data/encoders and fairseq/tasks/translation.py
(https://github.com/facebookresearch/fairseq).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvx.models.importers.subwords import cutting, read_lines
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.models.importers.tokenizer_settings import refuse_tokens
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.vocabulary import MOST_PIECES
from kvx.runtime.errors import CheckpointError, TokenizerError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNKNOWN = range(4)
LINE = re.compile(r"(.+?)(?: (\d+))?( #fairseq:overwrite)?")
KINDS = {None: None, "sentencepiece": "sentencepiece", "subword_nmt": "bpe", "fastbpe": "bpe"}
WITH_LANGUAGES = re.compile(r"multilingual|multi_simple|denoising|language_modeling")
REMEDY = "Copy the folder that fairseq-preprocess wrote beside the checkpoint."


def read_text(folder: Path, settings: Mapping[str, Any], source_size: int, target_size: int) -> Text:
    """The text side of the checkpoint in a folder, for a model with so many ids on each side. Raises CheckpointError
    and TokenizerError.
    """
    task = str(settings.get("task") or "translation")
    if WITH_LANGUAGES.search(task):
        raise CheckpointError(
            f"The checkpoint in {folder} is of fairseq's task {task}",
            expected="its task translation, with one language on each side",
            remedy="Convert the model to the folder of a Hugging Face family, if it has one.",
        )
    languages = [_language(folder, settings, side) for side in ("source", "target")]
    sides = [
        _side(folder, settings, language, size)
        for language, size in zip(languages, (source_size, target_size), strict=True)
    ]
    framing = Framing(prefix=(), suffix=(EOS,), start=EOS, eos=EOS, pad=PAD, never=(PAD,))
    note = "texts must be tokenised as those for training were" if _is_tokenised(settings, sides[0]) else None
    return Text(sides[0], sides[1], framing, Languages(), () if note is None else (note,))


def _language(folder: Path, settings: Mapping[str, Any], side: str) -> str:
    """The name of a side's language: of the settings, or of the only other dictionary in the folder."""
    name = settings.get(f"{side}_lang")
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name):
        return name
    raise CheckpointError(
        f"The checkpoint in {folder} does not name its {side}_lang",
        expected="the language that its dictionary is called after",
        remedy="Use a checkpoint as fairseq-train wrote it.",
    )


def _side(folder: Path, settings: Mapping[str, Any], language: str, size: int) -> TokenizerFiles:
    kind = settings.get("bpe")
    if kind not in KINDS:
        raise TokenizerError(
            f"The checkpoint in {folder} cuts texts with bpe = {kind!r:.40}",
            expected="sentencepiece, subword_nmt, fastbpe or none",
            remedy="This tokenizer is not supported.",
        )
    return cutting(folder, _read_dictionary(folder / f"dict.{language}.txt", size), SPECIAL, language, kind=KINDS[kind])


def _is_tokenised(settings: Mapping[str, Any], side: TokenizerFiles) -> bool:
    """Whether texts were tokenised before they were cut into pieces."""
    return side.kind != "vocabulary" or settings.get("tokenizer") not in (None, "space")


def _read_dictionary(path: Path, size: int) -> list[str | None]:
    """The pieces of a dictionary by id, four special ones first. Raises CheckpointError and TokenizerError."""
    lines = read_lines(path)
    pieces: dict[str, None] = dict.fromkeys(SPECIAL)
    twice = []
    for line in lines:
        match = LINE.fullmatch(line)
        piece = match[1] if match else line
        if piece in pieces and not (match and match[3]):
            twice.append(piece)
        pieces.setdefault(piece)
    if twice:
        refuse_tokens(path, "pieces that come twice", twice, "each piece once", REMEDY)
    if len(pieces) != size or size > MOST_PIECES:
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces with the four special ones",
            expected=f"{size}, the rows of the model's embedding",
            remedy="Copy the dictionary that the model was trained with.",
        )
    return list(pieces)
