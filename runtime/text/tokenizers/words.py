"""Words between white space, or what byte-pair encoding makes of them, by the ids of a vocabulary file.

A piece that does not end its word has @@ after it, as subword-nmt and fastBPE write it (Sennrich et al. 2016).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from kvx.runtime.bundle.vocabulary import CONTINUED, WORD_START
from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.tokenizers.reading import read_content
from kvx.runtime.text.tokenizers.vocabulary import HeldVocabulary

MOST_KEPT = 100_000  # words whose pieces are remembered


class WordVocabulary(HeldVocabulary):
    """Words between white space."""

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its pieces, with nothing around them. A special piece spelled out in a text is text."""
        return [self._id_of(piece) for piece in self._cut(text)]

    def surfaces(self, text: str) -> tuple[str, ...]:
        """The pieces of a text without @@, ▁ before each that begins a word; one for each id of `encode`."""
        begins, shown = True, []
        for piece in self._cut(text):
            shown.append((WORD_START if begins else "") + piece.removesuffix(CONTINUED))
            begins = not piece.endswith(CONTINUED)
        return tuple(shown)

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""
        return f"{' '.join(self._text_pieces(pieces))} ".replace(f"{CONTINUED} ", "").strip()

    def settled(self, ids: Sequence[int]) -> str:
        """All of the text: every piece has the space after it, with which its @@ goes, before another one comes."""
        return self.decode(ids)

    def unknown_surfaces(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary does not have."""
        return [piece for piece in self._cut(text) if self._id_of(piece) == self.unknown_id]

    def _cut(self, text: str) -> list[str]:
        return text.split()


class BytePairVocabulary(WordVocabulary):
    """Words that byte-pair encoding cuts into pieces. Raises TokenizerError."""

    def __init__(self, codes: Path, vocabulary: Path) -> None:
        super().__init__(vocabulary)
        content = read_content(codes, "the merges of byte-pair encoding")
        try:
            from subword_nmt.apply_bpe import BPE  # an extra, which few bundles need
        except ImportError:
            raise TokenizerError(
                "The tokenizer of this model is byte-pair encoding, and the package subword-nmt is not installed",
                expected="the package subword-nmt",
                remedy="Install it with: pip install 'kvx[bpe]'",
            ) from None
        self._bpe = BPE(io.StringIO(content.decode()), separator=CONTINUED)

    def _cut(self, text: str) -> list[str]:
        if len(self._bpe.cache) > MOST_KEPT:
            self._bpe.cache.clear()
        pieces: list[str] = self._bpe.segment_tokens(text.split())
        return pieces
