"""sentencepiece on either side of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvx.runtime.bundle.manifest import SpecialIds
from kvx.runtime.errors import TokenizerError


class Tokenizer:
    """One sentencepiece model, which must have pad, bos and eos. Raises TokenizerError."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"The tokenizer {path} cannot be read ({error.strerror})",
                expected="a sentencepiece model",
                remedy="Name it with `source_tokenizer` or `target_tokenizer`.",
            ) from None
        import sentencepiece  # slow to import, and needed only where texts are read

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError, TypeError):
            raise TokenizerError(
                f"sentencepiece cannot load {path}",
                expected="a sentencepiece model",
                remedy="Copy the tokenizer that the model was trained with.",
            ) from None
        self._reading = _Reading(path)
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


class _Reading:
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
