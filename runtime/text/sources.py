"""Texts → what the encoder takes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.errors import InputError, TokenizerError
from kvx.runtime.text.languages import Language, LanguageReader, Side
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.registry import open_tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

OnLong = Literal["error", "truncate"]
Source = str | Sequence[int] | NDArray[np.integer[Any]]  # a text, or the ids of its pieces


@dataclass(frozen=True, slots=True)
class SourceText:
    """A text's ids with all that framing lays around them, or none where it has no pieces. `truncated` tells that it
    was cut. `pieces` are as they stand in the text, where they were asked for. `start` are the ids that its targets
    begin with.
    """

    ids: tuple[int, ...]
    truncated: bool
    start: tuple[int, ...]
    pieces: tuple[str, ...] = ()


class SourceReader:
    """The source side of a bundle: its tokenizer, framing, languages and positions."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or load_tokenizer(bundle, "source")
        self._languages = LanguageReader(bundle.manifest)
        self._framing = bundle.manifest.framing
        self._positions: int = bundle.manifest.model["source_positions"]
        self._size: int = bundle.manifest.model["source_vocab_size"]

    def check_languages(self, source: Language, target: Language) -> None:
        """Raises OptionError for a language of all texts that is missing or unknown."""
        self._languages.check(source, target)

    def fits(self, text: str) -> bool:
        """Whether a text has no more tokens than the model has positions."""
        text = self._framing.text_prefix + text
        room = self._positions - self._framing.around
        return len(text.encode("utf-8", "replace")) < room or len(self.tokenizer.encode(text)) <= room

    def read(self, texts: Iterable[str], on_long: OnLong = "error") -> Iterator[SourceText]:
        """The ids of each text in the default languages, as `read_one`."""
        return (self.read_one(text, number, on_long) for number, text in enumerate(texts, 1))

    def read_one(
        self,
        source: Source,
        number: int,
        on_long: OnLong = "error",
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        text_prefix: str | None = None,
        with_pieces: bool = False,
        empty: bool = False,
    ) -> SourceText:
        """The ids of the text with this number, or of its pieces as they are, none for a text without a piece, unless
        it may be `empty`. A `text_prefix` takes the place of the bundle's; ids have none. A source longer than the
        model's positions, with what framing adds, is an InputError or is cut within the framing. Raises InputError also
        for languages and for ids that are none.
        """
        framing = self._framing
        if isinstance(source, str):
            refuse_other(source, number)
            ids, text = self._languages.read(source, source_language, target_language, number)
            if shown := is_text(text):
                text = (framing.text_prefix if text_prefix is None else text_prefix) + text
            pieces = self.tokenizer.encode(text) if shown else list[int]()
            surfaces = self.tokenizer.surfaces(text) if with_pieces else ()
        else:
            ids, _ = self._languages.read("", source_language, target_language, number)
            pieces = list(self._checked(source, number))
            surfaces = self.tokenizer.pieces(pieces) if with_pieces else ()
        room = self._positions - framing.around
        long = len(pieces) > room
        if long and on_long == "error":
            raise InputError(
                f"The text has {len(pieces) + framing.around} tokens, {framing.around} of them around it",
                expected=f"at most {self._positions}, the source positions of the model",
                remedy="Split the text, or have it cut with `on_long` truncate.",
                option="on_long",
                line=number,
            )
        kept = slice(room)
        return SourceText(
            framing.source_ids(pieces[kept], ids) if pieces or empty else (),
            long,
            framing.start_ids(ids),
            surfaces[kept],
        )

    def _checked(self, ids: object, number: int) -> Iterator[int]:
        """Ids of pieces as ints. Raises InputError for anything else."""
        if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, bytes | bytearray):
            refuse_other(ids, number)
            return
        for one in ids:
            if not isinstance(one, Integral) or isinstance(one, bool) or not 0 <= int(one) < self._size:
                raise InputError(
                    f"A source has the id {one!r:.60}",
                    expected=f"ids of source pieces from 0 to {self._size - 1}",
                    remedy="Correct it, or give the text.",
                    line=number,
                )
            yield int(one)


def refuse_other(text: object, number: int | None) -> None:
    """Raises InputError for anything but a text."""
    try:
        if isinstance(text, str):
            text.encode()  # what no UTF-8 can say, sentencepiece cannot read
            return
    except UnicodeEncodeError:
        pass
    raise InputError(
        f"{text!r:.60} is not a text", expected="a str of valid Unicode", remedy="Decode it first.", line=number
    )


def encode_text(tokenizer: Tokenizer, text: str, number: int) -> list[int]:
    """The ids of a text's pieces; none where there is nothing to see. Raises InputError for anything but a text."""
    refuse_other(text, number)
    return tokenizer.encode(text) if is_text(text) else []


def is_text(text: str) -> bool:
    """Whether there is something to see."""
    return any(map(is_visible, text))


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


def load_tokenizers(bundle: Bundle) -> tuple[Tokenizer, Tokenizer]:
    """Those of the source and the target, or one that serves both sides. Raises TokenizerError."""
    source, entries = load_tokenizer(bundle, "source"), bundle.manifest.tokenizers
    return source, source if entries["source"] == entries["target"] else load_tokenizer(bundle, "target")


def load_tokenizer(bundle: Bundle, side: Side) -> Tokenizer:
    """The bundle's tokenizer of one side, which must know no more ids than the model. Raises TokenizerError."""
    entry, size = bundle.manifest.tokenizers[side], bundle.manifest.model[f"{side}_vocab_size"]
    names = entry.files.values()
    bundle.require(*names)
    bundle.files.check(names)
    tokenizer = open_tokenizer(entry.kind, {role: bundle.folder / name for role, name in entry.files.items()})
    plain = isinstance(tokenizer, SentencePiece)
    if len(tokenizer) > size or (plain and len(tokenizer) != size):
        raise _other_tokenizer(names, f"{len(tokenizer)} pieces", f"{'' if plain else 'at most '}{size} pieces")
    if isinstance(tokenizer, SentencePiece):
        _check_special_ids(tokenizer.special_ids, bundle.manifest.framing, side, names)
    return tokenizer


def _check_special_ids(ids: SpecialIds, framing: Framing, side: Side, names: Iterable[str]) -> None:
    """Raises TokenizerError where framing has other ids than a tokenizer whose control pieces they are."""
    source = side == "source"
    got = ((ids.bos,), (ids.eos,)) if source else (ids.bos, ids.eos)
    expected = (framing.prefix, framing.suffix) if source else (framing.start, framing.eos)
    if got != expected:
        raise _other_tokenizer(names, f"bos and eos {got}", f"{expected}, the ids of the bundle's framing")


def _other_tokenizer(names: Iterable[str], got: str, expected: str) -> TokenizerError:
    return TokenizerError(
        f"{', '.join(names)} has {got}", expected=expected, remedy="Use the bundle as it was exported."
    )
