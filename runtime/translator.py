"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, Unpack

from kvx.runtime.alignment import align, replace_unknown
from kvx.runtime.backend import Backend, FloatArray, shortlisting_of, specs_of
from kvx.runtime.bundle import Bundle
from kvx.runtime.decode import decode, decode_known
from kvx.runtime.device import Device
from kvx.runtime.errors import DeviceError, InputError
from kvx.runtime.loop import LoopBackend, decode_in_blocks
from kvx.runtime.manifest import GRAPH_FILES
from kvx.runtime.options import Problem, TranslateKeywords, TranslateOptions, refuse
from kvx.runtime.plan import DEFAULT_ROWS, Plan
from kvx.runtime.rows import FinishReason, Hypothesis, Source
from kvx.runtime.schedule import DecodeStats, Outcome
from kvx.runtime.scoring import RankBy, Ranking, Score, rank
from kvx.runtime.search import Greedy
from kvx.runtime.shortlist import Shortlist, Vocabulary
from kvx.runtime.sources import OnLong, SourceReader, SourceText, refuse_string
from kvx.runtime.targets import Target, TargetReader
from kvx.runtime.workers import Decode, side_by_side

WINDOWS_AHEAD = 4
WINDOW_PER_ROW = 8  # sentences read ahead and sorted by length together, for every row
ALIKE_FOR_ALTERNATIVES = ("on_long", "cache_bytes", "suppress", "shortlist", "scores", "align", "replace_unknown")

Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Translation:
    """One translated text.

    `ids` are the target ids after bos, eos included where `finish_reason` is "end"; `tokens` their pieces without
    it; `score` the sum of `log_probabilities`, the model's own of each id, natural, where asked for; `truncated` tells
    that the source was cut to the model's positions. `others` are the next best ones of a beam search, or further
    samples. Where alignment was asked for, `alignment` has for each of `tokens` the index among `source_tokens` of the
    piece that it attends to most, and `attention` [ids, 1 + source tokens + 1] all weights, bos and eos included.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    score: float | None
    finish_reason: FinishReason
    truncated: bool
    log_probabilities: tuple[float, ...] | None = None
    others: tuple[Translation, ...] = ()
    alignment: tuple[int, ...] | None = None
    source_tokens: tuple[str, ...] | None = None
    attention: FloatArray | None = field(default=None, compare=False, repr=False)

    @property
    def hypotheses(self) -> tuple[Translation, ...]:
        """This one and the others."""
        return self, *self.others


class Translator:
    """A bundle ready to translate. Thread-safe: every call has a cache of its own over the shared weights."""

    def __init__(self, bundle: Bundle, backend: Backend, *others: Backend) -> None:
        self.manifest = bundle.manifest
        self.backends = (backend, *others)
        self.targets = TargetReader(bundle)
        self._sources = SourceReader(bundle)
        self._shortlists: dict[Path, Shortlist] = {}

    @property
    def backend(self) -> Backend:
        """The first of those that share out the texts, in all but their device alike."""
        return self.backends[0]

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
        several of them faster on one text and slower where cores are shared (onnx only). `device`: "cpu", "cuda",
        "cuda:<index>", or several with commas between, which share out the texts. Raises BundleError, DeviceError,
        OptionError, TokenizerError.
        """
        opened, devices = Bundle.open(Path(bundle)), Device.parse_list(device)
        make = partial(_make_backend, opened, backend, threads=threads, workers=workers, spin=spin)
        with ThreadPoolExecutor(max_workers=1) as pool:
            hashes = pool.submit(opened.check_hashes, _files_in_use(opened, backend))
            try:
                made = [make(one) for one in devices]
            finally:
                hashes.result()  # an altered file explains whatever the backend made of it
        return cls(opened, *made)

    def translate(
        self,
        texts: Sequence[str],
        options: TranslateOptions | None = None,
        *,
        prefixes: Sequence[Target | None] | None = None,
        cancelled: Cancelled | None = None,
        **changes: Unpack[TranslateKeywords],
    ) -> list[Translation]:
        """The translation of each text, in order.

        The options, or some of their fields, are those of TranslateOptions. `prefixes`: what each translation begins
        with, texts or target ids. Where `cancelled` answers true, all end as they are by then. Raises InputError before
        anything is decoded, OptionError and CapacityError.
        """
        refuse_string(texts)
        refuse_string(prefixes or ())
        options = replace(options or TranslateOptions(), window=max(1, len(texts)), **changes)
        plan, workers = self.plan(options, sentences=len(texts))
        shortlist = self._shortlist(options)
        read = list(self._read(texts, prefixes, options, plan))
        given = prefixes is not None or options.prefix is not None
        return list(self._run(iter(read), options, shortlist, plan, workers, DecodeStats(), cancelled, given=given))

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

        Where a text is refused, those before it are still given; then InputError is raised. Where `cancelled` answers
        true, what was read ends as it is, and nothing more is read. `stats` is filled at the end, however it comes.
        Raises OptionError and CapacityError.
        """
        refuse_string(texts)
        refuse_string(prefixes or ())
        options = options or TranslateOptions()
        plan, workers = self.plan(options, sentences=options.window)
        shortlist = self._shortlist(options)
        read = self._read(texts, prefixes, options, plan)
        given = prefixes is not None or options.prefix is not None
        return self._run(read, options, shortlist, plan, workers, stats or DecodeStats(), cancelled, given=given)

    def alternatives(
        self, text: str, prefix: Target, count: int = 5, options: TranslateOptions | None = None
    ) -> list[Translation]:
        """The `count` most probable tokens after a beginning of the translation, each gone on from by the search of
        the options: translations that differ in the token after the prefix, in the order of its probability.

        Raises InputError, OptionError and CapacityError.
        """
        options = options or TranslateOptions()
        refuse([(f"count = {count}", "a count from 1 up")] if count < 1 else [])
        limit = options.max_new_tokens or self.manifest.max_new_tokens
        begun = self.targets.prefix(prefix, limit, None)
        width = min(count, self.manifest.model["target_vocab_size"])
        next_only = TranslateOptions()
        if width > 1:  # eos, which is not counted, has no advantage without a length penalty
            next_only = TranslateOptions(beam_size=width, n_best=width, length_penalty=0.0)
        alike = {name: getattr(options, name) for name in ALIKE_FOR_ALTERNATIVES}
        (first,) = self.translate([text], replace(next_only, max_new_tokens=len(begun) + 1, prefix=begun, **alike))
        if not first.ids:
            return [first]
        begins = (replace(first, others=()), *first.others)
        eos = self.manifest.target_ids.eos
        going = [one.ids for one in begins if one.ids[-1] != eos and len(one.ids) < limit]
        found = dict(zip(going, self.translate([text] * len(going), options, prefixes=going), strict=True))
        return [found.get(one.ids, one) for one in begins]

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
        refuse(self._impossible(options))
        beams = options.beam_size
        plan = Plan.of(
            self.manifest,
            specs_of(self.backend, beams=beams, shortlisted=options.shortlist is not None),
            rows=options.rows,
            cache_bytes=options.cache_bytes,
            max_new_tokens=options.max_new_tokens if max_new_tokens is None else max_new_tokens,
            beams=beams,
        )
        if sentences is not None:
            sentences *= options.targets
            plan = plan.for_sentences(sentences)
        few = sentences is not None and sentences * beams <= (options.rows or DEFAULT_ROWS)
        workers = options.workers or (1 if few else min(self.backend.decodes, plan.most_shares()))
        return plan.share_of(workers, least_rows=options.rows or 1), workers

    def read_sources(
        self, texts: Iterable[str], plan: Plan, on_long: OnLong, *, with_pieces: bool = False
    ) -> Iterator[SourceText]:
        """The ids of each text. Raises InputError, with the text's number, for what cannot be translated."""
        for number, text in enumerate(self._sources.read(texts, on_long, with_pieces=with_pieces), 1):
            if len(text.ids) > plan.source_positions:
                raise InputError(
                    f"{len(text.ids)} tokens, which need a cache of {plan.seat_bytes(len(text.ids)):,} bytes",
                    expected=f"at most {plan.cache_bytes:,} bytes",
                    remedy="Plan more bytes (--cache-mb) or fewer new tokens (--max-new-tokens).",
                    line=number,
                )
            yield text

    def _shortlist(self, options: TranslateOptions) -> Shortlist | None:
        """The shortlist that the options name, read when it is first asked for. Raises InputError."""
        if options.shortlist is None:
            return None
        path = Path(options.shortlist)
        if path not in self._shortlists:
            source, target = Vocabulary.of(self.manifest, "source"), Vocabulary.of(self.manifest, "target")
            self._shortlists[path] = Shortlist.read(path, source_vocab=source, target_vocab=target)
        return self._shortlists[path]

    def _impossible(self, options: TranslateOptions) -> list[Problem]:
        """What this bundle cannot do of what is asked."""
        problems: list[Problem] = []
        vocabulary = self.manifest.model["target_vocab_size"]
        for name in ("beam_size", "top_k"):
            if (getattr(options, name) or 1) > vocabulary:
                problems.append((f"{name} = {getattr(options, name)}", f"{name} up to the vocabulary's {vocabulary}"))
        if options.with_attention and self.manifest.features.attention is None:
            problems.append(
                ("align or replace_unknown", "a bundle that gives attention, exported with --with-attention")
            )
        if options.shortlist is not None and shortlisting_of(self.backend) is None:
            problems.append(
                (
                    f"shortlist = {options.shortlist} with the {self.backend.name} backend of this bundle",
                    "a shortlist only with onnx and a bundle exported with --with-shortlist",
                )
            )
        limit = options.max_new_tokens or self.manifest.max_new_tokens
        if (options.min_new_tokens or 1) > limit:
            problems.append((f"min_new_tokens = {options.min_new_tokens}", f"at most {limit}, the limit of new tokens"))
        return problems

    def _read(
        self, texts: Iterable[str], prefixes: Iterable[Target | None] | None, options: TranslateOptions, plan: Plan
    ) -> Iterator[_Request]:
        """Texts with the ids of what their translations begin with. Raises InputError where the numbers differ."""
        common = () if options.prefix is None else self.targets.prefix(options.prefix, plan.max_new_tokens, None)
        read = self.read_sources(texts, plan, options.on_long, with_pieces=options.with_attention)
        given = itertools.repeat(common) if prefixes is None else self.targets.prefixes(prefixes, plan.max_new_tokens)
        for number, text in enumerate(read, 1):
            prefix = next(given, None)
            if prefix is None:
                raise _miscounted(f"{number - 1} prefixes and more texts", number)
            yield _Request(text, prefix)
        if prefixes is not None and next(given, None) is not None:
            raise _miscounted("more prefixes than texts", None)

    def _run(
        self,
        requests: Iterator[_Request],
        options: TranslateOptions,
        shortlist: Shortlist | None,
        plan: Plan,
        workers: int,
        stats: DecodeStats,
        cancelled: Cancelled | None,
        *,
        given: bool,
    ) -> Iterator[Translation]:
        stop = cancelled or (lambda: False)
        decodes = [
            self._decode(backend, options, shortlist, plan, stop, given=given) for backend in self.backends
        ] * workers
        window = options.window or plan.rows * len(decodes) * WINDOW_PER_ROW
        queue = _Queue(requests, options, window, stop, shortlist)
        while not queue.exhausted:
            for outcome in side_by_side(decodes, queue.sources(), stats, at_once=plan.group):
                found = partial(self._translation, queue.request(outcome.index), outcome, options)
                queue.finish(outcome.index, outcome.target, tuple(map(found, outcome.hypotheses)))
                yield from queue.in_order()
            yield from queue.in_order()
        if queue.error is not None:
            raise queue.error

    def _decode(
        self,
        backend: Backend,
        options: TranslateOptions,
        shortlist: Shortlist | None,
        plan: Plan,
        stop: Cancelled,
        *,
        given: bool,
    ) -> Decode:
        """What a backend does with sources, of whose targets something may be `given`: blocks of steps on a device
        where nothing but greedy tokens is asked for.
        """
        search, constraints = options.search(), options.constraints(self.targets.suppressed(options.suppress))
        more = given or options.scores or options.with_attention or constraints.filters or shortlist is not None
        if isinstance(search, Greedy) and not more and isinstance(backend, LoopBackend) and backend.loops:
            return partial(_in_blocks, backend, plan, stop)

        def decode_them(sources: Iterator[Source], stats: DecodeStats) -> Iterator[Outcome]:
            decode_some = partial(
                decode,
                backend,
                search=search,
                plan=plan,
                stats=stats,
                constraints=constraints,
                with_attention=options.with_attention,
                cancelled=stop,
            )
            return decode_some(sources) if shortlist is None else decode_known(decode_some, sources, shortlist, stats)

        return decode_them

    def _translation(
        self, request: _Request, outcome: Outcome, options: TranslateOptions, hypothesis: Hypothesis
    ) -> Translation:
        tokenizer = self.targets.tokenizer
        ids = hypothesis.ids[:-1] if hypothesis.ended else hypothesis.ids
        pieces, attention = tokenizer.pieces(ids), hypothesis.attention
        alignment = None if attention is None else align(attention[: len(ids)])
        text = tokenizer.decode(ids)
        if options.replace_unknown and alignment is not None and tokenizer.unknown_id in ids:
            unknown, source = tokenizer.unknown_id, request.text.pieces
            text = replace_unknown(source, pieces, ids, unknown, alignment, tokenizer.join)
        return Translation(
            text=text,
            tokens=pieces,
            ids=hypothesis.ids,
            score=hypothesis.score,
            finish_reason=outcome.reason(hypothesis),
            truncated=request.text.truncated,
            log_probabilities=hypothesis.log_probabilities,
            alignment=alignment if options.align else None,
            source_tokens=request.text.pieces if options.align else None,
            attention=attention if options.align else None,
        )


class _Request(NamedTuple):
    """A text as the encoder takes it, and the target ids that are given."""

    text: SourceText
    prefix: tuple[int, ...]


@dataclass(slots=True)
class _Queue:
    """Texts on their way to the decoder, longest first within a window, and their translations back in order.

    Those that a shortlist does not know come last, as they are not decoded beside the others.
    """

    requests: Iterator[_Request]
    options: TranslateOptions
    window: int
    cancelled: Cancelled
    shortlist: Shortlist | None
    exhausted: bool = False
    error: InputError | None = None
    _under_way: dict[int, _Request] = field(default_factory=dict)
    _targets: dict[int, dict[int, tuple[Translation, ...]]] = field(default_factory=dict)
    _finished: dict[int, Translation] = field(default_factory=dict)
    _read: int = 0
    _given: int = 0

    def sources(self) -> Iterator[Source]:
        """Sentences for the decoder. Ends early, so that what is finished can leave, after a window of nothing but
        empty texts, and where one slow sentence has kept back too many others.
        """
        while self._read - self._given <= self.window * (WINDOWS_AHEAD - 1) and (window := self._read_window()):
            sources = [
                Source(index, request.text.ids, (request.prefix,) * self.options.targets)
                for index, request in window
                if request.text.ids
            ]
            if not sources:
                return
            yield from sorted(sources, key=self._rank, reverse=True)

    def request(self, index: int) -> _Request:
        """The text with this index, while it is under way."""
        return self._under_way[index]

    def finish(self, index: int, target: int, found: tuple[Translation, ...]) -> None:
        """Takes the translations of one target of text `index`."""
        targets = self._targets.setdefault(index, {})
        targets[target] = found
        if len(targets) == self.options.targets:
            first, *others = itertools.chain.from_iterable(targets[number] for number in sorted(targets))
            self._finished[index] = replace(first, others=tuple(others))
            del self._targets[index], self._under_way[index]

    def in_order(self) -> Iterator[Translation]:
        """The translations that are finished and whose turn it is."""
        while self._given in self._finished:
            yield self._finished.pop(self._given)
            self._given += 1

    def _rank(self, source: Source) -> tuple[bool, int]:
        return self.shortlist is None or self.shortlist.knows(source.ids), len(source.ids)

    def _read_window(self) -> list[tuple[int, _Request]]:
        window: list[tuple[int, _Request]] = []
        if self._read and self.cancelled():
            self.exhausted = True
            return window
        try:
            for request in itertools.islice(self.requests, self.window):
                window.append((self._read, request))
                self._read += 1
        except InputError as error:
            self.error = error
        self.exhausted = len(window) < self.window
        self._under_way.update((index, request) for index, request in window if request.text.ids)
        nothing = replace(NOTHING, score=0.0, log_probabilities=()) if self.options.scores else NOTHING
        self._finished.update((index, nothing) for index, request in window if not request.text.ids)
        return window


NOTHING = Translation(text="", tokens=(), ids=(), score=None, finish_reason="end", truncated=False)


def _in_blocks(
    backend: LoopBackend, plan: Plan, stop: Cancelled, sources: Iterator[Source], stats: DecodeStats
) -> Iterator[Outcome]:
    return decode_in_blocks(backend, sources, plan, stats, cancelled=stop)


def _miscounted(got: str, line: int | None) -> InputError:
    return InputError(got, expected="a prefix for each text", remedy="Check that both belong together.", line=line)


def _files_in_use(bundle: Bundle, backend: str) -> list[str]:
    endings = {"onnx": (".onnx", ".data", ".npy"), "torchscript": (".ts",)}.get(backend, ())
    return [name for name in bundle.manifest.files if name.endswith((*endings, ".model"))]


def _make_backend(
    bundle: Bundle, name: str, device: Device, *, threads: int | None, workers: int | None, spin: bool
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
        return torchscript.TorchScriptBackend(*arguments, threads=threads, device=str(device))
    raise DeviceError(f"backend {name!r}", expected="onnx or torchscript", remedy="Correct the backend.")
