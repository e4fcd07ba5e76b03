"""Texts → what the encoder takes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvx.runtime.bundle.folder import SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE, Bundle
from kvx.runtime.errors import InputError, TokenizerError
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

OnLong = Literal["error", "truncate"]


@dataclass(frozen=True, slots=True)
class SourceText:
    """A text's ids with bos and eos, or none where it has no pieces. `truncated` tells that it was cut. `pieces` are as
    they stand in the text, where they were asked for.
    """

    ids: tuple[int, ...]
    truncated: bool
    pieces: tuple[str, ...] = ()


class SourceReader:
    """The source side of a bundle: its tokenizer, special ids and positions."""

    def __init__(self, bundle: Bundle) -> None:
        self._tokenizer = load_tokenizer(bundle, "source")
        self._special = bundle.manifest.source_ids
        self._positions = bundle.manifest.model["source_positions"]

    def read(self, texts: Iterable[str], on_long: OnLong = "error") -> Iterator[SourceText]:
        """The ids of each text, as `read_one`."""
        return (self.read_one(text, number, on_long) for number, text in enumerate(texts, 1))

    def read_one(self, text: str, number: int, on_long: OnLong = "error", *, with_pieces: bool = False) -> SourceText:
        """The ids of the text with this number. A text longer than the model's positions, bos and eos counted, is an
        InputError or is cut, keeping both.
        """
        pieces = encode_text(self._tokenizer, text, number)
        long = len(pieces) + 2 > self._positions
        if long and on_long == "error":
            raise InputError(
                f"The text has {len(pieces) + 2} tokens, with bos and eos",
                expected=f"at most {self._positions}, the source positions of the model",
                remedy="Split the text, or have it cut with `on_long` truncate.",
                option="on_long",
                line=number,
            )
        kept = slice(self._positions - 2)
        return SourceText(
            (self._special.bos, *pieces[kept], self._special.eos) if pieces else (),
            long,
            self._tokenizer.surfaces(text)[kept] if with_pieces else (),
        )


def encode_text(tokenizer: Tokenizer, text: str, number: int) -> list[int]:
    """The ids of a text's pieces; none where there is nothing to see. Raises InputError for anything but a text."""
    try:
        if isinstance(text, str):
            text.encode()  # what no UTF-8 can say, sentencepiece cannot read
            return tokenizer.encode(text) if any(map(is_visible, text)) else []
    except UnicodeEncodeError:
        pass
    raise InputError(
        f"{text!r:.60} is not a text", expected="a str of valid Unicode", remedy="Decode it first.", line=number
    )


def is_visible(character: str) -> bool:
    """Whether a character shows something by itself. White space, controls, marks that shape or direct others, private
    use and noncharacters do not; what this version of Unicode has not assigned may be a newer emoji.
    """
    category = unicodedata.category(character)
    if category == "Cn":
        return not (0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE)
    return category[0] not in "ZCM"


def refuse_string(texts: Iterable[object]) -> None:
    """Raises InputError for one text, which would be taken for its characters, and for what has no items."""
    if isinstance(texts, str):
        raise InputError("This is one str", expected="a sequence of texts", remedy="Pass [text].")
    if not isinstance(texts, Iterable):
        raise InputError(f"This is {texts!r:.60}", expected="an iterable of texts", remedy="Pass a list of texts.")


def load_tokenizer(bundle: Bundle, side: Literal["source", "target"]) -> SentencePiece:
    """The bundle's tokenizer of one side, which must be the one its manifest describes. Raises TokenizerError."""
    source = side == "source"
    file = SOURCE_TOKENIZER_FILE if source else TARGET_TOKENIZER_FILE
    bundle.require(file)
    bundle.files.check([file])
    tokenizer = SentencePiece(bundle.folder / file)
    ids = bundle.manifest.source_ids if source else bundle.manifest.target_ids
    size = bundle.manifest.model[f"{side}_vocab_size"]
    if len(tokenizer) != size or tokenizer.special_ids != ids:
        raise TokenizerError(
            f"{side}.model has {len(tokenizer)} pieces and {tokenizer.special_ids}",
            expected=f"{size} pieces and {ids}",
            remedy="Use the bundle as it was exported.",
        )
    return tokenizer
