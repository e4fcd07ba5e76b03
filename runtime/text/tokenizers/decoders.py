"""The decoder of a `tokenizer.json`: how much of its text stays when further pieces follow.

A decoder is a chain of stages. Most change each piece by itself, by its place or by what stands before it, so what they
made of the pieces so far stays. A stage that sees the whole text may change what crosses two pieces. Only those chains
are described here for which it is known what further pieces change: the ones of the usual models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvx.runtime.bundle.vocabulary import TIDIED
from kvx.runtime.text.tokenizers.reading import without_open_end
from kvx.runtime.text.tokenizers.vocabulary import settled_when_tidied

Stage = Mapping[str, Any]

PIECEWISE = {"Metaspace", "WordPiece", "CTC", "Replace", "Strip"}  # WordPiece and CTC tidy each piece by itself
JOINING = {"ByteLevel", "Fuse"}  # after them there is one text
BYTE = "<0x"  # how the name of a byte begins, which ByteFallback reads


@dataclass(frozen=True, slots=True)
class Settling:
    """What further pieces may still change: a run of `bytes`, which one wrong byte makes all wrong; a piece whose
    `suffix` becomes a space unless it is the last; spaces before punctuation, where the text is `tidied`.
    """

    bytes: bool = False
    suffix: str = ""
    tidied: bool = False

    def is_open(self, piece: str) -> bool:
        """Whether further pieces may change what this one becomes."""
        if self.bytes and piece.startswith(BYTE):
            return True
        return bool(self.suffix) and not piece.replace(self.suffix, " ").startswith(piece.replace(self.suffix, ""))

    def settled(self, text: str) -> str:
        """The beginning of a decoded text that stays. The last of its pieces must not be open."""
        closed = without_open_end(text)
        return settled_when_tidied(closed) if self.tidied else closed


def settling_of(decoder: Stage | None) -> Settling | None:
    """What further pieces may change of the text of a decoder; None where it may be anything.

    That is so without a decoder too: ids are then joined by another rule than pieces.
    """
    if decoder is None:
        return None
    pieces, text = _cut(list(_stages(decoder)), JOINING)
    tidied = len(text) > len(TIDIED) and all(map(_tidies, text[-len(TIDIED) :], TIDIED))
    text = text[: -len(TIDIED)] if tidied else text
    if _kinds(pieces) == ["BPEDecoder"]:
        suffix = pieces[0]["suffix"]
        return Settling(suffix=suffix) if suffix and set(_kinds(text)) <= {"Fuse"} and not tidied else None
    before, fallback = _cut(pieces, {"ByteFallback"})
    by_piece = fallback[1:] if fallback else before
    is_known = PIECEWISE.issuperset(_kinds(by_piece)) and (_joins(text) or _extends(text))
    if not is_known or (fallback and not all(map(_spaces, before))):
        return None
    return Settling(bytes=bool(fallback), tidied=tidied)


def _stages(decoder: Stage) -> Iterator[Stage]:
    """The stages of a decoder, which may be sequences of others."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for one in decoder["decoders"]:
        yield from _stages(one)


def _cut(stages: list[Stage], kinds: set[str]) -> tuple[list[Stage], list[Stage]]:
    """The stages before the first of some kinds, and those from there on."""
    place = next((place for place, stage in enumerate(stages) if stage["type"] in kinds), len(stages))
    return stages[:place], stages[place:]


def _kinds(stages: list[Stage]) -> list[str]:
    return [stage["type"] for stage in stages]


def _joins(stages: list[Stage]) -> bool:
    """Whether they do no more than join pieces, or their bytes."""
    return all(kind == "Fuse" for kind in _kinds(stages[1:]))


def _extends(stages: list[Stage]) -> bool:
    """Whether they join pieces to a text, and make a longer text of a longer one without a change to its beginning.

    A Strip at the end is none of them: tokenizers fails for a text that is empty so far.
    """
    return _kinds(stages[:1]) == ["Fuse"] and all(
        stage["type"] == "Fuse" or _is_of_one_character(stage) or (stage["type"] == "Strip" and not stage["stop"])
        for stage in stages[1:]
    )


def _is_of_one_character(stage: Stage) -> bool:
    """Whether a stage replaces a character wherever it stands."""
    return stage["type"] == "Replace" and len(stage["pattern"].get("String", "")) == 1


def _spaces(stage: Stage) -> bool:
    """Whether a stage writes spaces for a character, which make no name of a byte."""
    return _is_of_one_character(stage) and stage["content"] == " "


def _tidies(stage: Stage, spaced: str) -> bool:
    return dict(stage) == {"type": "Replace", "pattern": {"String": spaced}, "content": spaced.strip()}
