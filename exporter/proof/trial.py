"""The proof: an export is compared with eager PyTorch on everything that the contract promises.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width, V target vocabulary, C of
it on a shortlist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.manifest import Precision
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, TensorSpec, encoder_signature, step_signature
from kvx.runtime.decoding.backend import Backend, Shortlisting, Step, shortlisting_of, specs_of
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.decoding.shortlisted import LEAST_COLUMNS
from kvx.runtime.errors import OptionError

POISON = 1e30  # any finite number may lie beyond a row's length
HALF_POISON = 6e4  # in float16
HALF_LARGEST = 65504 / 2  # what float32 may reach where float16 shall, which rounds and has other inputs
ROWS = 5
LONGEST_SOURCE = 23
CHUNKS = (3, 1, 4, 2)
BEAMS = (4, 1, 3)
SHORTLISTS = ((1, 2**31), (4, 1), (1, 7), (3, 600))  # rows a sentence, and the most tokens on the list
SUM_DIGITS = 4
ATTENTION_UNIT = 0.5  # the demo's differs by 0.1 × the tolerance at most in fp16, bf16 and int8, by 0.36 × it in int4
DRAWN_SENTENCES = 16
DRAWN_TOKENS = 32


class ExportedGraphs(Backend, Protocol):
    """A backend whose graphs can also be run out of place, by tensor names."""

    @property
    def features(self) -> StepFeatures:
        """What its step has beyond the contract's core."""
        ...

    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder's inputs → its outputs."""
        ...

    def run_step(self, feeds: Tensors) -> Tensors:
        """The step's inputs → its outputs; the inputs stay as they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How far an export may be from eager; what is None is as the precision has it by default.

    `tolerance` is the largest difference allowed in a tensor, in units of its largest eager value or of 1, whichever
    is larger, but of 0.5 for attention, whose weights are below 1. `steps` decoder steps are compared on inputs drawn
    from `seed`. Of an export with fewer bits also: `equal_lines`, the share of the verification text that must be
    translated as eager does, and `bleu_lost`, the most that BLEU may fall against the references. Raises OptionError.
    """

    tolerance: float | None = None
    steps: int = 30
    seed: int = 0
    equal_lines: float | None = None
    bleu_lost: float | None = None

    def __post_init__(self) -> None:
        tolerance, equal, lost = self.tolerance, self.equal_lines, self.bleu_lost
        possible = (
            (tolerance is None or 0 < tolerance < 1)
            and (equal is None or 0 <= equal <= 1)
            and (lost is None or 0 <= lost <= 100)
        )
        if not possible or self.steps < 1 or self.seed < 0:
            raise OptionError(
                f"tolerance {tolerance}, {self.steps} steps, seed {self.seed}, equal lines {equal}, BLEU lost {lost}",
                expected="a tolerance between 0 and 1, at least one step, a seed of at least 0, a share of equal lines "
                "from 0 to 1 and 0 to 100 points of BLEU",
                remedy="Correct the options.",
            )

    def limits(self, precision: Precision) -> Limits:
        """The limits, with this precision's own where none is given."""
        default = LIMITS[precision]
        return Limits(
            default.tolerance if self.tolerance is None else self.tolerance,
            default.equal_lines if self.equal_lines is None else self.equal_lines,
            default.bleu_lost if self.bleu_lost is None else self.bleu_lost,
            default.neighbours,
        )


class Limits(NamedTuple):
    """`tolerance`, `equal_lines` and `bleu_lost` as ParityOptions describes them; `neighbours`, the tolerance for a
    row alone against the same row among others.
    """

    tolerance: float
    equal_lines: float
    bleu_lost: float
    neighbours: float


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(1e-4, 1.0, 0.0, neighbours=1e-4),
    # Roundings of 11 and of 8 bits; kernels of 16 bits may differ for other numbers of rows, and then round elsewhere.
    "fp16": Limits(5e-3, 0.95, 0.2, neighbours=5e-3),
    "bf16": Limits(4e-2, 0.9, 0.3, neighbours=4e-2),
    "int8": Limits(0.1, 0.8, 0.5, neighbours=1e-4),
    "int4": Limits(0.25, 0.4, 1.0, neighbours=0.02),  # its products round otherwise for one row than for several
}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was compared on which backend, the largest absolute difference per tensor, what was seen."""

    backend: str
    name: str
    passed: bool
    detail: str
    differences: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, in which an infinite difference is None."""
        finite = {tensor: worst if np.isfinite(worst) else None for tensor, worst in self.differences.items()}
        return asdict(self) | {"differences": finite}


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All findings of one proof, and the tolerance they were judged by."""

    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that the manifest holds."""
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            "checks": [check.to_dict() for check in self.checks],
        }


def prove(
    model: Transformer,
    backend: ExportedGraphs,
    plan: Plan,
    options: ParityOptions,
    verify_sources: Sequence[tuple[int, ...]] = (),
) -> Iterator[Check]:
    """The checks of one exported backend against the eager model, one by one as they are done.

    `verify_sources` are the ids of further sentences, bos and eos included, to be translated by both.
    """
    limits = options.limits("fp32")
    trial = Trial(model, options, limits.tolerance, backend.features.attention)
    yield from trial.check_tensors(backend)
    yield trial.check_neighbours(backend, limits.neighbours)
    yield trial.check_drawn(backend, plan)
    if verify_sources:
        yield trial.check_greedy(backend, verify_sources, plan, "greedy on the verification text")


class Differences:
    """The largest difference of each tensor, and the largest value that eager has in it."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self._scale: dict[str, float] = {}

    def add(self, name: str, expected: NDArray[Any], got: NDArray[Any], unit: float | None = None) -> None:
        """Compares two arrays; another shape, or a value on either side that is not finite, differs by infinity. The
        tolerance is in `unit`s where there is one, however large the values.
        """
        comparable = got.shape == expected.shape and bool(np.isfinite(got).all() and np.isfinite(expected).all())
        difference = float(np.abs(got - expected).max(initial=0.0)) if comparable else np.inf
        size = float(np.abs(expected).max(initial=0.0)) if comparable else 0.0
        self.worst[name] = max(self.worst.get(name, 0.0), difference)
        self._scale[name] = max(self._scale.get(name, 1.0), size) if unit is None else unit

    def require_equal(self, name: str, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Records any difference at all as infinite."""
        self.add(name, np.zeros(1), np.zeros(1) if np.array_equal(expected, got) else np.full(1, np.inf))

    def check(self, backend: Backend, name: str, tolerance: float) -> Check:
        """The finding: passed where no tensor is over the tolerance."""
        over = [tensor for tensor, worst in self.worst.items() if worst > tolerance * self._scale[tensor]]
        tensor = max(self.worst, key=lambda tensor: self.worst[tensor] / self._scale[tensor])
        detail = f"largest difference {self.worst[tensor]:.2g} in {tensor}"
        if over:
            detail += f", over {tolerance:g} × {self._scale[tensor]:.3g}; {len(over)} of {len(self.worst)} tensors"
        return Check(backend.name, name, not over, detail, dict(self.worst))


class Trial:
    """Ragged inputs drawn once, and what the eager model makes of them, with the attention of a layer or of none."""

    def __init__(
        self, model: Transformer, options: ParityOptions, tolerance: float, attention_layer: int | None = None
    ) -> None:
        self.model = model
        self.attention_layer = attention_layer
        self.eager = TorchBackend(model, attention_layer=attention_layer)
        self.tolerance = tolerance
        self.random = np.random.default_rng(options.seed)
        longest = min(LONGEST_SOURCE, model.config.source_positions)
        self.source_lengths = np.linspace(longest, 1, ROWS).astype(np.int64)
        self.input_ids = self.random.integers(0, model.config.source_vocab_size, (ROWS, longest))
        self.dimensions = Dimensions.of_model(model.config.to_dict())
        self.steps = min(options.steps, model.config.target_positions)

    def drawn_sources(self) -> list[tuple[int, ...]]:
        """Random sentences of many lengths."""
        config = self.model.config
        lengths = np.linspace(1, min(40, config.source_positions), DRAWN_SENTENCES).astype(int)
        return [tuple(self.random.integers(0, config.source_vocab_size, length).tolist()) for length in lengths]

    def check_tensors(self, backend: ExportedGraphs) -> Iterator[Check]:
        """Everything that the graphs give."""
        yield self.check_encoder(backend)
        yield from self.check_steps(backend)
        if backend.query_tokens:
            yield self.check_chunks(backend)
        if _shares_sources(backend):
            yield self.check_beams(backend)
        shortlisting = shortlisting_of(backend)
        if shortlisting is not None:
            yield self.check_shortlist(backend, shortlisting)

    def check_encoder(self, backend: ExportedGraphs) -> Check:
        """Cross keys and values within every row's length; the ids beyond it are random, not pads."""
        found = Differences()
        got = backend.run_encoder({"input_ids": self.input_ids, "source_lengths": self.source_lengths})
        expected = self.eager.encode(self.input_ids, self.source_lengths)
        for name, past in encoder_signature(self.dimensions).presents.items():
            found.add(name, inside(expected[past], self.source_lengths), inside(got[name], self.source_lengths))
        return found.check(backend, "encoder outputs", self.tolerance)

    def check_steps(self, backend: ExportedGraphs) -> Iterator[Check]:
        """Logits and caches over many steps: rows at different positions, everything beyond their lengths poisoned."""
        logits, attention, caches, places = (Differences() for _ in range(4))
        truth, tried = self.cache(), self.cache(backend.cache_specs)
        eager_step, step = self.eager.bind(truth), backend.bind(tried)
        presents = step_signature(self.dimensions, StepFeatures()).presents
        for number in range(self.steps):
            ids = self.random.integers(0, self.model.config.target_vocab_size, ROWS)
            poison(tried, self.random)
            feeds = {"input_ids": ids, "past_lengths": tried.lengths, "source_lengths": tried.source_lengths}
            before = {name: buffer.copy() for name, buffer in tried.buffers.items()}
            apart = backend.run_step(feeds | before)
            got, expected = step(ids), eager_step(ids)
            logits.add("logits", expected.logits, apart["logits"])
            places.add("logits", apart["logits"], got.logits)
            if expected.attention is not None:
                _compare_attention(attention, expected.attention, apart["attention"], truth.source_lengths)
                places.add("attention", apart["attention"], _or_nothing(got.attention))
            truth.advance()
            tried.advance()
            for name, past in presents.items():
                caches.add(name, inside(truth.buffers[past], truth.lengths), inside(apart[name], truth.lengths))
            compare_caches(places, {past: apart[name] for name, past in presents.items()}, tried, before)
            if number % 3 == 0:  # a row begins anew, so that the rows stand at different positions
                truth.lengths[number // 3 % ROWS] = tried.lengths[number // 3 % ROWS] = 0
        tolerance = self.tolerance
        yield logits.check(backend, f"logits of {self.steps} steps, caches poisoned beyond their lengths", tolerance)
        if self.attention_layer is not None:
            yield attention.check(
                backend, f"attention of layer {self.attention_layer}, zero beyond the source", tolerance
            )
        yield caches.check(backend, "caches written by these steps", tolerance)
        yield places.check(backend, "in place against out of place", tolerance)

    def check_chunks(self, backend: ExportedGraphs) -> Check:
        """Several tokens of each row at once against one after the other, rows at different positions, poisoned: their
        logits, what they write, and that they write nothing else.
        """
        found = Differences()
        truth, tried = self.cache(), self.cache(backend.cache_specs)
        eager_step, step = self.eager.bind(truth), backend.bind_chunk(tried)
        for number, most in enumerate(CHUNKS):
            size = min(most, self.model.config.target_positions)
            self._make_room(truth, tried, size)
            ids = self.random.integers(0, self.model.config.target_vocab_size, (ROWS, size))
            poison(tried, self.random)
            before = {name: buffer.copy() for name, buffer in tried.buffers.items()}
            got = step(ids).logits
            for position in range(size):
                found.add("logits", eager_step(ids[:, position]).logits, got[:, position])
                truth.advance()
            tried.lengths += size
            compare_caches(found, truth.buffers, tried, before)
            truth.lengths[number] = tried.lengths[number] = 0
        return found.check(backend, "several tokens at once", self.tolerance)

    def _make_room(self, truth: KVCache, tried: KVCache, size: int) -> None:
        """Rows that the model has no positions left for begin anew."""
        full = tried.lengths + size > self.model.config.target_positions
        truth.lengths[full] = tried.lengths[full] = 0

    def check_beams(self, backend: ExportedGraphs) -> Check:
        """Several rows of a sentence over one copy of its source against eager rows with a copy each; sentences at
        different positions, poisoned.
        """
        found = Differences()
        for beams in BEAMS:
            self._compare_rows(found, backend.beam_cache_specs, beams, backend.bind, slice(None))
        return found.check(backend, "several rows a sentence", self.tolerance)

    def check_shortlist(self, backend: ExportedGraphs, shortlisting: Shortlisting) -> Check:
        """The same with logits of a part of the vocabulary, and with all of it in another order."""
        found = Differences()
        for beams, most in SHORTLISTS:
            listed = self.random.permutation(self.model.config.target_vocab_size)[:most]
            bind = partial(_bind_projection, shortlisting, shortlisting.projection[listed])
            self._compare_rows(found, shortlisting.cache_specs, beams, bind, listed)
        return found.check(backend, "a part of the vocabulary", self.tolerance)

    def _compare_rows(
        self,
        found: Differences,
        specs: Sequence[TensorSpec],
        beams: int,
        bind: Callable[[KVCache], Step],
        listed: IntArray | slice,
    ) -> None:
        """Steps over sentences of so many rows each; `listed` are the tokens that the logits are those of."""
        truth, tried = self.cache(beams=beams), self.cache(specs, beams)
        eager_step, step = self.eager.bind(truth), bind(tried)
        for sentence in range(ROWS):
            self._make_room(truth, tried, 1)
            ids = self.random.integers(0, self.model.config.target_vocab_size, ROWS * beams)
            poison(tried, self.random)
            before = {name: buffer.copy() for name, buffer in tried.buffers.items()}
            got, expected = step(ids), eager_step(ids)
            found.add("logits", expected.logits[:, listed], got.logits)
            if expected.attention is not None:
                given = _or_nothing(got.attention)
                _compare_attention(found, expected.attention, given, truth.source_lengths)
            truth.advance()
            tried.advance()
            compare_caches(found, truth.buffers, tried, before)
            anew = slice(sentence * beams, (sentence + 1) * beams)
            truth.lengths[anew] = tried.lengths[anew] = 0

    def check_neighbours(self, backend: ExportedGraphs, tolerance: float) -> Check:
        """Logits of rows that are encoded and stepped alone against those of the same rows among others, and so of
        sentences with several rows and of a part of the vocabulary where there are graphs for them.
        """
        found, vocabulary = Differences(), self.model.config.target_vocab_size
        for beams in (1, max(BEAMS)) if _shares_sources(backend) else (1,):
            ids = self.random.integers(0, vocabulary, (self.steps, ROWS, beams))
            name = "logits" if beams == 1 else f"logits of {beams} rows a sentence"
            together = self._logits(backend, range(ROWS), ids)
            for row in range(ROWS):
                found.add(name, together[:, [row]], self._logits(backend, [row], ids))
        shortlisting = shortlisting_of(backend)
        if shortlisting is not None:
            ids = self.random.integers(0, vocabulary, (self.steps, ROWS, 1))
            together = self._logits(backend, range(ROWS), ids, shortlisting)
            for row in range(ROWS):
                alone = self._logits(backend, [row], ids, shortlisting)
                found.add("logits of a part of the vocabulary", together[:, [row]], alone)
        return found.check(backend, "rows alone against rows among others", tolerance)

    def _logits(
        self, backend: Backend, sentences: Sequence[int], ids: IntArray, shortlisting: Shortlisting | None = None
    ) -> NDArray[Any]:
        """Target ids [steps, ROWS, k] → the logits of these sentences, of k rows each, in a cache of their own
        [steps, sentences, k, V], or those of the first tokens, as many columns as a decode has at least.
        """
        chosen, (steps, _, beams) = list(sentences), ids.shape
        lengths = self.source_lengths[chosen]
        specs = specs_of(backend, beams=beams, shortlisted=shortlisting is not None)
        cache = KVCache(specs, Capacity(len(chosen) * beams, steps, int(lengths.max()), beams))
        encoded = backend.encode(self.input_ids[chosen, : lengths.max()], lengths)
        for place, length in enumerate(lengths.tolist()):
            cache.admit(EncodedSource(encoded, place, length))
        step, logits = backend.bind(cache) if shortlisting is None else _first_tokens(shortlisting, cache), []
        for given in ids[:, chosen]:
            logits.append(step(given.reshape(-1)).logits.reshape(len(chosen), beams, -1).copy())
            cache.advance()
        return np.stack(logits)

    def check_drawn(self, backend: Backend, plan: Plan) -> Check:
        """Greedy translations of random sentences."""
        plan = replace(plan, max_new_tokens=min(DRAWN_TOKENS, plan.max_new_tokens))
        return self.check_greedy(backend, self.drawn_sources(), plan, "greedy on drawn ids")

    def check_greedy(self, backend: Backend, sources: Sequence[tuple[int, ...]], plan: Plan, name: str) -> Check:
        """Greedy translations of the same sources, in different numbers of rows; a near-tie of eager may fall
        either way.
        """
        expected = translations(self.eager, sources, replace(plan, rows=2 * ROWS, group=2 * ROWS))
        got = translations(backend, sources, replace(plan, rows=ROWS, group=ROWS))
        differing = [index for index in range(len(sources)) if expected[index] != got[index]]
        divergences = [
            self._divergence(index, (plan.bos, *expected[index]), (plan.bos, *got[index]), sources[index])
            for index in differing
        ]
        wrong = [divergence for divergence in divergences if not divergence.is_tie]
        equal, ties = len(sources) - len(differing), len(differing) - len(wrong)
        detail = f"{equal} of {len(sources)} sentences equal" + (
            f", {ties} near-ties fell the other way" if ties else ""
        )
        return Check(backend.name, name, not wrong, "; ".join([detail, *map(str, wrong[:1])]))

    def _divergence(
        self, sentence: int, expected: tuple[int, ...], got: tuple[int, ...], source: tuple[int, ...]
    ) -> Divergence:
        """Where two targets part, both from bos on."""
        position = next(i for i, ids in enumerate(zip(expected, got, strict=False)) if ids[0] != ids[1])
        with torch.inference_mode():
            logits = self.model(
                torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([expected[:position]])
            )[0, -1]
        margin = float(logits[expected[position]] - logits[got[position]])
        uncertainty = 2 * self.tolerance * max(1.0, float(logits.abs().max()))
        return Divergence(sentence, position, expected[position], got[position], margin, margin <= uncertainty)

    def cache(self, specs: Sequence[TensorSpec] | None = None, beams: int = 1, fillers: int = 0) -> KVCache:
        """The drawn sentences, of so many rows each, as eager encodes them, and room for as many rows more."""
        positions = max(self.steps, sum(CHUNKS)) + 1  # a finished row stands behind its last token
        capacity = Capacity(ROWS * beams + fillers, positions, self.input_ids.shape[1], beams)
        cache = KVCache(specs or self.eager.cache_specs, capacity)
        tensors = self.eager.encode(self.input_ids, self.source_lengths)
        for index, length in enumerate(self.source_lengths.tolist()):
            cache.admit(EncodedSource(tensors, index, length))
        return cache


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token in which two translations of a sentence differ, and by how much eager prefers its own."""

    sentence: int
    position: int
    expected: int
    got: int
    margin: float
    is_tie: bool

    def __str__(self) -> str:
        return (
            f"sentence {self.sentence + 1}, token {self.position}: {self.got} instead of {self.expected}, "
            f"which eager prefers by {self.margin:.2g}"
        )


def translations(backend: Backend, sources: Sequence[tuple[int, ...]], plan: Plan) -> dict[int, tuple[int, ...]]:
    """The greedy ids of each source, by its number."""
    numbered = (Sentence(index, ids) for index, ids in enumerate(sources))
    return {outcome.sentence.number: outcome.best.ids for outcome in decode(backend, numbered, Greedy(), plan)}


def _bind_projection(shortlisting: Shortlisting, projection: FloatArray, cache: KVCache) -> Step:
    """The step with these rows of the output projection."""
    step = shortlisting.bind(cache)
    return lambda input_ids: step(input_ids, projection)


def _first_tokens(shortlisting: Shortlisting, cache: KVCache) -> Step:
    """The step over the first LEAST_COLUMNS tokens, or all and some of zeros."""
    rows = shortlisting.projection[:LEAST_COLUMNS]
    projection = np.zeros((LEAST_COLUMNS, rows.shape[1]), np.float32)
    projection[: len(rows)] = rows
    return _bind_projection(shortlisting, projection, cache)


def _compare_attention(found: Differences, expected: FloatArray, got: FloatArray, source_lengths: IntArray) -> None:
    """Attention [B, S]: near the expected, exactly zero beyond each source's length, every sum 1 up to rounding."""
    found.add("attention", expected, got, ATTENTION_UNIT)
    if got.shape == expected.shape:
        beyond = got[np.arange(got.shape[1]) >= source_lengths[:, None]]
        found.require_equal("attention beyond the source", np.zeros_like(beyond), beyond)
        found.require_equal("sums of attention", np.ones(len(got)), got.sum(axis=1).round(SUM_DIGITS))


def _or_nothing(attention: FloatArray | None) -> FloatArray:
    """An attention that is missing has no row, which differs from any."""
    return np.zeros((0, 0), np.float32) if attention is None else attention


def _shares_sources(backend: Backend) -> bool:
    """Whether several rows of a sentence have a graph of their own."""
    return backend.beam_cache_specs != backend.cache_specs


def inside(array: NDArray[Any], lengths: IntArray) -> NDArray[Any]:
    """[B, H, positions, D] → the positions within the rows' lengths [sum of lengths, H, D]."""
    positions: NDArray[Any] = array.transpose(0, 2, 1, 3)
    return positions[np.arange(positions.shape[1]) < lengths[:, None]]


def outside(array: NDArray[Any], lengths: IntArray) -> NDArray[Any]:
    """[B, H, positions, D] → the positions beyond the rows' lengths [their number, H, D]."""
    positions: NDArray[Any] = array.transpose(0, 2, 1, 3)
    return positions[np.arange(positions.shape[1]) >= lengths[:, None]]


def compare_caches(found: Differences, expected: Tensors, tried: KVCache, before: Tensors, spare: int = 0) -> None:
    """What was written into the rows that are expected, that nothing else was, in no row, but in `spare` positions
    beyond its length, and that the sources are as they were.
    """
    for spec in tried.specs:
        name, old, new = spec.name, before[spec.name], tried.buffers[spec.name]
        if "S" in spec.axes:
            found.require_equal(f"{name} left as it is", old, new)
            continue
        rows = len(expected[name])
        lengths = tried.lengths[:rows]
        found.add(name, inside(expected[name], lengths), inside(new[:rows], lengths))
        kept = outside(old, tried.lengths + spare), outside(new, tried.lengths + spare)
        found.require_equal(f"{name} beyond the lengths", *kept)


def poison(cache: KVCache, random: np.random.Generator) -> None:
    """Puts ±POISON wherever no position of a row's own or of its source is."""
    for spec in cache.specs:
        buffer, lengths = cache.buffers[spec.name], cache.source_lengths if "S" in spec.axes else cache.lengths
        outside = np.arange(buffer.shape[2]) >= lengths[:, None]
        largest = HALF_POISON if buffer.dtype == np.float16 else POISON
        poison = random.choice([-largest, largest], size=buffer.shape).astype(buffer.dtype)
        np.copyto(buffer, poison, where=outside[:, None, :, None])
