"""The texts of a request as the sentences that engines translate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvx.runtime.serving.detection import Detected
from kvx.runtime.serving.schema import Format
from kvx.runtime.serving.work import Sentence, Way
from kvx.runtime.text.markup import html_passage
from kvx.runtime.text.passages import Passage, always, passage
from kvx.runtime.text.sources import Source
from kvx.runtime.translation import Translation

AT_ONCE = 2000  # characters that are split in the thread of the event loop

Asked = tuple[Source, Way, Detected | None]  # a text, and its language where that was found out


@dataclass(frozen=True, slots=True)
class Text:
    """The text with this index, how it is translated, and the sentences that are; with what stands between them in a
    `passage`, None where the text is one sentence.
    """

    index: int
    way: Way
    sentences: tuple[Source, ...]
    passage: Passage | None = None
    detected: Detected | None = None

    @classmethod
    def of(cls, index: int, text: Source, way: Way, form: Format, detected: Detected | None = None) -> Text:
        """Of a text in this format. Raises InputError."""
        if not way.route.legs and isinstance(text, str):
            return cls(index, way, (), Passage((), (text,)), detected)
        if form == "sentence" or not isinstance(text, str):
            return cls(index, way, (text,), None, detected)
        split = html_passage if form == "html" else passage
        cut = way.options[0].on_long == "truncate"  # that is what was asked for
        found = split(text, way.route.source, always if cut else way.route.legs[0].model.engine.fits)
        return cls(index, way, found.asked, found, detected)

    def joined(self, translations: Sequence[Translation], number: int = 0) -> str:
        """The whole text, made of the translations of its sentences: the best ones, or others with this number."""
        texts = [one.hypotheses[min(number, len(one.hypotheses) - 1)].text for one in translations]
        return texts[0] if self.passage is None else self.passage.joined(texts)


class Joiner:
    """Joins a text while its sentences come in, one after the other, each in pieces. What has wholes comes at the
    end, since only then it is known where its elements go.
    """

    def __init__(self, text: Text) -> None:
        self._passage = text.passage
        self._reached = -1  # sentences to which the gaps have been given
        self._left = ""  # the last of what was added

    def add(self, number: int, piece: str) -> str:
        """What a piece of the sentence of this number adds to the text, what stands before the sentence included."""
        if self._passage is None or not piece:
            return piece
        if self._passage.wholes:
            return ""
        before = self._gaps(number, piece)
        self._left = piece
        return before + (self._passage.escapes[number](piece) if self._passage.escapes else piece)

    def end(self, translations: Sequence[str]) -> str:
        """What stands after the last sentence, and before those that are empty."""
        if self._passage is None:
            return ""
        if self._passage.wholes:
            return self._passage.joined(translations)
        return self._gaps(len(self._passage.sentences), "")

    def _gaps(self, number: int, piece: str) -> str:
        """All that stands between what was added last and a piece of this sentence."""
        passage, found = self._passage, ""
        assert passage is not None
        while self._reached < number:
            if self._reached < 0 or self._reached + 1 == len(passage.sentences):
                found += passage.gaps[self._reached + 1]
            else:
                found += passage.gap(self._reached, self._left, piece if self._reached + 1 == number else "")
            self._reached += 1
        return found


async def split(texts: Sequence[Asked], form: Format) -> list[Text]:
    """The texts of a request, in order; long ones beside the event loop. Raises InputError."""

    def all_of_them() -> list[Text]:
        return [Text.of(number, text, way, form, detected) for number, (text, way, detected) in enumerate(texts)]

    long = form != "sentence" and sum(len(text) for text, _, _ in texts) > AT_ONCE
    return await asyncio.to_thread(all_of_them) if long else all_of_them()


def sentences_of(texts: Iterable[Text]) -> list[Sentence]:
    """All sentences, in order."""
    return [Sentence(source, text.way, text.index) for text in texts for source in text.sentences]
