"""A `tokenizer.json` of Hugging Face, read by the package tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvx.runtime.bundle.vocabulary import WORD_START
from kvx.runtime.errors import TokenizerError
from kvx.runtime.text.tokenizers.decoders import Settling, settling_of
from kvx.runtime.text.tokenizers.reading import read_content

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import Decoder
    from tokenizers.pre_tokenizers import PreTokenizer

Value = TypeVar("Value")

BYTE_LEVEL_SPACE = "Ġ"  # how a byte-level alphabet spells a space
UNKNOWN = "<unk>"


class HuggingFaceTokenizer:
    """The tokenizer of one `tokenizer.json`, with nothing around a text. Raises TokenizerError.

    A special token that is spelled out in a text is text. Where the file's vocabulary would still find it, since
    unigram models hold their special tokens among the pieces, a copy without them cuts that text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = read_content(path, "a tokenizer.json")
        self._backend = self._reading(lambda: _load(self._content))
        added = self._backend.get_added_tokens_decoder()
        self._special = {one for one, token in added.items() if token.special}
        self._special_pieces = {token.content for token in added.values() if token.special}
        self._size = int(self._backend.get_vocab_size(with_added_tokens=True))  # exports refuse ids with gaps
        self._is_bytes = b"ByteLevel" in _state(self._backend.pre_tokenizer)
        self._is_unigram = type(self._backend.model).__name__ == "Unigram"
        self._unknown_piece: str = getattr(self._backend.model, "unk_token", None) or UNKNOWN
        unknown = self._backend.token_to_id(self._unknown_piece)
        if unknown is None:
            raise TokenizerError(
                f"{path} has no {self._unknown_piece}",
                expected="a tokenizer with a piece for what it does not know",
                remedy="Copy the tokenizer that the model was trained with.",
            )
        self.unknown_id: int = unknown

    def __len__(self) -> int:
        """How many ids it knows, special ones included: one more than the largest."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Text → the ids of its pieces, with nothing around them. A special token spelled out in a text is text."""
        return self._encode(text)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids of pieces → text; special tokens vanish, and so do ids that have no piece."""
        kept = [one for one in ids if 0 <= one < self._size]
        return self._reading(lambda: self._backend.decode(kept, skip_special_tokens=True))

    def settled(self, ids: Sequence[int]) -> str:
        """The text of all pieces but the open ones at the end, as far as its decoder is known to leave it."""
        settling = self._settling
        if settling is None:
            return ""
        end = len(ids)
        while end and self._is_open(ids[end - 1], settling):
            end -= 1
        return settling.settled(self.decode(ids[:end]))

    def surfaces(self, text: str) -> tuple[str, ...]:
        """The pieces of a text, one for each id of `encode`; where there is none for it, the text itself. Those of a
        byte-level alphabet are the text, and a space before a word is ▁ in both.
        """
        ids, encoding = self._encode(text)
        surfaces, end = [], 0
        nexts = [*(begin for begin, _ in encoding.offsets), len(text)][1:]
        followed = zip(ids, encoding.tokens, encoding.offsets, nexts, strict=True)
        for one, piece, (begin, after), following in followed:
            if self._is_bytes:
                shown = text[max(begin, end) : after]  # the pieces of one character all have the place of it
                surfaces.append((WORD_START if piece.startswith(BYTE_LEVEL_SPACE) else "") + shown.strip())
            elif one == self.unknown_id and not self._is_unigram:
                shown = text[begin : max(after, following)]  # marks that were composed have no place
                surfaces.append(shown.rstrip().replace(" ", WORD_START))
            else:
                surfaces.append(piece)
            end = max(end, after)
        return tuple(surfaces)

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces, some of them replaced by other text, → text; special tokens vanish."""
        kept = [piece for piece in pieces if piece and piece not in self._special_pieces]
        if self._is_bytes:
            kept = [piece if self.piece_id(piece) is not None else _spelled_by_bytes(piece) for piece in kept]
        decoder = self._backend.decoder
        return "".join(kept) if decoder is None else self._reading(lambda: decoder.decode(kept))

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The pieces with these ids, empty where an id has none."""
        return tuple((self._backend.id_to_token(one) or "") if 0 <= one < self._size else "" for one in ids)

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has no such piece."""
        one: int | None = self._backend.token_to_id(piece)
        return one

    def unknown_surfaces(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary does not have."""
        ids = self.encode(text)
        return [piece for piece, one in zip(self.surfaces(text), ids, strict=True) if one == self.unknown_id]

    def _encode(self, text: str) -> tuple[list[int], Encoding]:
        """The ids of a text, and what else the backend says of it."""
        encoding = self._reading(lambda: self._backend.encode(text, add_special_tokens=False))
        ids: list[int] = encoding.ids
        if not self._has_special(ids, encoding):
            return ids, encoding
        plain, of_plain = self._plain
        encoding = self._reading(lambda: plain.encode(text, add_special_tokens=False))
        return [of_plain.get(one, one) for one in encoding.ids], encoding

    def _has_special(self, ids: list[int], encoding: Encoding) -> bool:
        """Whether a special token was found in a text. The unknown one is there by right, unless it is spelled out:
        a unigram model then gives it as the piece, and the text of everything else that it does not know.
        """
        found = self._special.intersection(ids)
        return bool(found - {self.unknown_id}) or (
            bool(found) and self._is_unigram and self._unknown_piece in encoding.tokens
        )

    @cached_property
    def _settling(self) -> Settling | None:
        return settling_of(json.loads(_state(self._backend.decoder) or b"null"))

    def _is_open(self, one: int, settling: Settling) -> bool:
        """Whether later ids may change what this one becomes; one that vanishes says nothing of those before it."""
        (piece,) = self.pieces([one])
        return not piece or one in self._special or settling.is_open(piece)

    @cached_property
    def _plain(self) -> tuple[Backend, dict[int, int]]:
        """The same tokenizer without special tokens, and the model's ids of the tokens that have another id there."""
        values = json.loads(self._content)
        values["added_tokens"] = [one for one in values.get("added_tokens") or () if not one["special"]]
        _hide(values["model"], self._special_pieces)
        plain = self._reading(lambda: _load(json.dumps(values, ensure_ascii=False).encode()))
        others = {one["content"] for one in values["added_tokens"]}
        model_ids = self._backend.get_vocab(with_added_tokens=True)
        return plain, {one: model_ids[piece] for piece, one in plain.get_vocab(True).items() if piece in others}

    def _reading(self, call: Callable[[], Value]) -> Value:
        """What a call gives; whatever the backend raises, a panic of Rust included, is a TokenizerError."""
        try:
            return call()
        except TokenizerError:
            raise
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise TokenizerError(
                    f"tokenizers cannot use {self._path} ({str(error).splitlines()[0] if str(error) else 'no reason'})",
                    expected="a tokenizer.json that it can read",
                    remedy="Copy the tokenizer that the model was trained with.",
                ) from None
            raise


def _load(content: bytes) -> Backend:
    try:
        from tokenizers import Tokenizer  # an extra, which few bundles need
    except ImportError:
        raise TokenizerError(
            "The tokenizer of this model is a tokenizer.json, and the package tokenizers is not installed",
            expected="the package tokenizers",
            remedy="Install it with: pip install 'kvx[tokenizers]'",
        ) from None
    backend = Tokenizer.from_str(content.decode())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as the text that they are
    return backend


def _hide(model: dict[str, Any], special: set[str]) -> None:
    """Renames special tokens among the pieces of a model so that no text has them.

    No piece holds a space: it is ▁ or Ġ there, or the text was split at it.
    """
    vocabulary = model["vocab"]
    names = {piece: f" {piece} " for piece in special}
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): one for piece, one in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _state(part: PreTokenizer | Decoder | None) -> bytes:
    return b"" if part is None else bytes(part.__getstate__())


def _spelled_by_bytes(text: str) -> str:
    """Text in the byte-level alphabet: printable bytes are themselves, and the others follow from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [one for one in range(256) if one not in printable]
    return "".join(chr(one) if one in printable else chr(256 + others.index(one)) for one in text.encode())
