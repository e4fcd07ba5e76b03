"""The text of a translation while its ids still come."""

from __future__ import annotations

from collections.abc import Sequence

from kvx.runtime.text.tokenizers.protocol import Tokenizer


class Increments:
    """Target ids as they come → the text that no later id changes, each part once.

    The ids are those of one translation without eos. What `add` gave, and then `rest`, is the whole text. With
    `until_unknown` nothing is certain after an unknown id: a word of the source may take its place at the end.

    Each call of `add` decodes all ids so far, so the cost grows with the square of the length: a decoder needs what
    came before, and for some hundreds of ids this is microseconds beside the milliseconds of a step.
    """

    def __init__(self, tokenizer: Tokenizer, *, until_unknown: bool = False) -> None:
        self._tokenizer = tokenizer
        self._until_unknown = until_unknown
        self._ids: list[int] = []
        self._given = 0  # characters
        self._is_certain = True  # until an unknown id came, where this counts

    def add(self, ids: Sequence[int]) -> str:
        """The further text that is certain with these ids; often it is empty."""
        if not self._is_certain or not len(ids):
            return ""
        self._ids += self._known(ids)
        text = self._tokenizer.settled(self._ids)
        begin, self._given = self._given, max(self._given, len(text))
        return text[begin:]

    def rest(self, text: str) -> str:
        """What `add` has not given of the whole text of the translation; for a tokenizer that may change everything
        until the end, all of it.
        """
        return text[self._given :]

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids, or those before the first unknown one where it ends what is certain."""
        found = [int(one) for one in ids]
        if self._until_unknown and self._tokenizer.unknown_id in found:
            self._is_certain = False
            return found[: found.index(self._tokenizer.unknown_id)]
        return found
