"""sentencepiece cuts a text, and a vocabulary file says which id a piece has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from kvx.runtime.bundle.vocabulary import MOST_BYTES, TIDIED, WORD_START, Vocabulary
from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.tokenizers.reading import Reading, load_processor, read_content, rewrites, without_open_end


class HeldVocabulary(ABC):
    """The ids of a vocabulary file, whatever cuts a text into its pieces. Raises TokenizerError.

    A piece that the vocabulary lacks is unknown. Special pieces are no text: none comes of `encode`.
    """

    def __init__(self, vocabulary: Path) -> None:
        held = read_vocabulary(vocabulary)
        self.unknown_id = held.unknown
        self._tidy = held.tidy
        self._pieces = held.pieces
        self._special = held.special
        self._ids = {piece: one for one, piece in enumerate(held.pieces) if piece is not None}
        self._special_pieces = frozenset(piece for one in held.special if (piece := held.pieces[one]) is not None)

    def __len__(self) -> int:
        """How many ids it knows, those without a piece included."""
        return len(self._pieces)

    @abstractmethod
    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""

    def decode(self, ids: Sequence[int]) -> str:
        """The ids of pieces → text; special pieces vanish, and so do ids that have no piece."""
        return self.join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The pieces with these ids, empty where an id has none."""
        return tuple(self._piece(one) for one in ids)

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has no such piece."""
        return self._ids.get(piece)

    def _text_pieces(self, pieces: Sequence[str]) -> list[str]:
        """Those that are text."""
        return [piece for piece in pieces if piece and piece not in self._special_pieces]

    def _id_of(self, piece: str) -> int:
        one = self._ids.get(piece, self.unknown_id)
        return self.unknown_id if one in self._special else one

    def _piece(self, one: int) -> str:
        return (self._pieces[one] or "") if 0 <= one < len(self._pieces) else ""


class SentencePieceVocabulary(HeldVocabulary):
    """A sentencepiece model with the ids that another model gave its pieces. Raises TokenizerError."""

    def __init__(self, model: Path, vocabulary: Path) -> None:
        self._processor = load_processor(model)
        self._reading = Reading(model)
        super().__init__(vocabulary)
        with self._reading:
            self._spm_unknown = int(self._processor.unk_id())
            names = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        self._of_spm = [self._id_of(name) for name in names]  # sentencepiece's id → the model's

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its pieces, with nothing around them. A special piece spelled out in a text is text."""
        with self._reading:
            own: list[int] = self._processor.encode(text)
        if self._spm_unknown not in own:
            return [self._of_spm[one] for one in own]
        # What sentencepiece does not know may be a piece of the other side's model.
        return [self._id_of(surface) for surface in self.surfaces(text)]

    def surfaces(self, text: str) -> tuple[str, ...]:
        """The pieces of a text, one for each id of `encode`; where there is none for it, the text itself."""
        with self._reading:
            return tuple(self._processor.encode(text, out_type=str))

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""
        with self._reading:
            text: str = self._processor.decode(self._text_pieces(pieces))
        text = text.replace(WORD_START, " ").strip()
        return tidied(text) if self._tidy else text

    def settled(self, ids: Sequence[int]) -> str:
        """The text but for its open end, or nothing where the model has rules that rewrite the whole text."""
        if self._rewrites:
            return ""
        text = without_open_end(self.decode(ids))
        return settled_when_tidied(text) if self._tidy else text

    def unknown_surfaces(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary does not have."""
        return [surface for surface in self.surfaces(text) if self._id_of(surface) == self.unknown_id]

    @cached_property
    def _rewrites(self) -> bool:
        return rewrites(self._processor)


def tidied(text: str) -> str:
    """A text without the spaces before punctuation that English tokenisation leaves."""
    for spaced in TIDIED:
        text = text.replace(spaced, spaced.strip())
    return text


def settled_when_tidied(text: str) -> str:
    """The beginning of a tidied text that stays when more follows: up to a word that another one follows.

    Only a word that is in one of the parts, such as the n of n't, may be joined with what follows, and then to the word
    before it. Words that were joined already end in a whole part, and no part is the beginning of another.
    """
    words = text.split(" ")
    ends = (end for end in range(len(words) - 1, 0, -1) if not _is_in_a_part(words[end - 1]))
    return " ".join(words[: next(ends, 0)])


def _is_in_a_part(word: str) -> bool:
    return any(word in spaced.strip() for spaced in TIDIED)


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary file that an export wrote. Raises TokenizerError."""
    content = read_content(path, "a vocabulary file that kvx wrote", MOST_BYTES)
    try:
        return Vocabulary.from_bytes(content)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are of this kind
        raise TokenizerError(
            f"{path} is no vocabulary: {error}",
            expected="a vocabulary file that kvx wrote",
            remedy="Export the bundle again.",
        ) from None
