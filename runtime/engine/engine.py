"""The engine: texts at any time, from any thread, each with options of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.core import SECONDS, Core, EngineOptions, one_language
from kvx.runtime.engine.handle import Handle
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.reply import Event, Reply
from kvx.runtime.engine.workers import EngineLoad
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateKeywords, TranslateOptions, options_or_default
from kvx.runtime.rules import refuse, wrong_value
from kvx.runtime.text.sources import Source
from kvx.runtime.translation import Translation


class Engine:
    """Decodes what is submitted, in threads of its own: a text may come at any step of the others, each with its own
    search, filters, limit and prefix. The same text gives the same translation whoever is beside it.

    `with` closes it at the end, after all that was submitted; after an error, at once.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "onnx",
        threads: int | None = None,
        workers: int | None = None,
        spin: bool = False,
        device: str = "cpu",
        rows: int | None = None,
        cache_bytes: int | None = None,
        max_waiting: int = 1024,
        idle_seconds: float = 5.0,
        warm: bool = False,
    ) -> Self:
        """The engine of the bundle at this path. The first options are those of Translator.load, the others those of
        EngineOptions. With `warm`, every graph that options can need is loaded now, and a first step is run. Raises
        BundleError, DeviceError, OptionError, TokenizerError.
        """
        options = EngineOptions(rows=rows, cache_bytes=cache_bytes, max_waiting=max_waiting, idle_seconds=idle_seconds)
        model = LoadedModel.at(bundle, device, backend=backend, threads=threads, workers=workers, spin=spin)
        core = Core(model, options)
        if warm:
            core.warm()
        return cls(core)

    @property
    def manifest(self) -> Manifest:
        """What the bundle is: its model, limits, special ids, files and proof."""
        return self._core.model.manifest

    @property
    def waiting(self) -> int:
        """How many requests wait for a seat."""
        return self._core.waiting

    @property
    def stats(self) -> DecodeStats:
        """What has been done so far, by all requests together."""
        return self._core.stats

    @property
    def busy_with(self) -> EngineLoad:
        """What waits, the rows that are active and the bytes of the caches, at this moment."""
        return self._core.load

    def fits(self, text: str) -> bool:
        """Whether a text has no more tokens than the model has positions."""
        return self._core.model.sources.fits(text)

    def submit(
        self,
        source: Source,
        options: TranslateOptions | None = None,
        *,
        deadline: float | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> Handle:
        """A text, or the ids of its pieces, to be translated by these options → its handle, at once.

        `deadline`: seconds from now after which it ends as far as it has come, with the reason "deadline". Raises
        InputError, OptionError and CapacityError for what cannot be translated, Overloaded where too many requests
        wait, EngineClosed.
        """
        if deadline is not None:
            refuse(wrong_value("deadline", deadline, SECONDS))
            deadline += time.monotonic()
        core = self._core
        asked = options_or_default(options).resolved(self.manifest.defaults, **changes)
        prepared = core.prepare(asked if asked.prefix is None else asked.changed(prefix=None)).seeded()
        reply = Reply(core.workers)
        try:
            request = prepared.request(
                source,
                reply,
                number=1,
                prefix=asked.prefix,
                source_language=one_language(asked, "source_language"),
                target_language=one_language(asked, "target_language"),
                deadline=deadline,
            )
        except InputError as error:
            raise error.at(None) from None
        reply.submit(request, core.options.max_waiting)
        return Handle(reply)

    async def translate(
        self,
        source: Source,
        options: TranslateOptions | None = None,
        *,
        deadline: float | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> Translation:
        """The translation of a text, as `submit` takes it, for asyncio. Where the task is cancelled, so is the text.

        Raises what `submit` and `Handle.result` raise.
        """
        return await self.submit(source, options, deadline=deadline, **changes).wait()

    async def stream(
        self,
        source: Source,
        options: TranslateOptions | None = None,
        *,
        deadline: float | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> AsyncIterator[Event]:
        """The events of a text, as `Handle` gives them, for asyncio. Where the iterator is closed, the text is
        cancelled. Raises what `submit` and `Handle.result` raise.
        """
        handle = self.submit(source, options, deadline=deadline, **changes)
        try:
            async for event in handle:
                yield event
        finally:
            handle.cancel()

    def warm(self) -> None:
        """Loads every graph that options can need, and runs a first step: no request has to wait for that. Raises
        BundleError.
        """
        self._core.warm()

    def close(self, *, drain: bool = True) -> None:
        """Takes no more requests, finishes those that it has, or, without `drain`, cancels them, and ends its threads.
        It may be called again.
        """
        self._core.close(drain=drain)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close(drain=kind is None)
