"""Texts → translations, in order: what a call makes of its texts, options and prefixes, as a client of the engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.search import Sampling
from kvx.runtime.engine.bulk import Bulk
from kvx.runtime.engine.core import Core, one_language
from kvx.runtime.engine.loaded import OPTIONS, PREFIXES, paired, with_languages
from kvx.runtime.engine.prepared import Prepared
from kvx.runtime.engine.request import Request
from kvx.runtime.engine.supply import Listed, Supply, supply_of
from kvx.runtime.engine.writer import not_finite, write
from kvx.runtime.errors import InputError
from kvx.runtime.options import PLAIN, TranslateOptions
from kvx.runtime.text.sources import Source, refuse_string
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

_log = logging.getLogger("kvx")

WINDOW_PER_ROW = 8  # texts read ahead and sorted by length together, for every row

Prefixes = Iterable[Target | None]
Options = TranslateOptions | Sequence[TranslateOptions]
Progress = Callable[[int], object]


def translate(
    core: Core,
    texts: Iterable[Source],
    options: Options,
    *,
    prefixes: Prefixes | None = None,
    cancelled: Cancelled | None = None,
    stats: DecodeStats | None = None,
    progress: Progress | None = None,
) -> Iterator[Translation]:
    """See Translator.translate_iter."""
    _refuse_strings(texts, prefixes)
    call = _Call(core, options, cancelled)
    requests = supply_of(call.requests(texts, prefixes), texts)
    return call.run(requests, stats, progress)


def translate_all(
    core: Core,
    texts: Iterable[Source],
    options: Options,
    *,
    prefixes: Prefixes | None = None,
    cancelled: Cancelled | None = None,
    stats: DecodeStats | None = None,
    progress: Progress | None = None,
) -> list[Translation]:
    """See Translator.translate."""
    _refuse_strings(texts, prefixes)
    texts = list(texts)
    call = _Call(core, options, cancelled, window=max(1, len(texts)))
    requests = list(call.requests(texts, prefixes))
    return list(call.run(Listed(iter(requests)), stats, progress))


@dataclass(frozen=True, slots=True)
class Asked:
    """A text with the languages that it is translated from and to, None for those of the options."""

    text: Source
    source_language: str | None = None
    target_language: str | None = None


def translate_each(
    core: Core,
    texts: Iterable[Asked | InputError],
    options: TranslateOptions,
    *,
    cancelled: Cancelled | None = None,
    stats: DecodeStats | None = None,
) -> Iterator[Translation | InputError]:
    """As `translate`, for texts of which some may be wrong: an error in the place of a text, and that of a text which
    is refused or whose logits are not finite, comes in the place of its translation. Equal texts have equal samples.
    """
    call = _Call(core, options, cancelled)
    return call.run_each(supply_of(call.requests_of_each(texts), texts), stats)


class _Call:
    """Options made ready, and who reads ahead and hears of the requests. Raises OptionError and CapacityError."""

    def __init__(self, core: Core, options: Options, cancelled: Cancelled | None, *, window: int | None = None) -> None:
        self._core = core
        self._options = options
        self._seeded: dict[int, tuple[Prepared, Prepared]] = {}  # by identity, of what must live as long
        self._seen: dict[int, int] = {}  # equal requests, where something is drawn at random
        first = first_of(options)
        self._first = self._prepared(first)
        plan, workers = self._first.plan, core.workers.settings.workers
        window = window or first.window or plan.rows * workers * WINDOW_PER_ROW
        self._bulk = Bulk(core.workers, self._first, window, cancelled)

    def requests(self, texts: Iterable[Source], prefixes: Prefixes | None) -> Iterator[Request]:
        """Each text with its options, prefix and languages. Raises InputError."""
        own = itertools.repeat(None) if prefixes is None else prefixes
        for number, ((text, prepared, languages), prefix) in enumerate(
            paired(self._with_options(texts), own, "prefixes", PREFIXES), 1
        ):
            source, target = languages
            request = prepared.request(
                text, self._bulk, number=number, prefix=prefix, source_language=source, target_language=target
            )
            if isinstance(prepared.seat.search, Sampling):
                same = hash((prepared.seat.search, request.ids, request.start, request.targets))
                request.repeat = self._seen.get(same, 0)
                self._seen[same] = request.repeat + 1
            yield request

    def requests_of_each(self, texts: Iterable[Asked | InputError]) -> Iterator[Request]:
        """Each text as a request; one that is refused is over at once, with its error."""
        options = self._first.options
        usual = [one if isinstance(one, str) else None for one in (options.source_language, options.target_language)]
        for number, asked in enumerate(texts, 1):
            if isinstance(asked, InputError):
                yield self._first.refused(asked, self._bulk, number)
                continue
            source, target = asked.source_language or usual[0], asked.target_language or usual[1]
            try:
                yield self._first.request(
                    asked.text, self._bulk, number=number, source_language=source, target_language=target
                )
            except InputError as error:
                yield self._first.refused(error.at(None), self._bulk, number)

    def run_each(self, requests: Supply[Request], stats: DecodeStats | None) -> Iterator[Translation | InputError]:
        """The translation of each request or its error, in order."""
        before, own = self._core.stats, DecodeStats()
        try:
            for request in self._bulk.run(requests):
                _count(request, own)
                if isinstance(request.error, InputError):
                    yield request.error
                else:
                    yield not_finite(request).at(None) if request.failed else write(request)
        finally:
            if stats is not None:
                stats.add_since(before, self._core.stats, own)

    def run(
        self, requests: Supply[Request], stats: DecodeStats | None, progress: Progress | None
    ) -> Iterator[Translation]:
        """The translation of each request, in order. The error of a text whose numbers are not finite is raised after
        all others.
        """
        failure: InputError | None = None
        before, own = self._core.stats, DecodeStats()
        try:
            for done, request in enumerate(self._bulk.run(requests), 1):
                _count(request, own)
                if request.failed:
                    error = not_finite(request)
                    _log.warning("%s", error)
                    failure = failure or error
                yield write(request)
                if progress is not None:
                    progress(done)
        finally:
            if stats is not None:
                stats.add_since(before, self._core.stats, own)
        if failure is not None:
            raise failure

    def _with_options(
        self, texts: Iterable[Source]
    ) -> Iterator[tuple[Source, Prepared, tuple[str | None, str | None]]]:
        if isinstance(self._options, TranslateOptions):
            for text, source, target in with_languages(texts, self._options):
                yield text, self._first, (source, target)
            return
        for text, options in paired(texts, self._options, "options", OPTIONS):
            languages = one_language(options, "source_language"), one_language(options, "target_language")
            yield text, self._prepared(options), languages

    def _prepared(self, options: TranslateOptions) -> Prepared:
        """With one seed for all texts of the call."""
        prepared = self._core.prepare(options)
        if id(prepared) not in self._seeded:
            self._seeded[id(prepared)] = prepared, prepared.seeded()
        return self._seeded[id(prepared)][1]


def first_of(options: Options) -> TranslateOptions:
    """Those of all texts, or of the first."""
    return options if isinstance(options, TranslateOptions) else next(iter(options), PLAIN)


def _refuse_strings(texts: Iterable[Source], prefixes: Prefixes | None) -> None:
    refuse_string(texts)
    if prefixes is not None:
        refuse_string(prefixes)


def _count(request: Request, stats: DecodeStats) -> None:
    for outcome in request.outcomes if request.ids else ():
        assert outcome is not None, "a request that is not over"
        stats.sentences += 1
        stats.tokens += len(outcome.best.ids)
    options = request.asked_for
    stats.fallbacks += bool(request.ids and options.shortlist is not None and not request.lane.shortlisted)
