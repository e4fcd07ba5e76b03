"""The sentences of a request on their way through the engines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from kvx.runtime.engine.handle import Handle
from kvx.runtime.engine.reply import Event
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.serving.models import Route
from kvx.runtime.text.sources import Source
from kvx.runtime.translation import Translation

AHEAD = 64  # sentences of one request that an engine has at a time: those of others come in between
LAST = -1  # of the legs of a way


@dataclass(frozen=True, slots=True)
class Way:
    """How one sentence is translated: its route, and the options of each leg."""

    route: Route
    options: tuple[TranslateOptions, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of the text with this index."""

    source: Source
    way: Way
    text: int


class Work:
    """Translates the sentences of one request by a moment of time.monotonic, no more than AHEAD at a time. Where the
    task is cancelled, so are they.
    """

    def __init__(self, sentences: Sequence[Sentence], until: float) -> None:
        self._sentences = sentences
        self._until = until

    async def results(self) -> list[Translation]:
        """The translation of each. Raises what Engine.submit and Handle.wait raise; errors of a text have its index."""
        if len(self._sentences) == 1:
            return [await self._one(self._sentences[0])]
        gate = asyncio.Semaphore(AHEAD)

        async def one(sentence: Sentence) -> Translation:
            async with gate:
                return await self._one(sentence)

        with _first_error():
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(sentence)) for sentence in self._sentences]
        return [task.result() for task in tasks]

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The number of each sentence with its events, one sentence after the other. Those behind go on meanwhile."""
        ready = asyncio.Queue[Handle | Exception](AHEAD - 2)  # one more is read, and one waits for room
        feeding = asyncio.create_task(self._feed(ready))
        try:
            for number in range(len(self._sentences)):
                handle = await ready.get()
                if not isinstance(handle, Handle):
                    raise handle
                try:
                    async for event in handle:
                        yield number, event
                except InputError as error:
                    raise error.at(self._sentences[number].text + 1) from None
                finally:
                    handle.cancel()
        finally:
            feeding.cancel()
            while not ready.empty():
                if isinstance(left := ready.get_nowait(), Handle):
                    left.cancel()

    async def _feed(self, ready: asyncio.Queue[Handle | Exception]) -> None:
        """Submits all, as far ahead as the queue has room."""
        try:
            for sentence in self._sentences:
                source = await self._before_last(sentence)
                handle = self._submit(sentence, LAST, source)
                try:
                    await ready.put(handle)
                except BaseException:
                    handle.cancel()
                    raise
        except Exception as error:
            await ready.put(error)

    async def _one(self, sentence: Sentence) -> Translation:
        source = await self._before_last(sentence)
        return await self._translated(sentence, LAST, source)

    async def _before_last(self, sentence: Sentence) -> Source:
        """What the last leg translates."""
        source = sentence.source
        for leg in range(len(sentence.way.route.legs) - 1):
            source = (await self._translated(sentence, leg, source)).text
        return source

    async def _translated(self, sentence: Sentence, leg: int, source: Source) -> Translation:
        try:
            return await self._submit(sentence, leg, source).wait()
        except InputError as error:
            raise error.at(sentence.text + 1) from None

    def _submit(self, sentence: Sentence, leg: int, source: Source) -> Handle:
        engine = sentence.way.route.legs[leg].model.engine
        left = max(0.0, self._until - time.monotonic())
        try:
            return engine.submit(source, sentence.way.options[leg], deadline=left)
        except InputError as error:
            raise error.at(sentence.text + 1) from None


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """Raises the first of a group of errors instead of the group."""
    try:
        yield
    except* Exception as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
