"""sentencepiece, whose ids are those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from kvx.runtime.bundle.framing import SpecialIds
from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.tokenizers.reading import Reading, load_processor, rewrites, without_open_end


class SentencePiece:
    """One sentencepiece model, which must have pad, bos and eos. Raises TokenizerError."""

    def __init__(self, path: Path) -> None:
        self._processor = load_processor(path)
        self._reading = Reading(path)
        self._check_special_ids(path)

    def _check_special_ids(self, path: Path) -> None:
        processor = self._processor
        ids = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
        missing = [name for name, value in ids.items() if value < 0]
        if missing:
            raise TokenizerError(
                f"{path} has no {' and no '.join(missing)}",
                expected="a tokenizer with pad, bos and eos pieces",
                remedy="Train it with pad_id, bos_id and eos_id set.",
            )
        self.special_ids = SpecialIds(**ids)
        self.unknown_id = int(processor.unk_id())

    def __len__(self) -> int:
        """Pieces in the vocabulary, special ones included."""
        return int(self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its pieces, without bos and eos."""
        with self._reading:
            ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The ids of pieces → text; special pieces vanish."""
        with self._reading:
            text: str = self._processor.decode(list(ids))
        return text

    def settled(self, ids: Sequence[int]) -> str:
        """The text but for its open end, or nothing where the model has rules that rewrite the whole text."""
        return "" if self._rewrites else without_open_end(self.decode(ids))

    def surfaces(self, text: str) -> tuple[str, ...]:
        """The pieces of a text, one for each id of `encode`; where there is none for it, the text itself."""
        with self._reading:
            return tuple(self._processor.encode(text, out_type=str))

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""
        with self._reading:
            text: str = self._processor.decode(list(pieces))
        return text

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The pieces with these ids."""
        with self._reading:
            return tuple(self._processor.id_to_piece(list(ids)))

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has no such piece."""
        with self._reading:
            one = int(self._processor.piece_to_id(piece))
            return one if self._processor.id_to_piece(one) == piece else None

    def unknown_surfaces(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary does not have."""
        ids = self.encode(text)
        return [piece for piece, one in zip(self.surfaces(text), ids, strict=True) if one == self.unknown_id]

    @cached_property
    def _rewrites(self) -> bool:
        return rewrites(self._processor)
