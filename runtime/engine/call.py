"""All that one call asks of a model, decided and refused in one place before anything is read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import Cancelled, Loop, SearchLoop, never
from kvx.runtime.decoding.device_loop import DeviceLoop, LoopBackend
from kvx.runtime.decoding.filters import Filters
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.search import Greedy, Sampling
from kvx.runtime.engine.loaded import PREFIXES, LoadedModel, paired
from kvx.runtime.engine.queue import RequestQueue
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.supply import Listed, Supply, supply_of
from kvx.runtime.engine.workers import shared_out, side_by_side
from kvx.runtime.engine.writer import Writer
from kvx.runtime.options import Search, TranslateOptions, filters_of
from kvx.runtime.shortlist.candidates import Shortlist
from kvx.runtime.text.sources import refuse_string
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

_log = logging.getLogger("kvx")

WINDOW_PER_ROW = 8  # texts read ahead and sorted by length together, for every row

Prefixes = Iterable[Target | None]


@dataclass(frozen=True, slots=True)
class Call:
    """Translations by one set of options: `workers` loops side by side, each with the `plan`. `prefixed` tells that
    targets may have a prefix.
    """

    model: LoadedModel
    options: TranslateOptions
    plan: Plan
    workers: int
    search: Search
    filters: Filters
    shortlist: Shortlist | None
    prefixed: bool

    @classmethod
    def of(cls, model: LoadedModel, options: TranslateOptions, *, texts: int | None, prefixed: bool) -> Call:
        """The call for at most this many texts at hand. Raises OptionError, InputError and CapacityError."""
        plan, workers = model.plan(options, sentences=texts)
        search = options.search
        _log.debug("%d workers, each with %s", workers, plan)
        return cls(
            model=model,
            options=options,
            plan=plan,
            workers=workers,
            search=search.seeded() if isinstance(search, Sampling) else search,
            filters=filters_of(options, model.targets, plan.never),
            shortlist=model.shortlist(options),
            prefixed=prefixed or options.prefix is not None,
        )

    def requests(self, texts: Iterable[str], prefixes: Prefixes | None) -> Iterator[Request]:
        """Each text with a target for each sample, which begins with a prefix of its own or that of the options."""
        limit, samples, reader = self.plan.max_new_tokens, self.search.samples, self.model.targets
        common = () if self.options.prefix is None else reader.prefix(self.options.prefix, limit, None)
        if prefixes is None:
            pairs = ((text, common) for text in texts)
        else:
            refuse_string(prefixes)
            own = reader.prefixes(prefixes, limit)
            pairs = (
                (text, common if prefix is None else prefix)
                for text, prefix in paired(texts, own, "prefixes", PREFIXES)
            )
        return self.model.requests(((text, (prefix,) * samples) for text, prefix in pairs), self.options, self.plan)

    def run(
        self, requests: Supply[Request], stats: DecodeStats, cancelled: Cancelled | None, window: int | None = None
    ) -> Iterator[Translation]:
        """The translation of each request, in order. An error in reading is raised after those read before it, and
        the error of a text whose numbers are not finite after all others. A `window` of requests is sorted by length
        together.
        """
        stop, writer = Latch(cancelled), Writer(self.model, self.options)
        window = window or self.plan.rows * self.workers * WINDOW_PER_ROW
        queue = RequestQueue(requests, window, self.shortlist, stop)
        loops = [self._loop(backend) for backend in shared_out(self.model.backends, self.workers)]
        with contextlib.ExitStack() as ends:
            ends.callback(requests.rest)
            while not queue.exhausted:
                outcomes = side_by_side(loops, queue.sentences(), stats, stop, at_once=self.plan.group)
                with contextlib.closing(outcomes):
                    for outcome in outcomes:
                        outcome.sentence.outcomes[outcome.target] = outcome
                        yield from map(writer.write, queue.finished())
                yield from map(writer.write, queue.finished())
        if requests.error is not None:
            raise requests.error
        if writer.failure is not None:
            raise writer.failure

    def _loop(self, backend: Backend) -> Loop:
        """The loop that gives what is asked for: on a device that feeds itself, nothing but greedy tokens."""
        if self._tokens_only and isinstance(backend, LoopBackend) and backend.loops:
            return DeviceLoop(backend, self.plan)
        return SearchLoop(
            backend,
            self.plan,
            self.search,
            self.filters,
            scored=self.options.scores,
            with_attention=self.options.with_attention,
            candidates=self.shortlist,
        )

    @property
    def _tokens_only(self) -> bool:
        more = self.prefixed or self.options.scores or self.options.with_attention or self.shortlist
        return isinstance(self.search, Greedy) and not more and (self.filters.in_place or not self.filters.filters)


class Latch:
    """An answer that stays true once it was: several loops ask, each in its own thread."""

    def __init__(self, asked: Cancelled | None) -> None:
        self._asked = asked or never
        self._over = False

    def __call__(self) -> bool:
        """Whether it ever was."""
        if not self._over and self._asked():
            self._over = True
        return self._over


def translate(
    model: LoadedModel,
    texts: Iterable[str],
    options: TranslateOptions,
    stats: DecodeStats | None = None,
    *,
    prefixes: Prefixes | None = None,
    cancelled: Cancelled | None = None,
) -> Iterator[Translation]:
    """See Translator.translate_iter."""
    refuse_string(texts)
    call = Call.of(model, options, texts=options.window, prefixed=prefixes is not None)
    requests = supply_of(call.requests(texts, prefixes), texts)
    return call.run(requests, stats or DecodeStats(), cancelled, options.window)


def translate_all(
    model: LoadedModel,
    texts: Iterable[str],
    options: TranslateOptions,
    *,
    prefixes: Prefixes | None = None,
    cancelled: Cancelled | None = None,
) -> list[Translation]:
    """See Translator.translate."""
    refuse_string(texts)
    texts = list(texts)
    call = Call.of(model, options, texts=len(texts), prefixed=prefixes is not None)
    requests = list(call.requests(texts, prefixes))
    return list(call.run(Listed(iter(requests)), DecodeStats(), cancelled, max(1, len(texts))))
