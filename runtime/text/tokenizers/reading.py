"""What the kinds of tokenizers share: files that are read, and what sentencepiece raises."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kvx.runtime.bundle.files import read_regular
from kvx.runtime.errors import TokenizerError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MOST_BYTES = 512 << 20  # of a file of a tokenizer


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
