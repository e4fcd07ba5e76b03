"""From attention to words: which piece of the source a target token looks at, and what stands there.

Letters: T target tokens, S source positions, which are the pieces of the source and what framing lays around them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

from kvx.runtime.arrays import FloatArray
from kvx.runtime.bundle.vocabulary import WORD_START
from kvx.runtime.errors import InputError


def align(attention: FloatArray, before: int = 1, after: int = 1) -> tuple[int, ...]:
    """attention [T, S] → for every target token the index of the source piece that it attends to most, the first of
    equals; the ids before and after the text, bos and eos, do not count. Raises InputError where there is no piece.
    """
    if attention.ndim != 2 or attention.shape[1] <= before + after:
        raise InputError(
            f"The attention has the shape {list(attention.shape)}",
            expected=f"[T, S]: a row for each target token, {before} columns, those of the source's pieces and {after}",
            remedy="Stack the rows of one sentence, cut to its source's length.",
        )
    return tuple(attention[:, before : attention.shape[1] - after].argmax(axis=1).tolist())


def replace_unknown(
    source_pieces: Sequence[str],
    target_pieces: Sequence[str],
    target_ids: Sequence[int],
    unknown_id: int,
    alignment: Sequence[int],
    join: Callable[[Sequence[str]], str] | None = None,
) -> str:
    """The target's text, in which the word of the source that it is aligned with stands for every unknown token.

    `source_pieces` are those of Tokenizer.surfaces, `target_pieces` and `target_ids` [T] without eos, `alignment` [T]
    indices of source pieces. A word is all its pieces without the punctuation around it; side by side it is there once
    for several unknown tokens. `join` makes text of pieces (Tokenizer.join; by default pieces are strung together).
    """
    tokens = zip(target_pieces, target_ids, alignment, strict=True)
    return (join or _string_together)(list(_replaced(_words(source_pieces), tokens, unknown_id)))


def _replaced(words: list[tuple[int, str]], tokens: Iterator[tuple[str, int, int]], unknown_id: int) -> Iterator[str]:
    copied = None
    for piece, token, place in tokens:
        if token != unknown_id:
            copied = None
            yield piece
            continue
        begin, word = words[place]
        if begin != copied:
            yield word
        copied = begin


def _words(pieces: Sequence[str]) -> list[tuple[int, str]]:
    """For every piece, where its word begins and what it is."""
    begins = [index for index, piece in enumerate(pieces) if index == 0 or piece.startswith(WORD_START)]
    words = []
    for begin, end in zip(begins, [*begins[1:], len(pieces)], strict=True):
        words += [(begin, _without_punctuation("".join(pieces[begin:end]).replace(WORD_START, "")))] * (end - begin)
    return words


def _without_punctuation(word: str) -> str:
    """The word without punctuation at its ends, or as it is where nothing else is there."""
    inner = [index for index, character in enumerate(word) if not unicodedata.category(character).startswith("P")]
    return word[inner[0] : inner[-1] + 1] if inner else word


def _string_together(pieces: Sequence[str]) -> str:
    return "".join(pieces).replace(WORD_START, " ").removeprefix(" ")
