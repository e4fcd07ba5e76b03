"""What an engine is made of: the model, its decode loops, and options that have been made ready."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, runtime_checkable

from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.device_loop import feeds_itself
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, Sentence
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.prepared import Prepared
from kvx.runtime.engine.workers import EngineLoad, Workers, WorkerSettings, closed
from kvx.runtime.errors import CapacityError, OptionError
from kvx.runtime.options import OPTIONS, PLAIN, TranslateOptions
from kvx.runtime.rules import Option, Problem, count, number, refuse, wrong_values

MOST_PREPARED = 64  # sets of options that are kept ready
MOST_WAITING = 2**20
SECONDS = number(0, 1e9)
OF_THE_ENGINE = ("rows", "workers", "cache_bytes")  # options that its requests share


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How large an engine is. Raises OptionError."""

    rows: Annotated[
        int | None, Option(count(), "The batch size of each worker.", unset="64, or as many as the cache has room for")
    ] = None
    workers: Annotated[
        int | None, Option(count(), "Decode loops side by side, on each device.", unset="as the model was loaded")
    ] = None
    cache_bytes: Annotated[int | None, OPTIONS["cache_bytes"]] = None
    max_waiting: Annotated[
        int, Option(count(MOST_WAITING), "Requests that may wait. One more is refused at once, as Overloaded.")
    ] = 1024
    idle_seconds: Annotated[
        float, Option(SECONDS, "After this time without work the caches are given back, until there is more.")
    ] = 5.0

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


@runtime_checkable
class _Loadable(Protocol):
    """A backend that loads some graphs only when they are needed."""

    def load(self) -> None:
        """Loads them now."""
        ...


class Core:
    """Decode loops that are started when there is something to do, and options that are kept ready. Any thread may use
    it.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions, *, sized_for: TranslateOptions = PLAIN) -> None:
        self.model = model
        self.options = options
        self._sized_for = sized_for
        self._workers: Workers | None = None
        self._closed = False
        self._prepared: dict[TranslateOptions, Prepared] = {}
        self._lock = threading.Lock()

    @property
    def workers(self) -> Workers:
        """The decode loops, which are started when there is something to do. Raises EngineClosed."""
        with self._lock:
            if self._closed:
                raise closed()
            if self._workers is None:
                own = self.options
                settings = WorkerSettings(self._count_workers(), own.rows, own.cache_bytes, own.idle_seconds)
                self._workers = Workers(self.model, settings)
            return self._workers

    @property
    def waiting(self) -> int:
        """How many requests wait for a seat."""
        return 0 if self._workers is None else len(self._workers.waiting)

    @property
    def stats(self) -> DecodeStats:
        """What has been done so far, by all requests together."""
        return DecodeStats() if self._workers is None else self._workers.stats()

    @property
    def load(self) -> EngineLoad:
        """What the caches are busy with now."""
        return EngineLoad() if self._workers is None else self._workers.load()

    def prepare(self, options: TranslateOptions) -> Prepared:
        """Resolved options, made ready for this engine, and kept so.

        Raises OptionError, InputError and CapacityError.
        """
        self.model.check_process()
        if not _has_hash(options):
            return self._prepare(options)
        known = self._prepared.get(options)
        if known is None:
            known = self._prepare(options)
            with self._lock:
                self._prepared[options] = known
                while len(self._prepared) > MOST_PREPARED:
                    del self._prepared[next(iter(self._prepared))]
        self.model.shortlist(options)  # which may have changed
        return known

    def warm(self) -> None:
        """Loads every graph that options can need, and runs a first step. Raises BundleError."""
        for backend in self.model.backends:
            if isinstance(backend, _Loadable):
                backend.load()
            if not feeds_itself(backend):
                plan = Plan.of(self.model.manifest, backend.cache_specs, rows=1, max_new_tokens=1)
                ids = (self.model.manifest.framing.eos,)
                list(decode(backend, [Sentence(0, ids)], Greedy(), plan))

    def close(self, *, drain: bool) -> None:
        """Takes no more requests, and ends its threads: after all requests, or, without `drain`, at the next step."""
        with self._lock:
            self._closed, workers = True, self._workers
        if workers is not None:
            workers.close(drain=drain)

    def has_room_for(self, options: TranslateOptions) -> bool:
        """Whether each worker has room for a sentence by these options. Raises OptionError."""
        if _has_hash(options) and options in self._prepared:
            return True
        try:
            self.model.plan(self.sized(options), workers=self.workers.settings.workers)
        except CapacityError:
            return False
        return True

    def _prepare(self, options: TranslateOptions) -> Prepared:
        return Prepared.of(self.model, self.sized(options), self.workers.settings.workers)

    def _count_workers(self) -> int:
        """On all devices, for what the engine is sized for. What has no room even so is refused with its numbers."""
        options = self.sized(self._sized_for)
        try:
            return self.model.plan(options)[1]
        except CapacityError:
            return (options.workers or 1) * len(self.model.backends)

    def sized(self, options: TranslateOptions) -> TranslateOptions:
        """The options, with this engine's rows, workers and bytes. Raises OptionError where they have others."""
        own = self.options
        refuse(
            Problem(name, f"`{name}` is {getattr(options, name)}, but the engine has its own", f"no `{name}`")
            for name in OF_THE_ENGINE
            if getattr(options, name) not in (None, getattr(own, name))
        )
        return replace(options, rows=own.rows, workers=own.workers, cache_bytes=own.cache_bytes)


@contextlib.contextmanager
def core_for(model: LoadedModel, options: TranslateOptions, usual: Core | None = None) -> Iterator[Core]:
    """The usual core, or, for options that name a size or for which it has no room, one of their own for one call."""
    sizes = {name: getattr(options, name) for name in OF_THE_ENGINE}
    if usual is not None and all(size is None for size in sizes.values()) and usual.has_room_for(options):
        yield usual
        return
    core, drain = Core(model, EngineOptions(**sizes), sized_for=options), False
    try:
        yield core
        drain = True
    finally:
        core.close(drain=drain)


def _has_hash(options: TranslateOptions) -> bool:
    """Whether options can be looked up: ids in a list and some filters cannot."""
    try:
        hash(options)
    except TypeError:
        return False
    return True


def one_language(options: TranslateOptions, name: str) -> str | None:
    """A language of the options, which must be one. Raises OptionError."""
    language = getattr(options, name)
    if language is None or isinstance(language, str):
        return language
    raise OptionError(
        f"`{name}` has a language for each text, and there is one text",
        expected=f"one `{name}`",
        remedy="Give the code of one language.",
        option=name,
    )
