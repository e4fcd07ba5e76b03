"""Every row of every table: each token of both vocabularies and each position of both sides is fed once. Of a model so
large that this would take hours, tokens are drawn, and the check says how many.

A row shows in the keys and values that it alone decides: of a source of one token, of the first layer of the decoder.
Their error is measured against how far those of other rows are from the mean: a row that stands in another's place is
off by about 1.4 of that, however large the weights are. What all rows are off by alike, as where a projection in 4 bits
meets the position that all tokens stand at, is no row's own; the checks of whole outputs see it.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width, E model width, V vocabulary,
P positions of a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kvx.exporter.proof.caches import held_as, numbers
from kvx.exporter.proof.report import Check, Differences
from kvx.exporter.proof.trial import ExportedGraphs, Trial, release_large
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import IntArray
from kvx.runtime.bundle.signature import PAST, TensorSpec, encoder_signature, key_value_names
from kvx.runtime.decoding.backend import Backend, StepOutput
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

MOST_ROWS = 256
WALK_BYTES = 2**26  # at least, of the cache whose rows walk through the positions
SOURCE_BYTES = 2**30  # of one attention of eager over the longest source
LEAST_SPREAD = 0.1  # of the size of the keys and values themselves
SOURCE_TOKENS = 4
MOST_WORK = 1e13  # multiplications of one check, some minutes
DRAWN_WORK = 1.5e12  # where all tokens would take more
FAR_ROWS = 6  # that see all distances
FIRST_AND_LAST = 64  # tokens that are always fed: special ones and languages stand there

Feed = Callable[[IntArray], object]


class Fed(NamedTuple):
    """A graph of the decoder: its name, the buffers that it takes, and what binds it to a cache: a function of one
    token for each row, which writes their keys and values.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    bind: Callable[[KVCache], Feed]


class Rows:
    """The largest error of a row in each comparison, and whose it was."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self._whose: dict[str, int] = {}

    def add(self, name: str, ids: IntArray, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Compares what eager and an export make of these tokens or positions [n], both [n, E]."""
        errors = _errors(expected, got)
        worst = int(errors.argmax())
        if errors[worst] >= self.worst.get(name, 0.0):
            self.worst[name], self._whose[name] = float(errors[worst]), int(ids[worst])

    def check(self, backend: Backend, name: str, tolerance: float) -> Check:
        """The finding: passed where no row is over the tolerance."""
        over = [f"{what} (row {self._whose[what]})" for what, worst in self.worst.items() if worst > tolerance]
        compared = max(self.worst, key=lambda what: self.worst[what])
        detail = f"largest difference {self.worst[compared]:.2g} of the rows' spread in {compared}"
        if over:
            detail += f", over {tolerance:g} in {', '.join(over)}"
        return Check(backend.name, name, not over, detail, dict(self.worst))


def _errors(expected: NDArray[Any], got: NDArray[Any]) -> NDArray[np.float64]:
    """Of each row [n], beyond what all are off by, as a share of the spread; infinite where one is not finite."""
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    off = got - expected
    finite = np.isfinite(off).all(axis=1)
    alike = off[finite].mean(axis=0) if finite.any() else 0.0
    spread = np.sqrt(np.square(expected - expected.mean(axis=0)).sum(axis=1).mean())
    size = np.sqrt(np.square(expected).sum(axis=1).mean())
    scale = max(spread, LEAST_SPREAD * size, np.finfo(np.float32).tiny)
    errors: NDArray[np.float64] = np.sqrt(np.square(off - alike).sum(axis=1)) / scale
    return np.where(np.isfinite(errors), errors, np.inf)


def check_source_tables(trial: Trial, backend: ExportedGraphs, tolerance: float) -> Check:
    """Every token of the source as a sentence of its own, and one sentence that takes every position."""
    config, found = trial.model.config, Rows()
    tokens = _tokens(trial, config.source_vocab_size, 2 * _source_work(trial.model))
    for ids in _batches(tokens):
        _compare_sources(found, "tokens", ids, trial, backend, ids[:, None])
    positions = config.distinct_positions[0]
    longest = min(positions, int((SOURCE_BYTES / (4 * config.encoder_heads)) ** 0.5))
    drawn = trial.random.integers(0, config.source_vocab_size, (1, longest))
    _compare_sources(found, "positions", np.arange(longest), trial, backend, drawn)
    seen = f"{_of(tokens, config.source_vocab_size)} tokens and {longest} of {positions} positions"
    return found.check(backend, f"source tables: {seen}", tolerance)


def check_target_tables(trial: Trial, backend: ExportedGraphs, graphs: Iterable[Fed], tolerance: float) -> Check:
    """Every token of the target at the first position and, where there is a table of positions, a token at each, in
    each graph of the decoder.
    """
    config, found = trial.model.config, Rows()
    graphs = list(graphs)
    tokens = _tokens(trial, config.target_vocab_size, len(graphs) * _target_work(trial.model))
    table = 0 if config.positions == "relative" else config.target_positions
    for graph in graphs:
        release_large(trial.model, backend)
        batches = _batches(tokens)
        cache, feed = _bound(trial, graph, batches.shape[1], 1)
        for ids in batches:
            _compare_targets(found, "tokens", trial.model, graph, cache, feed, ids, np.zeros_like(ids))
        each = Capacity(1, table + 1, 1).bytes(graph.specs)
        steps = _walk(table, max(1, min(MOST_ROWS, _walk_bytes(trial.model) // each)))
        cache, feed = _bound(trial, graph, steps.shape[1], table)
        for positions in steps:
            ids = trial.random.integers(0, config.target_vocab_size, len(positions))
            _compare_targets(found, "positions", trial.model, graph, cache, feed, ids, positions)
    seen = f"{_of(tokens, config.target_vocab_size)} tokens" + (f" and {table} positions" if table else "")
    return found.check(backend, f"target tables: {seen}", tolerance)


def check_distances(trial: Trial, backend: ExportedGraphs, graphs: Iterable[Fed]) -> Check:
    """A token of each row that sees keys and values, any, at every distance that the model tells from others, in each
    graph of the decoder: its logits, and what every layer writes.
    """
    config, found = trial.model.config, Differences()
    farthest = config.distinct_positions[1]
    for graph in graphs:
        release_large(trial.model, backend)
        ids = trial.random.integers(0, config.target_vocab_size, FAR_ROWS)
        cache, feed = _bound(trial, graph, FAR_ROWS, farthest)
        truth, eager_step = _bound(trial, Fed("", trial.eager.cache_specs, trial.eager.bind), FAR_ROWS, farthest)
        _fill(trial, truth, cache, ids)
        truth.lengths[:] = cache.lengths[:] = farthest - 1 - np.arange(FAR_ROWS) % farthest
        got, expected = feed(ids), eager_step(ids)
        if isinstance(got, StepOutput) and isinstance(expected, StepOutput):
            logits = got.logits.reshape(FAR_ROWS, -1)
            columns = min(logits.shape[1], expected.logits.shape[1])  # a shortlist has the first alone
            found.add(f"{graph.name}, logits", expected.logits[:, :columns], logits[:, :columns])
        written = np.arange(FAR_ROWS), slice(None), truth.lengths
        for name in (spec.name for spec in trial.eager.cache_specs if "T" in spec.axes):
            found.add(f"{graph.name}, {name}", truth.buffers[name][written], numbers(cache.buffers[name][written]))
    return found.check(backend, f"every distance up to {farthest - 1}", trial.tolerance)


def _fill(trial: Trial, truth: KVCache, cache: KVCache, ids: IntArray) -> None:
    """Puts the same keys and values into both, of the size of those that the first layer makes of these tokens."""
    with torch.inference_mode():
        first = trial.model.first_keys_values(torch.from_numpy(ids), torch.zeros(len(ids), dtype=torch.int64))
    sizes = [float(tensor.float().square().mean()) ** 0.5 for tensor in first]
    names = (spec.name for spec in trial.eager.cache_specs if "T" in spec.axes)
    for name, size in zip(names, itertools.cycle(sizes), strict=False):
        held = truth.buffers[name]
        held[:] = trial.random.standard_normal(held.shape) * size
        cache.buffers[name][:] = held_as(cache.buffers[name], held)


def _tokens(trial: Trial, size: int, work: float) -> IntArray:
    """Every id below `size` in any order, or as many as can be fed where each takes this many multiplications."""
    ids: IntArray = trial.random.permutation(size)
    if size * work <= MOST_WORK:
        return ids
    ends = np.r_[:FIRST_AND_LAST, size - FIRST_AND_LAST : size] if size > 2 * FIRST_AND_LAST else ids
    return np.union1d(ends, ids[: int(DRAWN_WORK / work)])


def _of(tokens: IntArray, size: int) -> str:
    return str(size) if len(tokens) == size else f"{len(tokens)} of {size}"


def _source_work(model: Transformer) -> int:
    """The multiplications that a source of one token takes."""
    across = (layer.cross_attention for layer in model.decoder)
    return _weights(model.encoder_layers) + sum(_weights(one.key) + _weights(one.value) for one in across)


def _target_work(model: Transformer) -> int:
    """The multiplications that a token of a target takes."""
    return _weights(model.decoder_layers) + model.head.weight.numel()


def _walk_bytes(model: Transformer) -> int:
    """Of the cache that walks: half of what a step of a large model reads anyway."""
    return max(WALK_BYTES, 4 * _target_work(model) // 2)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _batches(tokens: IntArray) -> IntArray:
    """The ids in batches of as many [batches, B]; the last is filled up with those of the first."""
    number = -(-len(tokens) // MOST_ROWS)
    rows = -(-len(tokens) // number)
    ids: IntArray = np.resize(tokens, (number, rows))
    return ids


def _walk(positions: int, rows: int) -> IntArray:
    """Positions [steps, B]: every row walks through its part of them."""
    if not positions:
        return np.zeros((0, 1), np.int64)
    steps = -(-positions // rows)
    starts = np.arange(-(-positions // steps)) * steps
    walked: IntArray = np.minimum(np.arange(steps)[:, None] + starts, positions - 1)
    return walked


def _compare_sources(
    found: Rows, what: str, rows: IntArray, trial: Trial, backend: ExportedGraphs, input_ids: IntArray
) -> None:
    """input_ids [B, S], whose B·S tokens or positions are `rows`."""
    lengths = np.full(len(input_ids), input_ids.shape[1])
    expected = trial.eager.encode(input_ids, lengths)
    got = backend.run_encoder({"input_ids": input_ids, "source_lengths": lengths})
    for name, past in encoder_signature(trial.dimensions).presents.items():
        found.add(f"{name} of {what}", rows, _flat(expected[past]), _flat(got[name]))


def _compare_targets(
    found: Rows,
    what: str,
    model: Transformer,
    graph: Fed,
    cache: KVCache,
    feed: Feed,
    ids: IntArray,
    positions: IntArray,
) -> None:
    """One token for each row, at a position of its own, both [B]."""
    cache.lengths[:] = positions
    feed(ids)
    with torch.inference_mode():
        first = model.first_keys_values(torch.from_numpy(ids), torch.from_numpy(positions))
    for name, expected in zip(key_value_names(PAST, 0, "decoder"), first, strict=True):
        got = numbers(cache.buffers[name][np.arange(len(ids)), :, positions])
        rows = ids if what == "tokens" else positions
        found.add(f"{graph.name}, {name} of {what}", rows, _flat(expected.numpy()), got.reshape(len(ids), -1))


def _bound(trial: Trial, graph: Fed, rows: int, positions: int) -> tuple[KVCache, Feed]:
    """Rows of one sentence, or of as many equal ones, and what feeds them."""
    length = min(SOURCE_TOKENS, int(trial.source_lengths.max()))
    encoded = trial.eager.encode(trial.input_ids[:1, :length], np.array([length]))
    shared = any(spec.axes[0] == "G" for spec in graph.specs)
    cache = KVCache(graph.specs, Capacity(rows, positions + 1, length, rows if shared else 1))
    for _ in range(cache.capacity.seats):
        cache.admit(EncodedSource(encoded, 0, length))
    return cache, graph.bind(cache)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    """[B, H, positions, D] → [B · positions, H · D]."""
    return array.transpose(0, 2, 1, 3).reshape(array.shape[0] * array.shape[2], -1)
