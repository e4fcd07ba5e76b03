"""The only list of the kinds of tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvx.runtime.errors import BundleError
from kvx.runtime.text.tokenizers.bytes import ByteTokenizer
from kvx.runtime.text.tokenizers.huggingface import HuggingFaceTokenizer
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece
from kvx.runtime.text.tokenizers.vocabulary import SentencePieceVocabulary
from kvx.runtime.text.tokenizers.words import BytePairVocabulary, WordVocabulary


@dataclass(frozen=True, slots=True)
class Kind:
    """What opens a tokenizer, with its files in the order of their roles."""

    roles: tuple[str, ...]
    load: Callable[..., Tokenizer]


KINDS: Mapping[str, Kind] = {
    "sentencepiece": Kind(("model",), SentencePiece),
    "vocabulary": Kind(("model", "vocabulary"), SentencePieceVocabulary),
    "huggingface": Kind(("tokenizer",), HuggingFaceTokenizer),
    "bytes": Kind((), ByteTokenizer),
    "words": Kind(("vocabulary",), WordVocabulary),
    "bpe": Kind(("codes", "vocabulary"), BytePairVocabulary),
}


def open_tokenizer(kind: str, files: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer of a kind, with its files by role. Raises BundleError for another kind or other roles, and
    TokenizerError for files that cannot be used.
    """
    known = KINDS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise BundleError(
            f"The tokenizer is of the kind {kind!r:.60}",
            expected=f"one of {', '.join(KINDS)}",
            remedy="Load the bundle with the version of kvx that exported it, or a newer one.",
        )
    if set(files) != set(known.roles):
        raise BundleError(
            f"A tokenizer of the kind {kind} has the files {', '.join(sorted(map(str, files))) or 'of no role'}",
            expected=f"the files {', '.join(known.roles)}" if known.roles else "no files",
            remedy="Export the bundle again.",
        )
    return known.load(*(files[role] for role in known.roles))
