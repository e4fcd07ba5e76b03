"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from kvx.runtime.backend import Backend
from kvx.runtime.bundle import Bundle
from kvx.runtime.decode import decode
from kvx.runtime.errors import DeviceError, InputError, OptionError
from kvx.runtime.schedule import DecodeStats, Hypothesis, Limits, Source
from kvx.runtime.search import Greedy
from kvx.runtime.sources import OnLong, SourceReader, SourceText, load_tokenizer

FinishReason = Literal["end", "length"]

DEFAULT_ROWS = 64
WINDOW_PER_ROW = 16  # sentences read ahead and sorted by length together, for every row


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
    decoded at a time. `window`: texts read ahead and sorted by length together. Raises OptionError.
    """

    max_new_tokens: int | None = None
    scores: bool = False
    on_long: OnLong = "error"
    rows: int = DEFAULT_ROWS
    window: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value}"
            for name, value in (("max_new_tokens", self.max_new_tokens), ("rows", self.rows), ("window", self.window))
            if value is not None and value < 1
        ]
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
        cls, bundle: str | Path, *, backend: str = "onnx", threads: int | None = None, device: str = "cpu"
    ) -> Self:
        """The translator of the bundle at this path, after its files' names, sizes and sha256 have been checked.

        `backend`: "onnx" or "torchscript" (which needs torch). `threads`: compute threads (default: the cores this
        process may use). `device`: "cpu", "cuda" or "cuda:<index>". Raises BundleError, DeviceError, TokenizerError.
        """
        opened = Bundle.open(Path(bundle))
        with ThreadPoolExecutor(max_workers=1) as pool:
            hashes = pool.submit(opened.check_hashes, _files_in_use(opened, backend))
            try:
                made = _make_backend(opened, backend, threads, device)
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
        rows: int = DEFAULT_ROWS,
    ) -> list[Translation]:
        """The translation of each text, in order. Raises InputError before anything is decoded, and OptionError."""
        _refuse_string(texts)
        options = TranslateOptions(
            max_new_tokens=max_new_tokens,
            scores=scores,
            on_long=on_long,
            rows=max(1, min(rows, len(texts))),
            window=max(1, len(texts)),
        )
        prepared = list(self._sources.read(texts, options.on_long))
        return list(self._run(iter(prepared), options, DecodeStats()))

    def translate_iter(
        self, texts: Iterable[str], options: TranslateOptions | None = None, stats: DecodeStats | None = None
    ) -> Iterator[Translation]:
        """The translation of each text, in order, reading no more than a window ahead.

        Where a text is refused, those before it are still given; then InputError is raised. `stats` is filled as it
        goes.
        """
        _refuse_string(texts)
        options = options or TranslateOptions()
        return self._run(self._sources.read(texts, options.on_long), options, stats or DecodeStats())

    def _run(
        self, prepared: Iterator[SourceText], options: TranslateOptions, stats: DecodeStats
    ) -> Iterator[Translation]:
        limits = Limits.of(self.manifest, rows=options.rows, max_new_tokens=options.max_new_tokens)
        search = Greedy(scores=options.scores)
        queue = _Queue(prepared, options.window or options.rows * WINDOW_PER_ROW)
        while not queue.exhausted:
            for hypothesis in decode(self.backend, queue.sources(), search, limits, stats):
                queue.finished[hypothesis.index] = self._translation(hypothesis, queue.truncated, options)
                yield from queue.in_order()
            yield from queue.in_order()
        if queue.error is not None:
            raise queue.error

    def _translation(self, hypothesis: Hypothesis, truncated: set[int], options: TranslateOptions) -> Translation:
        pieces = hypothesis.ids[:-1] if hypothesis.ended else hypothesis.ids
        was_cut = hypothesis.index in truncated
        truncated.discard(hypothesis.index)
        return Translation(
            text=self.target_tokenizer.decode(pieces),
            tokens=self.target_tokenizer.pieces(pieces),
            ids=hypothesis.ids,
            score=hypothesis.score,
            finish_reason="end" if hypothesis.ended else "length",
            truncated=was_cut,
        )


@dataclass(slots=True)
class _Queue:
    """Texts on their way to the decoder, longest first within a window, and back in order."""

    prepared: Iterator[SourceText]
    window: int
    finished: dict[int, Translation] = field(default_factory=dict)
    truncated: set[int] = field(default_factory=set)
    exhausted: bool = False
    error: InputError | None = None
    _read: int = 0
    _given: int = 0

    def sources(self) -> Iterator[Source]:
        """Sentences for the decoder; ends early after a window of nothing but empty texts, so that they can leave."""
        while window := self._read_window():
            sources = [Source(index, text.ids) for index, text in window if text.ids]
            if not sources:
                return
            yield from sorted(sources, key=lambda source: len(source.ids), reverse=True)

    def in_order(self) -> Iterator[Translation]:
        """The translations that are finished and whose turn it is."""
        while self._given in self.finished:
            yield self.finished.pop(self._given)
            self._given += 1

    def _read_window(self) -> list[tuple[int, SourceText]]:
        window: list[tuple[int, SourceText]] = []
        try:
            for prepared in itertools.islice(self.prepared, self.window):
                window.append((self._read, prepared))
                self._read += 1
        except InputError as error:
            self.error = error
        self.exhausted = len(window) < self.window
        for index, text in window:
            if not text.ids:
                self.finished[index] = EMPTY
            if text.truncated:
                self.truncated.add(index)
        return window


EMPTY = Translation(text="", tokens=(), ids=(), score=None, finish_reason="end", truncated=False)


def _refuse_string(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise InputError("one str", expected="a sequence of texts", remedy="Pass [text].")


def _files_in_use(bundle: Bundle, backend: str) -> list[str]:
    endings = {"onnx": (".onnx", ".data"), "torchscript": (".ts",)}.get(backend, ())
    return [name for name in bundle.manifest.files if name.endswith((*endings, ".model"))]


def _make_backend(bundle: Bundle, name: str, threads: int | None, device: str) -> Backend:
    arguments = (bundle.folder, bundle.manifest.dimensions, bundle.manifest.features)
    if name == "onnx":
        from kvx.runtime.backends import onnx

        bundle.require(onnx.ENCODER_FILE, onnx.STEP_FILE)
        return onnx.OnnxBackend(*arguments, threads=threads, device=device)
    if name == "torchscript":
        if importlib.util.find_spec("torch") is None:
            raise DeviceError(
                "backend torchscript without torch", expected="torch", remedy="pip install 'kvx[export]', or use onnx."
            )
        from kvx.runtime.backends import torchscript

        bundle.require(torchscript.ENCODER_FILE, torchscript.STEP_FILE)
        return torchscript.TorchScriptBackend(*arguments, threads=threads, device=device)
    raise DeviceError(f"backend {name!r}", expected="onnx or torchscript", remedy="Correct the backend.")
