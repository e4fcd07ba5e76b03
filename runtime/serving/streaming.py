"""What becomes of the texts of a request: results, and the events that lead to them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from kvx.runtime.decoding.results import FinishReason
from kvx.runtime.engine.reply import Event, Token
from kvx.runtime.serving import schema
from kvx.runtime.serving.answers import problem_of
from kvx.runtime.serving.exchange import Exchange
from kvx.runtime.serving.texts import Joiner, Text
from kvx.runtime.serving.work import Work
from kvx.runtime.translation import Translation


def result_of_text(text: Text, translations: Sequence[Translation]) -> schema.TranslatedText:
    """What became of one text."""
    route = text.way.route
    common: dict[str, Any] = {
        "model": route.name,
        "source_language": route.source,
        "target_language": route.target,
        "detected": UNSET if text.detected is None else schema.DetectedLanguage(*text.detected),
        "pivot": route.pivot or UNSET,
    }
    if text.passage is None:
        return schema.TranslatedText(**common, **translations[0].to_dict())
    sentences = [
        schema.Sentence(source=source, **translation.to_dict())
        for source, translation in zip(text.passage.asked, translations, strict=True)
    ]
    texts = [one.text for one in translations]
    return schema.TranslatedText(
        **common,
        text=text.passage.joined(texts),
        finish_reason=_worst([one.finish_reason for one in translations]),
        gaps=UNSET if text.passage.wholes else list(text.passage.gaps_between(texts)),
        sentences=sentences,
    )


def _worst(reasons: Sequence[FinishReason]) -> FinishReason:
    """The reason of a text: that of the first sentence that did not end by itself."""
    return next((one for one in reasons if one != "end"), "end")


def tokens_of(result: schema.TranslatedText) -> int:
    """How many tokens a text's translation has."""
    own = len(result.ids) if result.ids is not UNSET else 0
    return own + (sum(len(one.ids) for one in result.sentences) if result.sentences is not UNSET else 0)


class Stream:
    """The events of a request: the tokens of all sentences, one after the other, and the result of each text as soon as
    it is whole.
    """

    def __init__(self, exchange: Exchange, texts: Sequence[Text], work: Work) -> None:
        self._exchange = exchange
        self._work = work
        self._places = [(text, number) for text in texts for number in range(len(text.sentences))]
        self._waiting = deque(texts)
        self._done: deque[Translation] = deque()
        self._joiners = {text.index: Joiner(text) for text in texts}
        exchange.facts["tokens"] = 0

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events. What goes wrong is the last but nothing."""
        try:
            for one in self._finished():
                yield one
            async for place, event in self._work.events():
                for one in self._heard(*self._places[place], event):
                    yield one
        except Exception as error:
            self._exchange.note_error(error)
            yield sse("error", problem_of(error))
            return
        yield sse("end", {})

    def _heard(self, text: Text, sentence: int, event: Event) -> Iterator[bytes]:
        """What one event of a sentence makes known."""
        if isinstance(event, Token):
            self._note_first_token()
            yield sse("token", self._token(text, sentence, event))
        else:
            self._done.append(event.translation)
            yield from self._finished()

    def _finished(self) -> Iterator[bytes]:
        """The results of texts all sentences of which are there now."""
        while self._waiting and len(self._done) >= len(self._waiting[0].sentences):
            text = self._waiting.popleft()
            own = [self._done.popleft() for _ in text.sentences]
            if rest := self._joiners[text.index].end([one.text for one in own]):
                yield sse("token", {"index": text.index, "text": rest, "id": None})
            result = result_of_text(text, own)
            self._exchange.facts["tokens"] += tokens_of(result)
            yield sse("result", {"index": text.index, "translation": result})

    def _token(self, text: Text, sentence: int, token: Token) -> dict[str, Any]:
        written = self._joiners[text.index].add(sentence, token.text)
        form: dict[str, Any] = {"index": text.index, "text": written, "id": token.id}
        if token.log_probability is not None:
            form["log_probability"] = token.log_probability
        if text.passage is not None:
            form["sentence"] = sentence
        return form

    def _note_first_token(self) -> None:
        exchange = self._exchange
        if "first_token_ms" not in exchange.facts:
            seconds = time.monotonic() - exchange.begun
            exchange.facts["first_token_ms"] = round(1000 * seconds, 1)
            exchange.service.metrics.first_token.observe(seconds)


def sse(event: str, data: object) -> bytes:
    """A server-sent event."""
    return b"event: " + event.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
