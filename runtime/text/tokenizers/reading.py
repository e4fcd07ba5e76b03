"""What the kinds of tokenizers share: files that are read, and what sentencepiece raises."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kvx.runtime.bundle.external import varint
from kvx.runtime.bundle.files import read_regular
from kvx.runtime.errors import TokenizerError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MOST_BYTES = 512 << 20  # of a file of a tokenizer
REPLACEMENT = "\ufffd"  # what stands for bytes that make no character
REWRITING = 5 << 3 | 2  # the key of ModelProto.denormalizer_spec in sentencepiece_model.proto
IS_MESSAGE = 2  # the wire type of a field that has a length, in a key of one byte


def read_content(path: Path, what: str, most: int = MOST_BYTES) -> bytes:
    """The content of a tokenizer's file, which is `what`. Raises TokenizerError."""
    try:
        content = read_regular(path, most)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"The tokenizer {path} cannot be read ({getattr(error, 'strerror', None) or error})",
            expected=what,
            remedy="Name it with `source_tokenizer` or `target_tokenizer`.",
        ) from None
    if len(content) > most:
        raise TokenizerError(
            f"The tokenizer {path} is larger than {most} bytes",
            expected=what,
            remedy="Copy the tokenizer that the model was trained with.",
        )
    return content


def load_processor(path: Path) -> SentencePieceProcessor:
    """The sentencepiece model at a path. Raises TokenizerError."""
    content = read_content(path, "a sentencepiece model")
    import sentencepiece  # slow to import, and needed only where texts are read

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError, TypeError):
        raise TokenizerError(
            f"sentencepiece cannot load {path}",
            expected="a sentencepiece model",
            remedy="Copy the tokenizer that the model was trained with.",
        ) from None


def without_open_end(text: str) -> str:
    """A text without what the next pieces may change or take away at its end: characters that stand for bytes of an
    unfinished character, and white space.
    """
    end = len(text)
    while end and (text[end - 1] == REPLACEMENT or text[end - 1].isspace()):
        end -= 1
    return text[:end]


def rewrites(processor: SentencePieceProcessor) -> bool:
    """Whether a model has rules by which sentencepiece rewrites the whole of a decoded text.

    sentencepiece does not say so, but the model does: a message of messages, of which this is one.
    """
    content: bytes = processor.serialized_model_proto()
    position = 0
    while position < len(content):
        key, length = content[position], content[position + 1]
        if key & 0x87 != IS_MESSAGE:
            return True  # of a format that is not known here
        position += 2
        if length & 0x80:
            length, position = varint(content, position - 1, len(content))
        if key == REWRITING and length:
            return True
        position += length
    return False


class Reading:
    """A context in which what sentencepiece raises becomes a TokenizerError: a model that can be loaded may still hold
    pieces that are no UTF-8.
    """

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing is done beforehand."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises TokenizerError."""
        if isinstance(error, UnicodeDecodeError | RuntimeError | IndexError):
            raise TokenizerError(
                f"sentencepiece cannot use {self._path} ({error})",
                expected="a model whose pieces are text",
                remedy="Copy the tokenizer that the model was trained with.",
            ) from error
