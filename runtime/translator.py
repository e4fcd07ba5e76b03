"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from kvx.runtime.backends.device import Device
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.alternatives import alternatives
from kvx.runtime.engine.call import translate, translate_all
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.scoring import RankBy, Ranking, Score, rank
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateKeywords, TranslateOptions, options_or_default
from kvx.runtime.text.sources import refuse_string
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation


class Translator:
    """A bundle ready to translate. Thread-safe: every call has a cache of its own over the shared weights."""

    def __init__(self, model: LoadedModel, *, loaded_by: Mapping[str, Any] | None = None) -> None:
        self._model = model
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
        model = LoadedModel.load(
            Bundle.open(Path(bundle)),
            backend=backend,
            threads=threads,
            workers=workers,
            spin=spin,
            devices=Device.parse_list(device),
        )
        return cls(model, loaded_by={"bundle": path, "device": device, **on})

    def options(
        self, options: TranslateOptions | None = None, **changes: Unpack[TranslateKeywords]
    ) -> TranslateOptions:
        """The options with the changes, and with the defaults of this bundle for what they leave open: those that every
        call translates by. Their `origins` tell where each default is from. Raises OptionError.
        """
        return options_or_default(options).resolved(self.manifest.defaults, **changes)

    def translate(
        self,
        texts: Iterable[str],
        options: TranslateOptions | None = None,
        *,
        prefixes: Iterable[Target | None] | None = None,
        cancelled: Cancelled | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> list[Translation]:
        """The translation of each text, in order.

        The options, or some of their fields, are those of TranslateOptions. `prefixes`: what each translation begins
        with, texts or target ids. Where `cancelled` answers true, all end as they are by then. Raises InputError before
        anything is decoded, OptionError and CapacityError.
        """
        options = self.options(options, **changes)
        return translate_all(self._model, texts, options, prefixes=prefixes, cancelled=cancelled)

    def translate_iter(
        self,
        texts: Iterable[str],
        options: TranslateOptions | None = None,
        stats: DecodeStats | None = None,
        *,
        prefixes: Iterable[Target | None] | None = None,
        cancelled: Cancelled | None = None,
    ) -> Iterator[Translation]:
        """The translation of each text, in order, reading no more than four windows ahead of what was given.

        Texts that are no list or tuple are read in a thread of their own: what is finished never waits for more.

        Where a text is refused, those before it are still given; then InputError is raised. A text whose logits are not
        finite has an empty translation that "failed", and InputError is raised after all others. Where `cancelled`
        answers true, what was read ends as it is, and nothing more is read. `stats` is filled at the end, however it
        comes. Raises OptionError and CapacityError.
        """
        options = self.options(options)
        return translate(self._model, texts, options, stats, prefixes=prefixes, cancelled=cancelled)

    def alternatives(
        self,
        text: str,
        prefix: Target,
        count: int = 5,
        options: TranslateOptions | None = None,
        *,
        number: int | None = None,
    ) -> list[Translation]:
        """The `count` most probable tokens after a beginning of the translation, each gone on from by the search of
        the options: translations that differ in the token after the prefix, in the order of its probability; fewer
        where a text has no more. Errors name the `number` of the text, where it has one.

        Raises InputError, OptionError and CapacityError.
        """
        try:
            return alternatives(self._model, text, prefix, count, self.options(options))
        except InputError as error:
            raise error.at(number) from None

    def score(
        self, sources: Iterable[str], targets: Iterable[Target], options: TranslateOptions | None = None
    ) -> list[Score]:
        """The log-probability of each given translation of each source, as `rank` of one candidate."""
        refuse_string(sources)
        refuse_string(targets)
        rankings = self.rank(sources, [[target] for target in targets], options=options)
        return [ranking.scores[0] for ranking in rankings]

    def rank(
        self,
        sources: Iterable[str],
        candidates: Iterable[Iterable[Target]],
        *,
        by: RankBy = "sum",
        options: TranslateOptions | None = None,
    ) -> list[Ranking]:
        """The log-probabilities of any number of candidates for each source, one encoder pass per source.

        A candidate is a text, which eos follows, or ids after bos as they are. `by` compares sums or means per token.
        Raises InputError where the counts differ or a source or candidate cannot be scored.
        """
        return rank(self._model, sources, candidates, by, options_or_default(options))


def _load(kind: type[Translator], given: dict[str, Any]) -> Translator:
    return kind.load(**given)
