"""The proof of the graph that feeds itself: every state it leaves is the one that eager greedy decoding reaches.

Letters: B rows, S source positions, T capacity of a row's cache, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kvx.exporter.parity import Check, Differences, Trial, inside, outside, poison
from kvx.runtime.backend import Backend, FloatArray, IntArray
from kvx.runtime.cache import KVCache
from kvx.runtime.manifest import LOOP_FILE
from kvx.runtime.plan import Plan
from kvx.runtime.signature import LOOP_FEATURES, Dimensions, step_signature

ERRORS_ONLY_AS_EXCEPTIONS = 4
FILLERS = 2  # rows that are finished from the start, with nothing in them, not even a source
IDLE_STEPS = 3  # that a finished row stays so before its place is taken

State = dict[str, NDArray[Any]]


class BoundLoop:
    """The graph over one state, by input name, onto which every output is bound."""

    def __init__(self, file: Path, dimensions: Dimensions, state: State) -> None:
        self.signature = step_signature(dimensions, LOOP_FEATURES)
        self.state = state
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY_AS_EXCEPTIONS
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
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
    and poison wherever no position is. Where eager's two best tokens are nearly equal either is right.
    """
    truth, tried = trial.cache(), trial.cache(backend.cache_specs, fillers=FILLERS)
    loop = BoundLoop(folder / LOOP_FILE, trial.dimensions, _start(trial, tried, plan))
    eager_step, rows = trial.eager.bind(truth), truth.active
    found, idle = Differences(), np.zeros(rows, np.int64)
    for _ in range(trial.steps):
        poison(tried, trial.random)
        before = {name: array.copy() for name, array in loop.state.items()}
        logits, apart = eager_step(before["input_ids"][:rows]).logits, loop.apart()
        loop()
        _check_choice(found, logits, before, loop.state["input_ids"], trial.tolerance)
        for name, expected in _expected(before, loop.state["input_ids"], plan).items():
            found.require_equal(name, expected, loop.state[name])
            found.require_equal(f"{name} out of place", expected, apart[name])
        truth.lengths[:] = tried.lengths[:rows]
        _check_caches(found, truth, tried, before, apart)
        idle = np.where(loop.state["past_finished"][:rows], idle + 1, 0)
        _begin_anew(trial, loop.state, np.flatnonzero(idle > IDLE_STEPS), plan)
        truth.lengths[:] = tried.lengths[:rows]
    return found.check(backend, f"the loop: {trial.steps} steps, in place and out of place", trial.tolerance)


def _start(trial: Trial, cache: KVCache, plan: Plan) -> State:
    """Every sentence at bos with a limit of its own, then the fillers."""
    rows, capacity = cache.capacity.rows, cache.capacity.target
    finished = np.arange(rows) >= cache.active
    return {
        "input_ids": np.where(finished, plan.pad, plan.bos),
        "past_lengths": cache.lengths,
        "source_lengths": cache.source_lengths,
        "limits": np.where(finished, 0, _limits(trial, rows)),
        "past_finished": finished,
        "past_ids": trial.random.integers(0, trial.dimensions.vocab_size, (rows, capacity)),
        **cache.buffers,
    }


def _limits(trial: Trial, rows: int) -> IntArray:
    """From one token to as many as there are positions."""
    limits: IntArray = trial.random.integers(1, trial.steps + 1, rows)
    return limits


def _begin_anew(trial: Trial, state: State, rows: IntArray, plan: Plan) -> None:
    """Other targets take the places of finished ones, for the same sources."""
    state["input_ids"][rows] = plan.bos
    state["past_lengths"][rows] = 0
    state["past_finished"][rows] = False
    state["limits"][rows] = _limits(trial, len(rows))


def _check_choice(
    found: Differences, logits: FloatArray, before: Mapping[str, NDArray[Any]], chosen: IntArray, tolerance: float
) -> None:
    """The rows that are not finished must have chosen what eager has as its best, or within rounding of it."""
    for row in np.flatnonzero(~before["past_finished"]):
        best, got = float(logits[row].max()), float(logits[row, chosen[row]])
        allowed = 2 * tolerance * max(1.0, float(np.abs(logits[row]).max()))
        found.require_equal("next_ids", np.zeros(1), np.full(1, float(best - got > allowed)))


def _check_caches(found: Differences, truth: KVCache, tried: KVCache, before: State, apart: State) -> None:
    """What was written, in place and out of place; nothing else was, but where a finished row stands."""
    rows = truth.active
    for spec in tried.specs:
        name, bound = spec.name, tried.buffers[spec.name]
        if "S" in spec.axes:
            found.require_equal(f"{name} left as it is", before[name], bound)
            continue
        found.add(name, inside(truth.buffers[name], truth.lengths), inside(bound[:rows], truth.lengths))
        found.require_equal(
            f"{name} out of place", inside(bound[:rows], truth.lengths), inside(apart[name][:rows], truth.lengths)
        )
        kept = outside(before[name], tried.lengths + 1), outside(bound, tried.lengths + 1)
        found.require_equal(f"{name} beyond the lengths", *kept)


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
