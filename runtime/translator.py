"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from kvx.runtime.backend import Backend
from kvx.runtime.bundle import Bundle
from kvx.runtime.decode import decode
from kvx.runtime.errors import DeviceError, InputError, OptionError
from kvx.runtime.manifest import GRAPH_FILES
from kvx.runtime.plan import DEFAULT_ROWS, Plan
from kvx.runtime.schedule import DecodeStats, Hypothesis, Source
from kvx.runtime.scoring import RankBy, Ranking, Score, Target, rank
from kvx.runtime.search import Greedy
from kvx.runtime.sources import OnLong, SourceReader, SourceText, load_tokenizer, refuse_string
from kvx.runtime.workers import side_by_side

FinishReason = Literal["end", "length"]

WINDOWS_AHEAD = 4
WINDOW_PER_ROW = 8  # sentences read ahead and sorted by length together, for every row


@dataclass(frozen=True, slots=True)
class Translation:
    """One translated text.

    `ids` are the target ids after bos, eos included where `finish_reason` is "end"; `tokens` their pieces without
    it; `score` the sum of the ids' natural log-probabilities, where asked for; `truncated` tells that the source was
    cut to the model's positions.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    score: float | None
    finish_reason: FinishReason
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateOptions:
    """How to translate.

    `max_new_tokens`: tokens after bos, eos included (default: the bundle's). `scores`: also give log-probabilities.
    `on_long`: what happens to a source of more positions than the model has, bos and eos counted. `rows`: sentences
    that a worker decodes at a time (default: as many as fit, up to 64). `workers`: decode loops side by side
    (default: what the backend is fastest with, where there are sentences enough). `cache_bytes`: the most that all
    their caches together may hold (default: 1 GiB). `window`: texts read ahead and sorted by length together. Raises
    OptionError.
    """

    max_new_tokens: int | None = None
    scores: bool = False
    on_long: OnLong = "error"
    rows: int | None = None
    workers: int | None = None
    cache_bytes: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "rows", "workers", "cache_bytes", "window")
        values = [(name, getattr(self, name)) for name in counts]
        problems = [f"{name} = {value}" for name, value in values if value is not None and value < 1]
        if self.on_long not in ("error", "truncate"):
            problems.append(f"on_long = {self.on_long!r}")
        if problems:
            raise OptionError(
                ", ".join(problems),
                expected="counts from 1 up, and on_long error or truncate",
                remedy="Correct the options.",
            )


class Translator:
    """A bundle ready to translate. Thread-safe: every call has a cache of its own over the shared weights."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.manifest = bundle.manifest
        self.backend = backend
        self.target_tokenizer = load_tokenizer(bundle, "target")
        self._sources = SourceReader(bundle)

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
        process may use). `workers`: decode loops that share them out, for many sentences at a time; by default each
        operator has all threads, which is best for few. `spin`: threads wait busily while a step runs, which makes
        several of them faster on one text and slower where cores are shared (onnx only). `device`: "cpu", "cuda" or
        "cuda:<index>". Raises BundleError, DeviceError, OptionError, TokenizerError.
        """
        opened = Bundle.open(Path(bundle))
        with ThreadPoolExecutor(max_workers=1) as pool:
            hashes = pool.submit(opened.check_hashes, _files_in_use(opened, backend))
            try:
                made = _make_backend(opened, backend, threads=threads, workers=workers, spin=spin, device=device)
            finally:
                hashes.result()  # an altered file explains whatever the backend made of it
        return cls(opened, made)

    def translate(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        scores: bool = False,
        on_long: OnLong = "error",
        rows: int | None = None,
        workers: int | None = None,
    ) -> list[Translation]:
        """The translation of each text, in order.

        The options are those of TranslateOptions. Raises InputError before anything is decoded, OptionError and
        CapacityError.
        """
        refuse_string(texts)
        options = TranslateOptions(
            max_new_tokens=max_new_tokens,
            scores=scores,
            on_long=on_long,
            rows=rows,
            workers=workers,
            window=max(1, len(texts)),
        )
        plan, workers = self.plan(options, sentences=len(texts))
        read = list(self.read_sources(texts, plan, on_long))
        return list(self._run(iter(read), options, plan, workers, DecodeStats()))

    def translate_iter(
        self, texts: Iterable[str], options: TranslateOptions | None = None, stats: DecodeStats | None = None
    ) -> Iterator[Translation]:
        """The translation of each text, in order, reading no more than four windows ahead of what was given.

        Where a text is refused, those before it are still given; then InputError is raised. `stats` is filled at the
        end, however it comes. Raises OptionError and CapacityError.
        """
        refuse_string(texts)
        options = options or TranslateOptions()
        plan, workers = self.plan(options, sentences=options.window)
        read = self.read_sources(texts, plan, options.on_long)
        return self._run(read, options, plan, workers, stats or DecodeStats())

    def score(
        self, sources: Sequence[str], targets: Sequence[Target], options: TranslateOptions | None = None
    ) -> list[Score]:
        """The log-probability of each given translation of each source, as `rank` of one candidate."""
        refuse_string(sources)
        refuse_string(targets)
        rankings = self.rank(sources, [[target] for target in targets], options=options)
        return [ranking.scores[0] for ranking in rankings]

    def rank(
        self,
        sources: Sequence[str],
        candidates: Sequence[Sequence[Target]],
        *,
        by: RankBy = "sum",
        options: TranslateOptions | None = None,
    ) -> list[Ranking]:
        """The log-probabilities of any number of candidates for each source, one encoder pass per source.

        A candidate is a text, which eos follows, or ids after bos as they are. `by` compares sums or means per token.
        Raises InputError where the counts differ or a source or candidate cannot be scored.
        """
        return rank(self, sources, candidates, by, options or TranslateOptions())

    def plan(
        self, options: TranslateOptions, *, sentences: int | None = None, max_new_tokens: int | None = None
    ) -> tuple[Plan, int]:
        """What each worker's cache may hold, and how many workers there are, for at most so many sentences at hand.

        Raises OptionError and CapacityError.
        """
        plan = Plan.of(
            self.manifest,
            self.backend.cache_specs,
            rows=options.rows,
            cache_bytes=options.cache_bytes,
            max_new_tokens=options.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )
        if sentences is not None:
            plan = plan.for_sentences(sentences)
        few = sentences is not None and sentences <= (options.rows or DEFAULT_ROWS)
        workers = options.workers or (1 if few else min(self.backend.decodes, plan.most_shares()))
        return plan.share_of(workers, least_rows=options.rows or 1), workers

    def read_sources(self, texts: Iterable[str], plan: Plan, on_long: OnLong) -> Iterator[SourceText]:
        """The ids of each text. Raises InputError, with the text's number, for what cannot be translated."""
        for number, text in enumerate(self._sources.read(texts, on_long), 1):
            if len(text.ids) > plan.source_positions:
                raise InputError(
                    f"{len(text.ids)} tokens, which need a cache of {plan.seat_bytes(len(text.ids)):,} bytes",
                    expected=f"at most {plan.cache_bytes:,} bytes",
                    remedy="Plan more bytes (--cache-mb) or fewer new tokens (--max-new-tokens).",
                    line=number,
                )
            yield text

    def _run(
        self, texts: Iterator[SourceText], options: TranslateOptions, plan: Plan, workers: int, stats: DecodeStats
    ) -> Iterator[Translation]:
        queue = _Queue(texts, options.window or plan.rows * workers * WINDOW_PER_ROW, options.scores)
        search = Greedy(scores=options.scores)

        def decode_greedily(sources: Iterator[Source], own: DecodeStats) -> Iterator[Hypothesis]:
            return decode(self.backend, sources, search, plan, own)

        while not queue.exhausted:
            for hypothesis in side_by_side(decode_greedily, workers, queue.sources(), stats, at_once=plan.group):
                queue.finish(hypothesis.index, self._translation(hypothesis))
                yield from queue.in_order()
            yield from queue.in_order()
        if queue.error is not None:
            raise queue.error

    def _translation(self, hypothesis: Hypothesis) -> Translation:
        pieces = hypothesis.ids[:-1] if hypothesis.ended else hypothesis.ids
        return Translation(
            text=self.target_tokenizer.decode(pieces),
            tokens=self.target_tokenizer.pieces(pieces),
            ids=hypothesis.ids,
            score=hypothesis.score,
            finish_reason="end" if hypothesis.ended else "length",
            truncated=False,
        )


@dataclass(slots=True)
class _Queue:
    """Texts on their way to the decoder, longest first within a window, and their translations back in order."""

    texts: Iterator[SourceText]
    window: int
    scores: bool
    exhausted: bool = False
    error: InputError | None = None
    _finished: dict[int, Translation] = field(default_factory=dict)
    _truncated: set[int] = field(default_factory=set)
    _read: int = 0
    _given: int = 0

    def sources(self) -> Iterator[Source]:
        """Sentences for the decoder. Ends early, so that what is finished can leave, after a window of nothing but
        empty texts, and where one slow sentence has kept back too many others.
        """
        while self._read - self._given <= self.window * (WINDOWS_AHEAD - 1) and (window := self._read_window()):
            sources = [Source(index, text.ids) for index, text in window if text.ids]
            if not sources:
                return
            yield from sorted(sources, key=lambda source: len(source.ids), reverse=True)

    def finish(self, index: int, translation: Translation) -> None:
        """Takes the translation of text `index`."""
        if index in self._truncated:
            self._truncated.remove(index)
            translation = replace(translation, truncated=True)
        self._finished[index] = translation

    def in_order(self) -> Iterator[Translation]:
        """The translations that are finished and whose turn it is."""
        while self._given in self._finished:
            yield self._finished.pop(self._given)
            self._given += 1

    def _read_window(self) -> list[tuple[int, SourceText]]:
        window: list[tuple[int, SourceText]] = []
        try:
            for text in itertools.islice(self.texts, self.window):
                window.append((self._read, text))
                self._read += 1
        except InputError as error:
            self.error = error
        self.exhausted = len(window) < self.window
        self._truncated.update(index for index, text in window if text.truncated)
        nothing = replace(NOTHING, score=0.0) if self.scores else NOTHING
        self._finished.update((index, nothing) for index, text in window if not text.ids)
        return window


NOTHING = Translation(text="", tokens=(), ids=(), score=None, finish_reason="end", truncated=False)


def _files_in_use(bundle: Bundle, backend: str) -> list[str]:
    endings = {"onnx": (".onnx", ".data"), "torchscript": (".ts",)}.get(backend, ())
    return [name for name in bundle.manifest.files if name.endswith((*endings, ".model"))]


def _make_backend(
    bundle: Bundle, name: str, *, threads: int | None, workers: int | None, spin: bool, device: str
) -> Backend:
    arguments = (bundle.folder, bundle.manifest.dimensions, bundle.manifest.features)
    if name == "onnx":
        from kvx.runtime.backends import onnx

        bundle.require(*GRAPH_FILES[name])
        return onnx.OnnxBackend(*arguments, threads=threads, workers=workers, spin=spin, device=device)
    if name == "torchscript":
        if importlib.util.find_spec("torch") is None:
            raise DeviceError(
                "backend torchscript without torch", expected="torch", remedy="pip install 'kvx[export]', or use onnx."
            )
        from kvx.runtime.backends import torchscript

        bundle.require(*GRAPH_FILES[name])
        return torchscript.TorchScriptBackend(*arguments, threads=threads, device=device)
    raise DeviceError(f"backend {name!r}", expected="onnx or torchscript", remedy="Correct the backend.")
