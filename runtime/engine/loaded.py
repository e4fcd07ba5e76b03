"""A bundle in memory."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar

from kvx.runtime.backends.device import Device
from kvx.runtime.backends.registry import load_backends
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.decoding.backend import Backend, shortlisting_of, specs_of
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.search import Sampling
from kvx.runtime.errors import DeviceError, InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary
from kvx.runtime.text.sources import SourceReader, load_tokenizers
from kvx.runtime.text.targets import TargetReader

MOST_SHORTLISTS = 8  # kept in memory
Text = TypeVar("Text")
Other = TypeVar("Other")
PREFIXES, LANGUAGES, OPTIONS = ("prefix", "prefixes"), ("language", "languages"), ("set of options", "sets of options")
SIDES: tuple[Literal["source", "target"], ...] = ("source", "target")


class LoadedModel:
    """The backends over a bundle's weights, and the readers of its source and target texts. Threads may share it.

    `backends` are alike in all but their device and share out the texts.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *others: Backend) -> None:
        self.manifest = bundle.manifest
        self.backends = (backend, *others)
        source, target = load_tokenizers(bundle)
        self.sources = SourceReader(bundle, source)
        self.targets = TargetReader(bundle, target)
        self._reading = threading.Lock()
        self._shortlists: dict[Path, tuple[int, Shortlist]] = {}
        self._process = os.getpid()

    @property
    def backend(self) -> Backend:
        """The first of the backends."""
        return self.backends[0]

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        backend: str = "onnx",
        threads: int | None = None,
        workers: int | None = None,
        spin: bool = False,
        devices: Sequence[Device] = (Device(),),
    ) -> Self:
        """See Translator.load."""
        return cls(bundle, *load_backends(bundle, backend, devices, threads=threads, workers=workers, spin=spin))

    @classmethod
    def at(
        cls,
        bundle: str | Path,
        device: str,
        *,
        backend: str,
        threads: int | None,
        workers: int | None,
        spin: bool,
    ) -> Self:
        """The bundle at a path, on the device or devices of this name. See Translator.load."""
        opened, devices = Bundle.open(Path(bundle)), Device.parse_list(device)
        return cls.load(opened, backend=backend, threads=threads, workers=workers, spin=spin, devices=devices)

    def plan(
        self, options: TranslateOptions, *, max_new_tokens: int | None = None, workers: int | None = None
    ) -> tuple[Plan, int]:
        """What each worker's cache may hold, and how many workers there are on all devices, by default as many as the
        options have room for. Raises OptionError and CapacityError.
        """
        self.check_process()
        refuse(self._impossible(options))
        beams = options.search.beams
        plan = Plan.of(
            self.manifest,
            self.specs(beams, shortlisted=options.shortlist is not None),
            rows=options.rows,
            cache_bytes=options.cache_bytes,
            max_new_tokens=options.max_new_tokens if max_new_tokens is None else max_new_tokens,
            beams=beams,
            ends_at_limit=options.end_at_limit and max_new_tokens is None,
        )
        if workers is None:
            workers = (options.workers or min(self.backend.decodes, plan.most_shares())) * len(self.backends)
        return plan.share_of(workers, least_rows=options.rows or 1), workers

    def specs(self, beams: int, *, shortlisted: bool) -> tuple[TensorSpec, ...]:
        """The buffers of a cache in which a sentence has this many rows."""
        return specs_of(self.backend, beams=beams, shortlisted=shortlisted)

    def shortlist(self, options: TranslateOptions) -> Shortlist | None:
        """The shortlist that the options name, read when it is first asked for or has changed. Raises InputError."""
        if options.shortlist is None:
            return None
        path = Path(options.shortlist).absolute()
        written = path.stat().st_mtime_ns if path.is_file() else 0
        with self._reading:
            if path not in self._shortlists or self._shortlists[path][0] != written:
                source, target = (Vocabulary.of(self.manifest, side) for side in SIDES)
                found = Shortlist.read(path, source_vocab=source, target_vocab=target)
                self._shortlists[path] = written, found
                while len(self._shortlists) > MOST_SHORTLISTS:
                    del self._shortlists[next(iter(self._shortlists))]
            return self._shortlists[path][1]

    def check_process(self) -> None:
        """Raises DeviceError after a fork: the threads of the backends did not come along, and would be waited for."""
        if os.getpid() != self._process:
            raise DeviceError(
                f"The model was loaded in process {self._process}, before it was forked",
                expected="a model that this process has loaded itself",
                remedy="Load it after the fork, or start processes with the method spawn.",
            )

    def _impossible(self, options: TranslateOptions) -> Iterator[Problem]:
        """What is asked for that this bundle cannot do."""
        vocabulary = self.manifest.model["target_vocab_size"]
        search = options.search
        tops = {"beam_size": search.beams, "top_k": search.top_k if isinstance(search, Sampling) else None}
        for name, value in tops.items():
            if value is not None and value > vocabulary:
                yield Problem(name, f"`{name}` is {value}", f"`{name}` up to {vocabulary}, the vocabulary's size")
        if options.with_attention and self.manifest.features.attention is None:
            name = "align" if options.align else "replace_unknown"
            yield Problem(name, f"`{name}` needs attention", "a bundle that was exported with attention")
        if options.shortlist is not None and shortlisting_of(self.backend) is None:
            got = f"`shortlist` does not work with the {self.backend.name} backend of this bundle"
            yield Problem("shortlist", got, "the onnx backend and a bundle that was exported with a shortlist")
        limit = options.max_new_tokens or self.manifest.max_new_tokens
        if (options.min_new_tokens or 1) > limit:
            got = f"`min_new_tokens` is {options.min_new_tokens}"
            yield Problem("min_new_tokens", got, f"at most {limit}, the limit of new tokens")


def with_languages(texts: Iterable[Text], options: TranslateOptions) -> Iterator[tuple[Text, str | None, str | None]]:
    """Each text with the languages that it is translated from and to. Raises InputError where there are more of one
    than of the other.
    """
    source, target = (_each(language) for language in (options.source_language, options.target_language))
    pairs = paired(texts, source, "source_language", LANGUAGES)
    for (text, one), other in paired(pairs, target, "target_language", LANGUAGES):
        yield text, one, other


def _each(language: str | Iterable[str | None] | None) -> Iterable[str | None]:
    """The language of each text: one for all of them, without end, or one after the other."""
    return itertools.repeat(language) if language is None or isinstance(language, str) else language


def paired(
    texts: Iterable[Text], others: Iterable[Other], option: str, called: tuple[str, str]
) -> Iterator[tuple[Text, Other]]:
    """Each text with its own of what an option gives for each; without end if that is a repetition. Raises InputError
    where there are more of one than of the other.
    """
    own, nothing, number = iter(others), object(), 0
    for number, text in enumerate(texts, 1):
        other = next(own, nothing)
        if other is nothing:
            raise _miscounted(f"There are more texts than {called[1]} ({number - 1})", called[0], option, number)
        yield text, other  # type: ignore[misc]  # it is not the object that stands for none
    if not isinstance(others, itertools.repeat) and next(own, nothing) is not nothing:
        raise _miscounted(f"There are more {called[1]} than texts ({number})", called[0], option, None)


def _miscounted(got: str, called: str, option: str, line: int | None) -> InputError:
    return InputError(
        got, expected=f"one {called} for each text", remedy=f"Give one {called} per text.", option=option, line=line
    )
