"""The proof of the graph that feeds itself: every state it leaves is the one that eager greedy decoding reaches.

Letters: B rows, S source positions, T capacity of a row's cache, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kvx.exporter.proof.caches import compare_caches, inside, poison
from kvx.exporter.proof.report import Check, Differences
from kvx.exporter.proof.trial import Trial
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.backends.onnx import loop_session
from kvx.runtime.backends.ort import ort
from kvx.runtime.bundle.graphs import LOOP_FILE
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, step_signature
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.device_loop import LoopState
from kvx.runtime.decoding.plan import Plan

FILLERS = 2  # rows that are finished from the start: an idle one of the runtime's, one without even a source
IDLE_STEPS = 3  # that a finished row stays so before its place is taken

State = dict[str, NDArray[Any]]


class BoundLoop:
    """The graph over one state, by input name, onto which every output is bound, in the session of the runtime."""

    def __init__(self, file: Path, dimensions: Dimensions, state: State) -> None:
        forced = state["forced_ids"].shape[1] if "forced_ids" in state else 0
        self.signature = step_signature(dimensions, StepFeatures(forced=forced).loop)
        if not forced:
            state.pop("forced_ids", None)
        self.state = state
        self._session = loop_session(file, self.signature)
        self._binding = self._session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in state.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, past in self.signature.presents.items():
            self._binding.bind_ortvalue_output(name, values[past])

    def __call__(self) -> None:
        """The state → the next one, in place."""
        self._session.run_with_iobinding(self._binding)

    def apart(self) -> State:
        """The next state by input name, out of place: this one stays as it is."""
        names = list(self.signature.presents)
        outputs = self._session.run(names, {name: array.copy() for name, array in self.state.items()})
        return {self.signature.presents[name]: output for name, output in zip(names, outputs, strict=True)}


def check_loop(trial: Trial, backend: Backend, folder: Path, plan: Plan) -> Check:
    """The loop of a bundle on ONNX Runtime's CPU provider, in place and out of place, against eager.

    Ragged sources, a limit for each row, rows whose place is taken when they have been finished for a while, fillers,
    and poison wherever no position is. Where eager's two best tokens are nearly equal either is right. A drawn sentence
    may never end by eos, so the graph must also have the plan's eos and pad in it.
    """
    truth, tried = trial.cache(), trial.cache(backend.cache_specs, fillers=FILLERS)
    loop = BoundLoop(folder / LOOP_FILE, _of_cache(trial.dimensions, tried), _start(trial, tried, plan))
    eager_step, rows = trial.eager.bind(truth), truth.active
    found, idle, ended = Differences(), np.zeros(rows, np.int64), 0
    _check_constants(found, folder / LOOP_FILE, plan)
    for _ in range(trial.steps):
        poison(tried, trial.random)
        before = {name: array.copy() for name, array in loop.state.items()}
        logits, apart = eager_step(before["input_ids"][:rows]).logits, loop.apart()
        loop()
        logits[:, list(plan.never)] = -np.inf
        _check_choice(found, logits, before, loop.state["input_ids"], trial.tolerance)
        for name, expected in _expected(before, loop.state["input_ids"], plan).items():
            found.require_equal(name, expected, loop.state[name])
            found.require_equal(f"{name} out of place", expected, apart[name])
        truth.lengths[:] = tried.lengths[:rows]
        compare_caches(found, truth.buffers, tried, before, spare=1)  # where a finished row stands
        _check_apart(found, tried, rows, apart)
        ended += int((~before["past_finished"] & (loop.state["input_ids"] == plan.eos)).sum())
        idle = np.where(loop.state["past_finished"][:rows], idle + 1, 0)
        _begin_anew(trial, loop.state, np.flatnonzero(idle > IDLE_STEPS), plan)
        truth.lengths[:] = tried.lengths[:rows]
    check = found.check(backend, f"the loop: {trial.steps} steps, in place and out of place", trial.tolerance)
    return replace(check, detail=f"{check.detail}; {ended} rows ended by eos")


def bind_loop(folder: Path, dimensions: Dimensions, plan: Plan, cache: KVCache) -> Callable[[IntArray], None]:
    """The loop as a step over this cache: one token for each row, input_ids [n], none of which is finished."""
    state = _state(cache, plan)
    loop = BoundLoop(folder / LOOP_FILE, _of_cache(dimensions, cache), state)

    def step(input_ids: IntArray) -> None:
        lengths = cache.lengths.copy()
        state["input_ids"][:], state["limits"][:], state["past_finished"][:] = input_ids, cache.capacity.target, False
        loop()
        cache.lengths[:] = lengths

    return step


def _of_cache(dimensions: Dimensions, cache: KVCache) -> Dimensions:
    return replace(dimensions, element=cache.specs[0].dtype)


def _state(cache: KVCache, plan: Plan) -> State:
    """Idle rows over a cache, whose lengths and buffers are part of the state."""
    idle = LoopState.idle(cache.capacity, plan.forced)
    state: State = {field.name: getattr(idle, field.name) for field in fields(idle)}
    return {**state, "past_lengths": cache.lengths, "source_lengths": cache.source_lengths, **cache.buffers}


def _start(trial: Trial, cache: KVCache, plan: Plan) -> State:
    """Every sentence at bos with a limit of its own, then the fillers."""
    active = cache.active
    cache.source_lengths[active:] = 1
    cache.source_lengths[-1] = 0
    state = _state(cache, plan)
    state["limits"][-1] = 0
    state["input_ids"][:active] = plan.start[0]
    state["forced_ids"][:active] = trial.random.integers(0, trial.dimensions.vocab_size, (active, plan.forced))
    state["limits"][:active] = _limits(trial, active)
    state["past_finished"][:active] = False
    state["past_ids"][:active] = trial.random.integers(0, trial.dimensions.vocab_size, state["past_ids"][:active].shape)
    return state


def _limits(trial: Trial, rows: int) -> IntArray:
    """Limits from one token to all positions."""
    limits: IntArray = trial.random.integers(1, trial.steps + 1, rows)
    return limits


def _begin_anew(trial: Trial, state: State, rows: IntArray, plan: Plan) -> None:
    """Other targets take the places of finished ones, for the same sources."""
    state["input_ids"][rows] = plan.start[0]
    state["past_lengths"][rows] = 0
    state["past_finished"][rows] = False
    state["limits"][rows] = _limits(trial, len(rows))


def _check_choice(
    found: Differences, logits: FloatArray, before: Mapping[str, NDArray[Any]], chosen: IntArray, tolerance: float
) -> None:
    """The rows that are not finished must have chosen what eager has as its best, or within rounding of it."""
    forced_ids = before.get("forced_ids", np.zeros((len(chosen), 0), np.int64))
    for row in np.flatnonzero(~before["past_finished"]):
        position = int(before["past_lengths"][row])
        if position < forced_ids.shape[1]:
            found.require_equal("forced next_ids", forced_ids[row, position], chosen[row])
            continue
        best, got = float(logits[row].max()), float(logits[row, chosen[row]])
        finite = logits[row][np.isfinite(logits[row])]
        allowed = 2 * tolerance * max(1.0, float(np.abs(finite).max()))
        found.require_equal("next_ids", np.zeros(1), np.full(1, float(best - got > allowed)))


def _check_apart(found: Differences, tried: KVCache, rows: int, apart: State) -> None:
    """What these rows wrote in place is what they give out of place."""
    lengths = tried.lengths[:rows]
    for name in (spec.name for spec in tried.specs if "S" not in spec.axes):
        bound = inside(tried.buffers[name][:rows], lengths)
        found.require_equal(f"{name} out of place", bound, inside(apart[name][:rows], lengths))


def _check_constants(found: Differences, file: Path, plan: Plan) -> None:
    """What ends a row and what a finished one gives, as they stand in the graph."""
    nodes, known = _makers_and_constants(file)
    endings, waiting = set(), ["present_finished"]
    while waiting:
        node = nodes.get(waiting.pop())
        if node is not None and node.op_type == "Equal":
            endings |= {known[name] for name in node.input if name in known}
        elif node is not None and node.op_type == "Or":
            waiting += node.input
    choice = nodes.get("next_ids")
    pads = (
        {known[name] for name in choice.input[1:] if name in known} if choice and choice.op_type == "Where" else set()
    )
    found.require_equal("eos in the graph", np.array([plan.eos]), np.array(sorted(endings)))
    found.require_equal("pad in the graph", np.array([plan.pad]), np.array(sorted(pads)))


def _makers_and_constants(file: Path) -> tuple[dict[str, onnx.NodeProto], dict[str, int]]:
    """The node that gives each value, and the constant integers, by name."""
    graph = onnx.load(file, load_external_data=False).graph
    nodes = {output: node for node in graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    return nodes, {
        name: int(onnx.numpy_helper.to_array(tensor, str(file.parent)).item())
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.INT64 and np.prod(tensor.dims) == 1
    }


def _expected(before: State, chosen: IntArray, plan: Plan) -> State:
    """What follows, by input name, from a state and the tokens that were chosen."""
    finished, rows = before["past_finished"], np.arange(len(chosen))
    lengths = before["past_lengths"] + ~finished
    ids = before["past_ids"].copy()
    ids[rows, before["past_lengths"]] = chosen
    return {
        "input_ids": np.where(finished, plan.pad, chosen),
        "past_lengths": lengths,
        "past_finished": finished | (chosen == plan.eos) | (lengths >= before["limits"]),
        "past_ids": ids,
    }
