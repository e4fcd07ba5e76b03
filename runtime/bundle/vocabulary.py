"""The vocabulary file beside a sentencepiece model: which id of the model each piece has. An export writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from kvx.runtime.rules import is_encodable

MOST_BYTES = 64 << 20  # of the file
MOST_PIECES = 4_000_000
KEYS = frozenset({"format", "pieces", "special", "unknown", "tidy"})
FORMAT = "kvx-vocabulary-1"
# What Hugging Face takes spaces from after decoding where `clean_up_tokenization_spaces` is set.
TIDIED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
WORD_START = "▁"  # before a piece that begins a word, in sentencepiece
CONTINUED = "@@"  # after a piece that does not end its word, in byte-pair encoding
# The pieces by id where these are bytes.
BYTES = ("<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The pieces by id, None where an id has no piece; the ids of pieces that are no text, such as eos and languages;
    the id of what has no piece; and whether spaces before punctuation are dropped from decoded English text.

    Raises ValueError, which says what is wrong.
    """

    pieces: tuple[str | None, ...]
    special: frozenset[int]
    unknown: int
    tidy: bool = False

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def to_bytes(self) -> bytes:
        """The content of the file."""
        content = {
            "format": FORMAT,
            "pieces": self.pieces,
            "special": sorted(self.special),
            "unknown": self.unknown,
            "tidy": self.tidy,
        }
        return json.dumps(content, ensure_ascii=False, indent=0).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What a file holds. Raises ValueError."""
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        try:
            values = json.loads(content)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(values, dict) or values.keys() != KEYS or values["format"] != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT}")
        if any(not isinstance(values[name], list) for name in ("pieces", "special")):
            raise ValueError("its pieces or special ids are no list")
        try:
            return cls(tuple(values["pieces"]), frozenset(values["special"]), values["unknown"], values["tidy"])
        except TypeError:
            raise ValueError("its pieces or special ids are no plain values") from None

    def _problems(self) -> Iterator[str]:
        pieces: tuple[Any, ...] = self.pieces
        texts = [piece for piece in pieces if piece is not None]
        ids = range(len(pieces))
        if not 0 < len(pieces) <= MOST_PIECES:
            yield f"it has {len(pieces)} pieces, not 1 to {MOST_PIECES}"
        elif not all(isinstance(piece, str) and is_encodable(piece) for piece in texts):
            yield "it has pieces that are no text"
        elif len(set(texts)) < len(texts):
            yield "a piece has two ids"
        elif not all(_names(one, pieces, ids) for one in (self.unknown, *self.special)):
            yield "unknown or special ids have no piece"
        elif not isinstance(self.tidy, bool):
            yield "tidy is neither true nor false"


def _names(one: object, pieces: tuple[Any, ...], ids: range) -> bool:
    return type(one) is int and one in ids and pieces[one] is not None
