"""Texts in, translations out: the runtime's public face."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self, Unpack

from kvx.runtime.backends.device import Device
from kvx.runtime.backends.registry import load_backends
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.backend import Backend, shortlisting_of, specs_of
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.plan import DEFAULT_ROWS, Plan
from kvx.runtime.decoding.schedule import DecodeStats
from kvx.runtime.engine.alternatives import alternatives
from kvx.runtime.engine.job import Job, Latch
from kvx.runtime.engine.queue import Request, RequestQueue, paired
from kvx.runtime.engine.scoring import RankBy, Ranking, Score, rank
from kvx.runtime.engine.workers import side_by_side
from kvx.runtime.errors import InputError
from kvx.runtime.options import Problem, TranslateKeywords, TranslateOptions, refuse
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary
from kvx.runtime.text.sources import OnLong, SourceReader, SourceText, refuse_string
from kvx.runtime.text.targets import Target, TargetReader
from kvx.runtime.translation import Translation, Writer

SIDES: tuple[Literal["source", "target"], ...] = ("source", "target")
WINDOW_PER_ROW = 8  # sentences read ahead and sorted by length together, for every row


class Translator:
    """A bundle ready to translate. Thread-safe: every call has a cache of its own over the shared weights."""

    def __init__(self, bundle: Bundle, backend: Backend, *others: Backend) -> None:
        self.manifest = bundle.manifest
        self.backends = (backend, *others)
        self.targets = TargetReader(bundle)
        self._sources = SourceReader(bundle)
        self._reading = threading.Lock()
        self._read_shortlist: tuple[Path, int, Shortlist] | None = None

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
        return cls(opened, *load_backends(opened, backend, devices, threads=threads, workers=workers, spin=spin))

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
        options = replace(options or TranslateOptions(), window=max(1, len(texts)), **changes)
        job = self._job(options, len(texts), given=prefixes is not None)
        requests = list(self._requests(texts, prefixes, job))
        return list(self._run(iter(requests), job, DecodeStats(), cancelled))

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
        options = options or TranslateOptions()
        job = self._job(options, options.window, given=prefixes is not None)
        return self._run(self._requests(texts, prefixes, job), job, stats or DecodeStats(), cancelled)

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
            return alternatives(self, text, prefix, count, options or TranslateOptions())
        except InputError as error:
            raise error.at(number) from None

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
        devices = 1 if few else len(self.backends)
        workers = options.workers or (1 if few else min(self.backend.decodes, plan.most_shares()))
        return plan.share_of(workers * devices, least_rows=options.rows or 1), workers * devices

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
        """The shortlist that the options name, read when it is first asked for or has changed. Raises InputError."""
        if options.shortlist is None:
            return None
        path = Path(options.shortlist).absolute()
        written = path.stat().st_mtime_ns if path.is_file() else 0
        with self._reading:
            if self._read_shortlist is None or self._read_shortlist[:2] != (path, written):
                source, target = (Vocabulary.of(self.manifest, side) for side in SIDES)
                found = Shortlist.read(path, source_vocab=source, target_vocab=target)
                self._read_shortlist = path, written, found
            return self._read_shortlist[2]

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

    def _job(self, options: TranslateOptions, sentences: int | None, *, given: bool) -> Job:
        """What the options ask for, for so many texts at hand; `given` where each has a prefix of its own."""
        plan, decodes = self.plan(options, sentences=sentences)
        suppressed = self.targets.suppressed(options.suppress)
        return Job(
            options=options,
            plan=plan,
            decodes=decodes,
            search=options.search(),
            constraints=options.constraints(suppressed),
            shortlist=self._shortlist(options),
            given=given or options.prefix is not None,
        )

    def _requests(self, texts: Iterable[str], prefixes: Iterable[Target | None] | None, job: Job) -> Iterator[Request]:
        """Texts with the ids of what their translations begin with: a prefix of their own, or that of the options."""
        refuse_string(prefixes or ())
        options, limit = job.options, job.plan.max_new_tokens
        common = () if options.prefix is None else self.targets.prefix(options.prefix, limit, None)
        read = self.read_sources(texts, job.plan, options.on_long, with_pieces=options.with_attention)
        if prefixes is None:
            return (Request(text, common) for text in read)
        own = self.targets.prefixes(prefixes, limit)
        return (Request(text, common if prefix is None else prefix) for text, prefix in paired(read, own))

    def _run(
        self, requests: Iterator[Request], job: Job, stats: DecodeStats, cancelled: Cancelled | None
    ) -> Iterator[Translation]:
        stop, options, writer = Latch(cancelled), job.options, Writer(self.targets.tokenizer, job.options)
        window = options.window or job.plan.rows * job.decodes * WINDOW_PER_ROW
        queue = RequestQueue(requests, options.targets, window, writer.nothing(), job.shortlist, stop)
        decodes = job.on(self.backends, stop)
        while not queue.exhausted:
            outcomes = side_by_side(decodes, queue.sources(), stats, at_once=job.plan.group)
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    text = queue.request(outcome.index).text
                    found = (writer.write(text, outcome, hypothesis) for hypothesis in outcome.hypotheses)
                    queue.finish(outcome.index, outcome.target, tuple(found))
                    yield from queue.in_order()
            yield from queue.in_order()
        if queue.error is not None:
            raise queue.error
