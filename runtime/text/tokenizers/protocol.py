"""What a tokenizer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text ↔ ids of one side of a model. Ids are those of the model's embedding, never the tokenizer's own."""

    @property
    def unknown_id(self) -> int:
        """The id of what the vocabulary does not have."""
        ...

    def __len__(self) -> int:
        """How many ids it knows, special ones included: one more than the largest."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its pieces, with nothing around them. A special piece spelled out in a text is text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The ids of pieces → text; special pieces vanish, and so do ids that have no piece."""
        ...

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that stays if more ids follow, or pieces of other text (`join`).

        It may be shorter than that of fewer ids, and it is empty where everything may change.
        """
        ...

    def surfaces(self, text: str) -> tuple[str, ...]:
        """The pieces of a text, one for each id of `encode`; where there is none for it, the text itself."""
        ...

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special pieces vanish."""
        ...

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The pieces with these ids."""
        ...

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has no such piece."""
        ...

    def unknown_surfaces(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary does not have."""
        ...
