"""The proof: an export is compared with eager PyTorch on everything that the contract promises.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width, V target vocabulary, C of
it on a shortlist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvx.exporter.proof.caches import compare_caches, inside, poison
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.report import Check, Differences
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, TensorSpec, encoder_signature, step_signature
from kvx.runtime.decoding.backend import Backend, Shortlisting, Step, shortlisting_of, specs_of
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.decoding.shortlisted import LEAST_COLUMNS

ROWS = 5
LONGEST_SOURCE = 23
CHUNKS = (3, 1, 4, 2)
BEAMS = (4, 1, 3)
SHORTLISTS = ((1, 2**31), (4, 1), (1, 7), (3, 600))  # rows a sentence, and the most tokens on the list
SUM_DIGITS = 4
ATTENTION_UNIT = 0.5  # the demo's differs by 0.1 × the tolerance at most in fp16, bf16 and int8, by 0.36 × it in int4
DRAWN_SENTENCES = 16
LARGE = 2**29  # bytes of a model whose graphs are not all loaded at a time


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


@runtime_checkable
class Releasing(Protocol):
    """A backend that need not hold all of its graphs at a time."""

    def release(self) -> None:
        """Gives up what is loaded again when it is needed."""
        ...


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
        """Steps over sentences of `beams` rows each. `listed` are the tokens that have logits."""
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
        for beams in (1, max(BEAMS)) if shares_sources(backend) else (1,):
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
        [steps, sentences, k, V], or those of the first LEAST_COLUMNS tokens.
        """
        chosen, (steps, _, beams) = list(sentences), ids.shape
        lengths = self.source_lengths[chosen]
        specs = specs_of(backend, beams=beams, shortlisted=shortlisting is not None)
        cache = KVCache(specs, Capacity(len(chosen) * beams, steps, int(lengths.max()), beams))
        encoded = backend.encode(self.input_ids[chosen, : lengths.max()], lengths)
        for place, length in enumerate(lengths.tolist()):
            cache.admit(EncodedSource(encoded, place, length))
        step, logits = backend.bind(cache) if shortlisting is None else first_tokens(shortlisting, cache), []
        for given in ids[:, chosen]:
            logits.append(step(given.reshape(-1)).logits.reshape(len(chosen), beams, -1).copy())
            cache.advance()
        return np.stack(logits)

    def cache(self, specs: Sequence[TensorSpec] | None = None, beams: int = 1, fillers: int = 0) -> KVCache:
        """The drawn sentences of `beams` rows each, as eager encodes them, and `fillers` more rows."""
        positions = max(self.steps, sum(CHUNKS)) + 1  # a finished row stands behind its last token
        capacity = Capacity(ROWS * beams + fillers, positions, self.input_ids.shape[1], beams)
        cache = KVCache(specs or self.eager.cache_specs, capacity)
        tensors = self.eager.encode(self.input_ids, self.source_lengths)
        for index, length in enumerate(self.source_lengths.tolist()):
            cache.admit(EncodedSource(tensors, index, length))
        return cache


def is_large(model: Transformer) -> bool:
    """Whether all graphs of a model together, each with weights packed for its own products, would fill the memory."""
    return sum(parameter.nbytes for parameter in model.parameters()) > LARGE


def release_large(model: Transformer, backend: ExportedGraphs) -> None:
    """Gives up the graphs of a large model that are not needed at the moment."""
    if isinstance(backend, Releasing) and is_large(model):
        backend.release()


def _bind_projection(shortlisting: Shortlisting, projection: FloatArray, cache: KVCache) -> Step:
    """The step with these rows of the output projection."""
    step = shortlisting.bind(cache)
    return lambda input_ids: step(input_ids, projection)


def first_tokens(shortlisting: Shortlisting, cache: KVCache) -> Step:
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


def shares_sources(backend: Backend) -> bool:
    """Whether several rows of a sentence have a graph of their own."""
    return backend.beam_cache_specs != backend.cache_specs
