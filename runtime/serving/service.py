"""What all routes of the service share: models, limits, keys, metrics, and how a request becomes work."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvx.runtime.engine.core import EngineOptions
from kvx.runtime.errors import OptionError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.serving.admission import Admission, Refused, TooLarge
from kvx.runtime.serving.detection import Detected, Detector
from kvx.runtime.serving.journal import Journal
from kvx.runtime.serving.keys import NOBODY, Key, Keys
from kvx.runtime.serving.metrics import Metrics
from kvx.runtime.serving.models import Leg, Model, Models, Route
from kvx.runtime.serving.schema import size_of
from kvx.runtime.serving.settings import ServeOptions
from kvx.runtime.serving.work import AHEAD, Way

KEPT_WAYS = 1024
KEPT_LENGTH = 64  # of each of their options: clients could fill the memory with long ones
SIZES = ("beam_size", "samples", "n_best")
PROBE_SECONDS = 2.0  # in which an engine has to get on for the service to be ready
PROBE = "."

_log = logging.getLogger("kvx")


def engine_options(options: ServeOptions, *, rows: int | None, cache_bytes: int | None) -> EngineOptions:
    """How large the engines of a service are: they hold all that its requests may ask for at a time."""
    return EngineOptions(rows=rows, cache_bytes=cache_bytes, max_waiting=(options.requests + 1) * AHEAD)


class Service:
    """The state of a service. Of the thread of the event loop."""

    def __init__(self, options: ServeOptions, models: Sequence[Model] = (), keys: Keys | None = None) -> None:
        self.options = options
        self.keys = keys
        self.models = Models((), options.pivot)
        self.admission = Admission(options)
        self.metrics = Metrics(lambda: self.models, self.admission)
        self.detector = Detector(())
        self.calls = ThreadPoolExecutor(options.requests, "kvx call")  # of the library that wait for their results
        self.journal = Journal(None if options.quiet else sys.stderr)
        self._ways: dict[Any, Way] = {}
        self.take(models)

    def take(self, models: Sequence[Model]) -> None:
        """From now on these models answer."""
        self.models.take(models)
        self.detector = Detector(self.models.sources)
        self._ways.clear()

    def key_of(self, key: str | None) -> Key:
        """Whose key this is; nobody's where none is needed. Raises Unauthorized."""
        return NOBODY if self.keys is None else self.keys.find(key)

    def check_loaded(self) -> None:
        """Raises Refused while the models are being loaded."""
        if not self.models.loaded:
            raise Refused("The models are still being loaded", reason="loading", retry_after=5)

    async def detect(self, texts: Sequence[tuple[str, str | None]], model: str | None = None) -> list[Detected]:
        """The language of each text, of those from which its target can be reached; beside the event loop.

        Raises OptionError where no model says which languages it is for.
        """
        if not self.detector.useful:
            raise OptionError(
                "No model says which languages it is for, so none can be found out",
                expected="no `source_language`",
                remedy="Leave it out, or have the service started with, say, de-en= before the folder of the bundle.",
                option="source_language",
            )
        return await asyncio.to_thread(lambda: [self._detect(text, target, model) for text, target in texts])

    def _detect(self, text: str, target: str | None, model: str | None) -> Detected:
        ranked = self.detector.rank(text)
        return next((one for one in ranked if self._reaches(one.language, target, model)), ranked[0])

    def _reaches(self, source: str, target: str | None, model: str | None) -> bool:
        try:
            self.route(source, target, model, detected=True)
        except OptionError:
            return False
        return True

    def route(self, source: str | None, target: str | None, model: str | None, *, detected: bool = False) -> Route:
        """How to translate. A text that was found to be in the target language stays as it is. Raises OptionError."""
        to = self.models.meant(target, model) if detected else None
        if to is not None and to == source:
            return Route((), source, to)
        return self.models.route(source, target, model)

    def way(self, route: Route, asked: Mapping[str, Any]) -> Way:
        """A route with the options of each of its legs: those that were asked for belong to the last one.

        Raises TooLarge and OptionError.
        """
        key = route, tuple(sorted(asked.items(), key=lambda one: one[0]))
        kept = size_of(dict(asked)) <= KEPT_LENGTH
        found = self._ways.get(key) if kept else None
        if found is None:
            last = len(route.legs) - 1
            options = (self._options(leg, asked if number == last else {}) for number, leg in enumerate(route.legs))
            found = Way(route, tuple(options))
            if len(self._ways) >= KEPT_WAYS:
                self._ways.clear()
            if kept:
                self._ways[key] = found
        return found

    def scoring(self, route: Route, asked: Mapping[str, Any]) -> TranslateOptions:
        """The options by which the model of a route scores. Defaults of bundles are of searches. Raises OptionError."""
        return TranslateOptions(**_spoken(route.legs[-1], asked))

    def _options(self, leg: Leg, asked: Mapping[str, Any]) -> TranslateOptions:
        for name in SIZES:
            if (size := asked.get(name) or 1) > self.options.beams:
                raise TooLarge(f"`{name}` is {size}", self.options.beams, "at a time", name, "Ask for fewer.")
        options = leg.model.translator.options(**_spoken(leg, asked))
        most = self.options.tokens
        if most is not None and (options.max_new_tokens or leg.model.manifest.max_new_tokens) > most:
            return options.changed(max_new_tokens=most)
        return options

    async def is_ready(self) -> bool:
        """Whether the models are loaded and their engines get on, within a bound."""
        if not self.models.loaded or self.admission.closing:
            return False
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await asyncio.gather(*(self._gets_on(model) for model in self.models))
        except Exception as error:
            _log.warning("an engine does not get on: %r", error)
            return False
        return True

    async def _gets_on(self, model: Model) -> None:
        """Returns once an engine has taken a step: a busy one for its requests, an idle one for a text of our own."""
        engine = model.engine
        before = engine.stats.steps
        if engine.busy_with.rows:
            while engine.stats.steps == before and engine.busy_with.rows:
                await asyncio.sleep(0.01)
            return
        pairs = model.pairs
        leg = Leg(model, *(next(iter(side.own.values()), None) for side in (pairs.source, pairs.target)))
        await engine.translate(PROBE, self._options(leg, {"max_new_tokens": 1, "beam_size": 1}))


def _spoken(leg: Leg, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, with the languages of a leg."""
    languages = {"source_language": leg.source, "target_language": leg.target}
    return {**asked, **{name: code for name, code in languages.items() if code is not None}}


async def reload(service: Service, load: Callable[[], list[Model]]) -> None:
    """Loads models and keys anew beside the event loop. The old ones go on until then, and stay where that fails."""
    try:
        keys = None if service.options.keys is None else Keys.read(service.options.keys)
        models = await asyncio.to_thread(load)
    except Exception as error:
        _log.warning("the models could not be loaded again, and the old ones stay: %s", error)
        return
    service.take(models)
    service.keys = keys
    await asyncio.to_thread(service.detector.load)
    _log.warning("the models were loaded again")
