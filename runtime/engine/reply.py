"""What comes of a request that was submitted: kept by the decode loop, read by whoever holds the handle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvx.runtime.decoding.results import Decided
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.workers import Workers
from kvx.runtime.engine.writer import not_finite, write
from kvx.runtime.errors import own_copy
from kvx.runtime.text.increments import Increments
from kvx.runtime.translation import Translation

_log = logging.getLogger("kvx")


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a translation, as soon as it is decided. `text` is what it adds to the text that is certain: often
    nothing, where a character or a word is not whole yet. `log_probability` is the model's own, natural, with `scores`.
    `id` is None where only text that was held back is left.
    """

    text: str
    id: int | None
    log_probability: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The last event: the whole translation. The texts of all tokens before it, joined, are its text."""

    translation: Translation


Event = Token | Result


class Reply:
    """The owner of one request. `news` is what has been decided, as it came; `changed` guards it."""

    asked = False
    reads_ahead = False

    def __init__(self, workers: Workers) -> None:
        self.request: Request
        self.news: list[Decided] = []
        self.done = False
        self.changed = threading.Condition()
        self._workers = workers
        self._is_cancelled = False
        self._listeners: list[Callable[[], object]] = []

    def submit(self, request: Request, most: int) -> None:
        """Gives the request to the workers. Raises Overloaded and EngineClosed."""
        self.request = request
        if request.finished:
            self.over([request])
        else:
            self._workers.add([request], most=most)

    def cancel(self) -> None:
        """Ends it, at the next step at the latest."""
        if not self.done:
            self._is_cancelled = True
            self._workers.cancel(self)

    def translation(self) -> Translation:
        """Of what is done. Raises what went wrong, and InputError where the model gave numbers that are not finite."""
        request = self.request
        if request.error is not None:
            raise own_copy(request.error)
        if request.failed:
            raise not_finite(request).at(None)
        return write(request)

    def listen(self, callback: Callable[[], object]) -> None:
        """Has this called whenever there is news, in any thread, and at once for what there is. It must be quick."""
        with self.changed:
            if not self.done:
                self._listeners.append(callback)
        _call(callback)

    def when_done(self, callback: Callable[[], object]) -> None:
        """Has this called once, when nothing more will come, in any thread. It must be quick."""
        with self.changed:
            if not self.done:
                self._listeners.append(lambda: callback() if self.done else None)
                return
        _call(callback)

    def cancelled(self) -> bool:
        """See Owner."""
        return self._is_cancelled

    def fail(self, error: BaseException) -> None:
        """See Owner: what it answers raises nothing."""

    def decided(self, news: Decided) -> None:
        """See Owner."""
        self._tell(news)

    def over(self, requests: list[Request]) -> None:
        """See Owner."""
        self._tell(None)

    def _tell(self, news: Decided | None) -> None:
        """Notes news, or that there will be no more, and calls whoever listens."""
        with self.changed:
            if news is None:
                self.done = True
            else:
                self.news.append(news)
            listeners = [*self._listeners]
            if self.done:
                self._listeners.clear()
            self.changed.notify_all()
        for callback in listeners:
            _call(callback)


class Events:
    """The events of one request, each once: those that are there by now, never waiting for more."""

    def __init__(self, reply: Reply) -> None:
        self.ended = False
        self._reply = reply
        self._given = 0  # ids
        self._seen = 0  # news
        request = reply.request
        replaced = request.asked_for.replace_unknown
        self._text = Increments(request.model.targets.tokenizer, until_unknown=replaced)
        request.followed = True  # from now on, with all that has been decided before

    def has_more(self) -> bool:
        """Whether there are any that have not been given."""
        return self._reply.done or len(self._reply.news) > self._seen

    def ready(self) -> list[Event]:
        """These. Raises what `Reply.translation` raises."""
        done, news = self._reply.done, self._reply.news[self._seen :]
        self._seen += len(news)
        found: list[Event] = [event for one in news for event in self._tokens(one)]
        if done and self._seen == len(self._reply.news):
            self.ended = True
            found.extend(self._last(self._reply.translation()))
        return found

    def _tokens(self, news: Decided) -> Iterator[Token]:
        scores = news.log_probabilities or (None,) * len(news.ids)
        self._given += len(news.ids)
        for one, score in zip(news.ids, scores, strict=True):
            yield Token(self._text.add((one,)), one, score)

    def _last(self, translation: Translation) -> Iterator[Event]:
        """What is left of the tokens and the text, and the result."""
        ids, rest = translation.ids[self._given :], self._text.rest(translation.text)
        scores = (translation.log_probabilities or (None,) * len(translation.ids))[self._given :]
        for one, score in zip(ids[:-1], scores, strict=False):
            yield Token("", one, score)
        if ids:
            yield Token(rest, ids[-1], scores[-1])
        elif rest:
            yield Token(rest, None)
        yield Result(translation)


def _call(callback: Callable[[], object]) -> None:
    """Calls it; what it raises must not reach a decode loop."""
    try:
        callback()
    except BaseException:
        _log.exception("a callback of a request failed")
