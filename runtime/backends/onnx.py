"""The bundle's ONNX graphs on ONNX Runtime, the cache bound in place."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from kvx.runtime.backend import IntArray, Step, StepOutput, Tensors
from kvx.runtime.cache import KVCache
from kvx.runtime.errors import BundleError, DeviceError, OptionError
from kvx.runtime.manifest import CHUNK_FILE, GRAPH_FILES
from kvx.runtime.processor import available_threads, bytes_saturate
from kvx.runtime.signature import (
    CHUNK_FEATURES,
    Dimensions,
    Signature,
    StepFeatures,
    TensorSpec,
    cache_specs,
    encoder_signature,
    step_signature,
)

ENCODER_FILE, STEP_FILE = GRAPH_FILES["onnx"]
CPU = "CPUExecutionProvider"
ERRORS_ONLY_AS_EXCEPTIONS = 4
SLOWER_FUSIONS = ["SkipLayerNormFusion"]  # 0.3 ms instead of 0.05 for 256 tokens of 256 channels on a CPU
WARNINGS = 2  # ONNX Runtime's default
ELEMENT_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32"}


class OnnxBackend:
    """Two sessions over one bundle's weights; every decode has buffers and bindings of its own.

    `threads` compute threads (default: the cores this process may use), all in each operator, or shared out to
    `workers` where their number is given; `spin` lets them wait busily within a run, never between runs; `device` is
    "cpu", "cuda" or "cuda:<index>". Raises BundleError where a graph is not the contract's, DeviceError where the
    session runs elsewhere than asked.
    """

    name = "onnx"

    def __init__(
        self,
        folder: Path,
        dimensions: Dimensions,
        features: StepFeatures,
        *,
        threads: int | None = None,
        workers: int | None = None,
        spin: bool = False,
        device: str = "cpu",
    ) -> None:
        all_threads = available_threads() if threads is None else threads
        self.decodes = all_threads if workers is None else workers
        if not 1 <= self.decodes <= all_threads:
            raise OptionError(
                f"threads = {all_threads}, workers = {self.decodes}",
                expected="at least one thread, and no more workers than threads",
                remedy="Correct them or leave them out.",
            )
        threads = all_threads // (workers or 1)
        self.cache_specs = cache_specs(dimensions)
        self.beam_cache_specs = cache_specs(dimensions, shared_sources=True)
        self.step_signature = step_signature(dimensions, features)
        self.encoder_signature = encoder_signature(dimensions)
        machine = _Machine(threads, spin, device)
        self._encoder = _session(folder / ENCODER_FILE, machine)
        self._step = _session(folder / STEP_FILE, machine)
        _check_contract(self._encoder, self.encoder_signature, ENCODER_FILE)
        _check_contract(self._step, self.step_signature, STEP_FILE)
        self.query_tokens = (folder / CHUNK_FILE).is_file()
        self._chunk_signature = step_signature(dimensions, CHUNK_FEATURES)
        self._chunk_session_of = folder / CHUNK_FILE, machine
        self._chunk_lock = threading.Lock()
        self._chunk: ort.InferenceSession | None = None

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, H, S, D] by the cache's names."""
        outputs = self.run_encoder({"input_ids": input_ids, "source_lengths": source_lengths})
        return {past: outputs[present] for present, past in self.encoder_signature.presents.items()}

    def bind(self, cache: KVCache) -> Step:
        """The step with the cache's buffers as its inputs and outputs."""
        one = BoundStep(self._step, self.step_signature, cache)

        def step(input_ids: IntArray) -> StepOutput:
            return one(input_ids) if input_ids.ndim == 1 else several(input_ids)

        def several(input_ids: IntArray) -> StepOutput:
            chunk = {"input_ids": input_ids, "past_lengths": cache.lengths, "source_lengths": cache.source_lengths}
            return _run_chunk(self._chunk_session(), self._chunk_signature, cache, chunk)

        return step

    def _chunk_session(self) -> ort.InferenceSession:
        """The graph for several tokens, loaded when it is first needed: most services never score."""
        with self._chunk_lock:
            if self._chunk is None:
                self._chunk = _session(*self._chunk_session_of)
                _check_contract(self._chunk, self._chunk_signature, CHUNK_FILE)
            return self._chunk

    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder graph as it is: its inputs by name → its outputs by name."""
        return _run(self._encoder, self.encoder_signature, feeds)

    def run_step(self, feeds: Tensors) -> Tensors:
        """The step graph out of place: its inputs by name → its outputs by name; the inputs stay as they are."""
        return _run(self._step, self.step_signature, feeds)


class BoundStep:
    """A step whose inputs and outputs are bound once per row count, `present` onto the buffers of `past`."""

    def __init__(self, session: ort.InferenceSession, signature: Signature, cache: KVCache) -> None:
        self._session = session
        self._cache = cache
        self._signature = signature
        self._bindings: dict[int, ort.IOBinding] = {}
        self._allocate()

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n] for the n active rows → logits [n, V], valid until the next step."""
        n = self._cache.active
        if self._generation != self._cache.generation:
            self._allocate()
        self._input_ids[:n] = input_ids
        self._session.run_with_iobinding(self._binding(n))
        next_ids = self._outputs.get("next_ids")
        return StepOutput(self._outputs["logits"][:n], None if next_ids is None else next_ids[:n])

    def _binding(self, n: int) -> ort.IOBinding:
        if n not in self._bindings:
            self._bindings[n] = self._bind(n)
        return self._bindings[n]

    def _allocate(self) -> None:
        """Buffers for what is not in the cache, for as many rows as the cache has; earlier bindings are void."""
        sizes, presents = self._cache.capacity.sizes, self._signature.presents
        self._generation = self._cache.generation
        self._bindings.clear()
        self._input_ids = np.zeros(sizes["B"], np.int64)
        self._outputs = {
            spec.name: np.zeros(spec.shape(sizes), spec.dtype)
            for spec in self._signature.outputs
            if spec.name not in presents
        }

    def _bind(self, n: int) -> ort.IOBinding:
        cache = self._cache
        buffers: Tensors = {
            "input_ids": self._input_ids,
            "past_lengths": cache.lengths,
            "source_lengths": cache.source_lengths,
            **cache.buffers,
            **self._outputs,
        }
        return _bind(self._session, self._signature, buffers, n)


def _run_chunk(session: ort.InferenceSession, signature: Signature, cache: KVCache, tokens: Tensors) -> StepOutput:
    """Several tokens of each active row, bound for this one run, whose logits [n, Q, V] nothing else will reuse."""
    n, query = tokens["input_ids"].shape
    vocabulary = signature.outputs[0].shape({"B": n, "Q": query})
    logits = np.empty(vocabulary, np.float32)
    ids = np.ascontiguousarray(tokens["input_ids"])
    session.run_with_iobinding(
        _bind(session, signature, {**tokens, "input_ids": ids, "logits": logits, **cache.buffers}, n)
    )
    return StepOutput(logits)


def _bind(session: ort.InferenceSession, signature: Signature, buffers: Tensors, n: int) -> ort.IOBinding:
    """Binds the leading n rows of the buffers, `present` onto those of `past`.

    The leading rows of a C-ordered array are contiguous: the values share its memory.
    """
    values = {name: ort.OrtValue.ortvalue_from_numpy(buffer[:n]) for name, buffer in buffers.items()}
    binding, presents = session.io_binding(), signature.presents
    for spec in signature.inputs:
        binding.bind_ortvalue_input(spec.name, values[spec.name])
    for spec in signature.outputs:
        binding.bind_ortvalue_output(spec.name, values[presents.get(spec.name, spec.name)])
    return binding


class _Machine(NamedTuple):
    """What a session runs on."""

    threads: int
    spin: bool
    device: str


def _options(machine: _Machine) -> ort.SessionOptions:
    """Spinning ends with each run: threads that spin on, of another session too, take the cores from those that work.
    Where products of bytes would saturate, weights are made unsigned as they are loaded: slower, with equal results.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = machine.threads
    options.log_severity_level = ERRORS_ONLY_AS_EXCEPTIONS
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(machine.spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(bytes_saturate())))
    return options


def _session(path: Path, machine: _Machine) -> ort.InferenceSession:
    options = _options(machine)
    wanted, providers = _providers(machine.device)
    if wanted != CPU:
        ort.set_default_logger_severity(ERRORS_ONLY_AS_EXCEPTIONS)  # a provider that fails to load is logged there
    try:
        session = ort.InferenceSession(path, options, providers=providers, disabled_optimizers=SLOWER_FUSIONS)
    except Exception as error:  # ONNX Runtime raises a type of its own for each status
        raise BundleError(
            f"{path.name} that ONNX Runtime cannot load ({str(error).strip().splitlines()[0][:300]})",
            expected="a graph written by kvx export",
            remedy="Export the bundle again.",
        ) from None
    finally:
        if wanted != CPU:
            ort.set_default_logger_severity(WARNINGS)
    got = session.get_providers()[0]
    if got != wanted:
        raise DeviceError(
            f"a session on {got.removesuffix('ExecutionProvider')}",
            expected=f"device {machine.device}",
            remedy="Check the driver and the CUDA libraries (onnxruntime.preload_dlls), or use --device cpu.",
        )
    return session


def _providers(device: str) -> tuple[str, list[Any]]:
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return CPU, [CPU]
    if kind == "cuda" and (not index or index.isdecimal()):
        cuda = "CUDAExecutionProvider"
        if cuda in ort.get_available_providers():
            return cuda, [(cuda, {"device_id": int(index or 0)}), CPU]
        return cuda, [CPU]
    raise DeviceError(f"device {device!r}", expected="cpu, cuda or cuda:<index>", remedy="Correct the device.")


def _check_contract(session: ort.InferenceSession, signature: Signature, file: str) -> None:
    """Names, element types and fixed axes of the graph must be the contract's."""
    for side, got, expected in (
        ("inputs", session.get_inputs(), signature.inputs),
        ("outputs", session.get_outputs(), signature.outputs),
    ):
        described = tuple(
            TensorSpec(node.name, ELEMENT_TYPES.get(node.type, node.type), tuple(node.shape)) for node in got
        )
        if len(described) != len(expected) or not all(map(_agrees, described, expected)):
            raise BundleError(
                f"{file} with the {side} {[f'{spec.name} {list(spec.axes)}' for spec in described]}",
                expected=f"{[f'{spec.name} {list(spec.axes)}' for spec in expected]}",
                remedy="Export the bundle again with this version of kvx.",
            )


def _agrees(got: TensorSpec, expected: TensorSpec) -> bool:
    """Fixed axes must be equal; a free axis may be called anything but must be free."""
    return (
        got.name == expected.name
        and got.dtype == expected.dtype
        and len(got.axes) == len(expected.axes)
        and all(
            have == want if isinstance(want, int) else not isinstance(have, int)
            for have, want in zip(got.axes, expected.axes, strict=True)
        )
    )


def _run(session: ort.InferenceSession, signature: Signature, feeds: Tensors) -> Tensors:
    names = [spec.name for spec in signature.outputs]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
