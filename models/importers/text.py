"""The text side of a folder that an importer reads: tokenizers, what stands around a text, languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvx.runtime.bundle.framing import Framing, Languages


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer by its kind, with its files by role: a path to copy, or the content that an importer made."""

    kind: str
    files: Mapping[str, Path | bytes]


@dataclass(frozen=True, slots=True)
class Text:
    """Everything that a model needs to be given texts and to give them. `notes` are sentences about what was assumed
    or left out.
    """

    source: TokenizerFiles
    target: TokenizerFiles
    framing: Framing
    languages: Languages
    notes: tuple[str, ...]
