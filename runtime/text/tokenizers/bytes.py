"""The bytes of a text in UTF-8 as its pieces, as ByT5 has them (Xue et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvx.runtime.bundle.vocabulary import BYTES, WORD_START

FIRST = len(BYTES) - 256  # the id of the byte 0
IDS = {piece: one for one, piece in enumerate(BYTES)}


class ByteTokenizer:
    """An id for every byte. A text has no special pieces and nothing unknown; bytes that make no character vanish."""

    unknown_id = IDS["<unk>"]

    def __len__(self) -> int:
        """How many ids it knows: special ones and bytes."""
        return len(BYTES)

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its bytes, with nothing around them."""
        return [FIRST + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids of bytes → text; special pieces vanish, and so do ids that stand for no byte."""
        return _text(one - FIRST for one in ids)

    def settled(self, ids: Sequence[int]) -> str:
        """All of the text: bytes at the end that make no character yet are not in it."""
        return self.decode(ids)

    def surfaces(self, text: str) -> tuple[str, ...]:
        """A character at its first byte, and nothing at its others; a space before a word is ▁."""
        shown = ((character, WORD_START if character == " " else character) for character in text)
        return tuple(piece for one, first in shown for piece in (first, *[""] * (len(one.encode()) - 1)))

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""
        ids = (self.piece_id(piece) for piece in pieces)
        found = ([one - FIRST] if one is not None else piece.encode() for one, piece in zip(ids, pieces, strict=True))
        return _text(byte for held in found for byte in held)

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The names of the bytes with these ids, empty where an id has none."""
        return tuple(BYTES[one] if 0 <= one < len(BYTES) else "" for one in ids)

    def piece_id(self, piece: str) -> int | None:
        """The id of a byte or of a special piece by its name, or None for any other."""
        return IDS.get(piece)

    def unknown_surfaces(self, text: str) -> list[str]:
        """None: every byte has an id."""
        return []


def _text(values: Iterable[int]) -> str:
    return bytes(one for one in values if 0 <= one < 256).decode(errors="ignore")
