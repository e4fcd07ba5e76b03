"""Target texts → ids: whole translations, prefixes, pieces and sequences of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.text.sources import encode_text, load_tokenizer
from kvx.runtime.text.tokenizers.protocol import Tokenizer

Target = str | Sequence[int] | NDArray[np.integer[Any]]

NAMED_PIECES = 5


class TargetReader:
    """The target side of a bundle: its tokenizer, special ids, vocabulary and positions."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or load_tokenizer(bundle, "target")
        self._eos = bundle.manifest.framing.eos
        self._vocabulary = bundle.manifest.model["target_vocab_size"]
        self._positions = bundle.manifest.most_new_tokens

    def whole(self, target: Target, number: int) -> tuple[int, ...]:
        """The ids of a target that is complete: a text, which eos follows, or ids as they are.

        Raises InputError for ids that are none, and for none or more than the model has positions.
        """
        if isinstance(target, str):
            return self._within((*encode_text(self.tokenizer, target, number), self._eos), self._positions, number)
        if not isinstance(target, Iterable):
            raise InputError(
                f"A target is {target!r:.60}",
                expected="a text or a sequence of ids",
                remedy="Give one for each source.",
                line=number,
            )
        return self._within(tuple(target), self._positions, number)

    def prefix(self, prefix: Target, limit: int, number: int | None) -> tuple[int, ...]:
        """The ids of a target's beginning, a text or ids, which must leave room below `limit` for another token.

        Raises InputError also for pieces of a text that the vocabulary does not have, and for eos.
        """
        ids = self._ids(prefix, "prefix", number)
        if not ids:
            return ()
        found = self._within(tuple(ids), self._positions, number)
        if self._eos in found or len(found) >= limit:
            raise InputError(
                "The prefix holds eos" if self._eos in found else f"The prefix has {len(found)} tokens",
                expected=f"fewer than {limit} tokens, the limit of new ones, and no eos among them",
                remedy="Shorten it, or allow more new tokens (`max_new_tokens`).",
                option="prefix",
                line=number,
            )
        return found

    def prefixes(self, prefixes: Iterable[Target | None], limit: int) -> Iterator[tuple[int, ...] | None]:
        """The ids of each prefix, None where there is none."""
        for number, prefix in enumerate(prefixes, 1):
            yield None if prefix is None else self.prefix(prefix, limit, number)

    def pieces(self, tokens: Iterable[str | int], option: str) -> tuple[int, ...]:
        """The ids of the pieces, or the ids, that are the value of an option. Raises OptionError naming all that the
        vocabulary does not have, and for eos.
        """
        tokens = tuple(tokens)
        ids = [self.tokenizer.piece_id(token) if isinstance(token, str) else token for token in tokens]
        wrong = [token for token, one in zip(tokens, ids, strict=True) if not self._is_id(one) or one == self._eos]
        if wrong:
            raise OptionError(
                f"`{option}` has {', '.join(map(repr, wrong))}",
                expected=f"pieces of the target vocabulary or ids from 0 to {self._vocabulary - 1}, but not eos",
                remedy="Correct them. To put off the end use `min_new_tokens` or `end_penalty`.",
                option=option,
            )
        return tuple(int(one) for one in ids if one is not None)

    def sequence(self, target: Target, option: str) -> tuple[int, ...]:
        """The ids of a text's pieces, or the ids, that are a value of an option. Raises OptionError where there are
        none, or some that the vocabulary does not have, and for eos.
        """
        ids = self.pieces(self._ids(target, option, None), option)
        if not ids:
            raise OptionError(
                f"`{option}` has an empty text",
                expected="a text with at least one piece",
                remedy="Correct it or leave it out.",
                option=option,
            )
        return ids

    def _ids(self, target: Target, option: str, number: int | None) -> Sequence[int]:
        """The ids of a text, all of whose pieces must be known, or ids as they are."""
        if isinstance(target, str):
            unknown = self.tokenizer.unknown_surfaces(target)
            ids = encode_text(self.tokenizer, target, number or 1)
            if unknown:
                raise InputError(
                    f"`{option}` has the unknown pieces {', '.join(map(repr, unknown[:NAMED_PIECES]))}",
                    expected="pieces of the target vocabulary",
                    remedy="Spell it as the model's training data does, or give ids.",
                    option=option,
                    line=number,
                )
            return ids
        if isinstance(target, np.ndarray) and target.ndim == 1:
            return target.tolist()  # type: ignore[no-any-return]  # a list for one axis
        if isinstance(target, Sequence) and not isinstance(target, bytes | bytearray | str):
            return list(target)
        raise InputError(
            f"`{option}` is {target!r:.60}",
            expected="a text or a sequence of ids",
            remedy="Give one, or None for none.",
            option=option,
            line=number,
        )

    def _within(self, ids: tuple[int, ...], most: int, number: int | None) -> tuple[int, ...]:
        odd = [one for one in ids if not self._is_id(one)]
        if odd or not 1 <= len(ids) <= most:
            raise InputError(
                f"A target has the id {odd[0]!r}" if odd else f"A target has {len(ids)} ids",
                expected=f"1 to {most} ids, with eos, each from 0 to {self._vocabulary - 1}",
                remedy="Shorten or correct it.",
                line=number,
            )
        return tuple(int(one) for one in ids)

    def _is_id(self, one: object) -> bool:
        return isinstance(one, Integral) and not isinstance(one, bool) and 0 <= int(one) < self._vocabulary
