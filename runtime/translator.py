"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.alternatives import alternatives
from kvx.runtime.engine.core import OF_THE_ENGINE, Core, EngineOptions, core_for, one_language
from kvx.runtime.engine.engine import Engine
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.reply import Token
from kvx.runtime.engine.scoring import RankBy, Ranking, Score, rank
from kvx.runtime.engine.translating import Options, Progress, first_of, translate, translate_all
from kvx.runtime.errors import InputError, listed
from kvx.runtime.options import TranslateKeywords, TranslateOptions, options_or_default
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.text.markup import html_passage
from kvx.runtime.text.passages import Passage, always, naming_sentences, passage
from kvx.runtime.text.sources import Source, refuse_string
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

NAMED_SENTENCES = 10
AT_LIMIT = "stopped at the limit of new tokens"

_log = logging.getLogger("kvx")


class Translator:
    """A bundle ready to translate. Any thread may use it: all calls share the rows of its `engine`, but for those that
    name a number of rows or workers or a size of the cache, which get rows of their own.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions | None = None,
        *,
        loaded_by: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._core = Core(model, options or EngineOptions())
        self._engine = Engine(self._core)
        self._loaded_by = loaded_by

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled as what `load` was given, and loaded again where it is unpickled."""
        if self._loaded_by is None:
            raise TypeError(
                "Only a Translator that Translator.load has made can be pickled. Load it in the other process."
            )
        return _load, (type(self), dict(self._loaded_by))

    @property
    def manifest(self) -> Manifest:
        """What the bundle is: its model, limits, special ids, files and proof."""
        return self._model.manifest

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
    ) -> Self:
        """The translator of the bundle at this path. Names and sizes of its files are checked before they are read,
        sha256 beside the reading and before anything is translated.

        `backend`: "onnx" or "torchscript" (which needs torch). `threads`: compute threads (default: the cores this
        process may use). `workers`: decode loops that share them out, for many sentences at a time; by default there
        is one loop, and each operator has all threads, which is best for few. `spin`: threads wait busily while a step
        runs, which makes several of them faster on one text and slower where cores are shared (onnx only). `device`:
        "cpu", "cuda", "cuda:<index>", or several with commas between, which share out the texts. Raises BundleError,
        DeviceError, OptionError, TokenizerError.
        """
        on = {"backend": backend, "threads": threads, "workers": workers, "spin": spin}
        path = Path(bundle).absolute()
        model = LoadedModel.at(bundle, device, backend=backend, threads=threads, workers=workers, spin=spin)
        return cls(model, loaded_by={"bundle": path, "device": device, **on})

    def options(
        self, options: TranslateOptions | None = None, **changes: Unpack[TranslateKeywords]
    ) -> TranslateOptions:
        """The options with the changes, and with the defaults of this bundle for what they leave open: those that every
        call translates by. Their `origins` tell where each default is from. Raises OptionError.
        """
        return options_or_default(options).resolved(self.manifest.defaults, **changes)

    @property
    def engine(self) -> Engine:
        """What decodes for this translator: texts may be submitted to it at any time."""
        return self._engine

    def translate(
        self,
        texts: Iterable[Source],
        options: Options | None = None,
        *,
        prefixes: Iterable[Target | None] | None = None,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        progress: Progress | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> list[Translation]:
        """The translation of each text, in order. A text may also be the ids of its pieces.

        The options, or some of their fields, are those of TranslateOptions: one for all, or one for each text.
        `prefixes`: what each translation begins with, texts or target ids. Where `cancelled` answers true, all end as
        they are by then. `stats` is filled at the end, however it comes; `progress` is called with the number of texts
        that are done. Raises InputError before anything is decoded, OptionError and CapacityError.
        """
        resolved = self._resolved(options, changes)
        with core_for(self._model, first_of(resolved), self._core) as core:
            return translate_all(
                core, texts, resolved, prefixes=prefixes, cancelled=cancelled, stats=stats, progress=progress
            )

    def translate_one(
        self,
        text: Source,
        options: TranslateOptions | None = None,
        *,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> Translation:
        """The translation of one text. See `translate`."""
        return self.translate([text], options, cancelled=cancelled, stats=stats, **changes)[0]

    def translate_text(
        self,
        text: str,
        options: TranslateOptions | None = None,
        *,
        html: bool = False,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        progress: Progress | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> str:
        """A text of any length with a translation in the place of each of its sentences. What stands between them is
        kept: line breaks and other white space, and with `html` all markup (see docs/translate.md).

        Sentences are found by the rules of the source language of the options or the bundle, or else of English. This
        needs the package sentencex, of the extra serve. `progress` is called with the number of sentences that are
        done. Errors name a sentence by its number, from 1, and so do warnings in the log of sources and translations
        that were cut. Raises InputError, CapacityError, and OptionError also for options that only a single sentence
        can have. See `translate` for the rest.
        """
        resolved = self.options(options, **changes)
        refuse(_several(resolved))
        one_language(resolved, "target_language")
        found = self._passage(text, resolved, html=html)
        with naming_sentences():
            translations = self.translate(found.asked, resolved, cancelled=cancelled, stats=stats, progress=progress)
        _warn_of_cut(translations)
        return found.joined([translation.text for translation in translations])

    def stream(
        self, text: Source, options: TranslateOptions | None = None, **changes: Unpack[TranslateKeywords]
    ) -> Iterator[str]:
        """The translation of one text, piece by piece as it is decided: joined, these are its text.

        Closing the iterator cancels the rest. Raises InputError, OptionError and CapacityError.
        """
        resolved = self.options(options, **changes)
        with core_for(self._model, resolved, self._core) as core:
            handle = Engine(core).submit(text, resolved)
            try:
                yield from (event.text for event in handle if isinstance(event, Token) and event.text)
            finally:
                handle.cancel()

    def translate_iter(
        self,
        texts: Iterable[Source],
        options: Options | None = None,
        stats: DecodeStats | None = None,
        *,
        prefixes: Iterable[Target | None] | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> Iterator[Translation]:
        """The translation of each text, in order, reading no more than four windows ahead of what was given.

        Texts that are no list or tuple are read in a thread of their own: what is finished never waits for more.

        Where a text is refused, those before it are still given; then InputError is raised. A text whose logits are not
        finite has an empty translation that "failed", and InputError is raised after all others. Where `cancelled`
        answers true, what was read ends as it is, and nothing more is read. See `translate` for the rest. Raises
        OptionError and CapacityError.
        """
        resolved = self._resolved(options, changes)
        held = contextlib.ExitStack()
        core = held.enter_context(core_for(self._model, first_of(resolved), self._core))
        try:
            found = translate(
                core, texts, resolved, prefixes=prefixes, cancelled=cancelled, stats=stats, progress=progress
            )
        except BaseException:
            held.close()
            raise
        return _with(held, found)

    def alternatives(
        self,
        text: Source,
        prefix: Target,
        count: int = 5,
        options: TranslateOptions | None = None,
        *,
        number: int | None = None,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        progress: Progress | None = None,
    ) -> list[Translation]:
        """The `count` most probable tokens after a beginning of the translation, each gone on from by the search of
        the options: translations that differ in the token after the prefix, in the order of its probability; fewer
        where a text has no more. Errors name the `number` of the text, where it has one.

        Raises InputError, OptionError and CapacityError.
        """
        resolved = self.options(options)
        try:
            return alternatives(
                self._core, text, prefix, count, resolved, cancelled=cancelled, stats=stats, progress=progress
            )
        except InputError as error:
            raise error.at(number) from None

    def score(
        self,
        sources: Iterable[Source],
        targets: Iterable[Target],
        options: TranslateOptions | None = None,
        *,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        progress: Progress | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> list[Score]:
        """The log-probability of each given translation of each source, as `rank` of one candidate."""
        refuse_string(sources)
        refuse_string(targets)
        candidates = [[target] for target in targets]
        rankings = self.rank(
            sources, candidates, options=options, cancelled=cancelled, stats=stats, progress=progress, **changes
        )
        return [ranking.scores[0] for ranking in rankings]

    def rank(
        self,
        sources: Iterable[Source],
        candidates: Iterable[Iterable[Target]],
        *,
        by: RankBy = "sum",
        options: TranslateOptions | None = None,
        cancelled: Cancelled | None = None,
        stats: DecodeStats | None = None,
        progress: Progress | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> list[Ranking]:
        """The log-probabilities of any number of candidates for each source, one encoder pass per source.

        A candidate is a text, which eos follows, or ids after bos as they are. `by` compares sums or means per token.
        Raises InputError where the counts differ or a source or candidate cannot be scored, or where `cancelled`
        answers true before all are.
        """
        asked = options_or_default(options).changed(**changes)
        with core_for(self._model, asked, self._core) as core:
            return rank(core, sources, candidates, by, asked, cancelled=cancelled, stats=stats, progress=progress)

    def _passage(self, text: str, options: TranslateOptions, *, html: bool) -> Passage:
        """The sentences of a text by the rules of its language."""
        language = one_language(options, "source_language") or self.manifest.languages.default_source
        fits = always if options.on_long == "truncate" else self._model.sources.fits
        return html_passage(text, language, fits) if html else passage(text, language, fits)

    def _resolved(self, options: Options | None, changes: TranslateKeywords) -> Options:
        """With the defaults of this bundle. Raises OptionError."""
        if options is None or isinstance(options, TranslateOptions):
            return self.options(options, **changes)
        if not isinstance(options, Sequence) or isinstance(options, str):
            return self.options(options, **changes)  # which refuses it
        resolved = [self.options(one, **changes) for one in options]
        refuse(_of_the_call(resolved))
        return resolved


def _several(options: TranslateOptions) -> Iterator[Problem]:
    """The options that only a single sentence can have."""
    if options.prefix:
        yield Problem("prefix", "`prefix` is given, but a text has several sentences here", "no `prefix`")
    for name in ("n_best", "samples"):
        if (number := getattr(options.search, name, 1)) > 1:
            yield Problem(name, f"`{name}` is {number}, but a text has one translation here", f"no `{name}` above 1")


def _warn_of_cut(translations: Sequence[Translation]) -> None:
    """Logs which sentences are incomplete in the result of a text."""
    cut = [number for number, one in enumerate(translations, 1) if one.truncated]
    at_limit = [number for number, one in enumerate(translations, 1) if one.finish_reason == "length"]
    for what, numbers in (("were cut to the model's positions", cut), (AT_LIMIT, at_limit)):
        if numbers:
            _log.warning("%d sentences %s (numbers %s)", len(numbers), what, listed(numbers, NAMED_SENTENCES))


def _of_the_call(options: Sequence[TranslateOptions]) -> Iterator[Problem]:
    """The options that belong to the call and not to a text, where texts have different ones."""
    for name in (*OF_THE_ENGINE, "window"):
        if len({getattr(one, name) for one in options}) > 1:
            yield Problem(name, f"`{name}` is not the same for all texts", f"one `{name}`")


def _with(held: contextlib.ExitStack, found: Iterator[Translation]) -> Iterator[Translation]:
    """What is found, and at its end, however it comes, an end of what is held."""
    with held:
        yield from found


def _load(kind: type[Translator], given: dict[str, Any]) -> Translator:
    return kind.load(**given)
