"""The bundle's ONNX graphs on ONNX Runtime, the cache bound in place."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.backends.device import HOST, Device, missing_library, not_to_be_had
from kvx.runtime.backends.device_rows import DeviceRows, IdleRows
from kvx.runtime.bundle.manifest import BEAMS_FILE, CHUNK_FILE, GRAPH_FILES, LOOP_FILE, PROJECTION_FILE, SHORTLIST_FILE
from kvx.runtime.bundle.signature import (
    CHUNK_FEATURES,
    LOOP_FEATURES,
    Axis,
    Dimensions,
    Signature,
    StepFeatures,
    TensorSpec,
    cache_specs,
    encoder_signature,
    step_signature,
)
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.errors import BundleError, DeviceError, OptionError
from kvx.runtime.system import available_threads, bytes_saturate

ENCODER_FILE, STEP_FILE = GRAPH_FILES["onnx"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_LIBRARY = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
ERRORS_ONLY_AS_EXCEPTIONS = 4
SLOWER_FUSIONS = ["SkipLayerNormFusion"]  # 0.3 ms instead of 0.05 for 256 tokens of 256 channels on a CPU
_looking, _looked = threading.Lock(), list[str | None]()  # once for the process

ELEMENT_TYPES = {
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}


class OnnxBackend:
    """The sessions over one bundle's weights; every decode has buffers and bindings of its own.

    `threads` compute threads (default: the cores this process may use), all in each operator, or shared out to
    `workers` where their number is given; `spin` lets them wait busily within a run, never between runs; without
    `capture` the steps of a loop on a device are launched one by one. Raises BundleError where a graph is not the
    contract's, DeviceError where the session runs elsewhere than asked.
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
        device: Device = HOST,
        capture: bool = True,
    ) -> None:
        all_threads = available_threads() if threads is None else threads
        alone = all_threads if device.kind == "cpu" else 1  # a device is shared by the rows of one decode
        self.decodes = alone if workers is None else workers
        if not 1 <= self.decodes <= all_threads:
            raise OptionError(
                f"threads = {all_threads}, workers = {self.decodes}",
                expected="at least one thread, and no more workers than threads",
                remedy="Correct them or leave them out.",
            )
        threads = all_threads // (workers or 1)
        if dimensions.element == "bfloat16" and device.kind == "cpu":
            raise DeviceError(
                "bfloat16 on cpu",
                expected="cuda, where ONNX Runtime has kernels for it",
                remedy="Use --device cuda, or export with another --precision.",
            )
        machine = _Machine(threads, spin, device, tf32=dimensions.element != "float32")
        self._encoder = _Graph(folder / ENCODER_FILE, encoder_signature(dimensions), machine)
        self._step = _Graph(folder / STEP_FILE, step_signature(dimensions, features), machine)
        self._chunk = _Graph(folder / CHUNK_FILE, step_signature(dimensions, CHUNK_FEATURES), machine)
        self._beams = _Graph(folder / BEAMS_FILE, step_signature(dimensions, features.beams), machine)
        shortlist = _Graph(folder / SHORTLIST_FILE, step_signature(dimensions, features.shortlisted), machine)
        self.shortlisting = OnnxShortlisting(shortlist, dimensions, folder) if shortlist.exists else None
        self._loop = _Graph(folder / LOOP_FILE, step_signature(dimensions, LOOP_FEATURES), machine, captured=True)
        self.loops = self._loop.exists and device.kind != "cpu"
        self._capture = capture and device.kind != "cpu"
        self._idle_rows = IdleRows(self._new_rows, device)
        self._loop_lock = threading.Lock()
        self.features = features
        self.query_tokens = self._chunk.exists
        self.cache_specs = cache_specs(dimensions)
        self.beam_cache_specs = cache_specs(dimensions, shared_sources=self._beams.exists)
        for graph in (self._encoder, self._step):
            graph.session()

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, H, S, D] by the cache's names."""
        outputs = self.run_encoder({"input_ids": input_ids, "source_lengths": source_lengths})
        return {past: outputs[present] for present, past in self._encoder.signature.presents.items()}

    def bind(self, cache: KVCache) -> Step:
        """The step with the cache's buffers as its inputs and outputs: that for several rows a sentence where they
        share its source, which takes one token of each.
        """
        if cache.shared_sources:
            return BoundStep(self._beams, cache)
        one = BoundStep(self._step, cache)

        def step(input_ids: IntArray) -> StepOutput:
            return one(input_ids) if input_ids.ndim == 1 else _run_chunk(self._chunk, cache, input_ids)

        return step

    def bind_chunk(self, cache: KVCache) -> Step:
        """The step for several tokens of a row, input_ids [n, Q] → logits [n, Q, V]."""
        return lambda input_ids: _run_chunk(self._chunk, cache, input_ids)

    def loop_rows(self, capacity: Capacity) -> AbstractContextManager[DeviceRows]:
        """Idle rows of this capacity, for one decode. Raises CapacityError where the device cannot hold them."""
        return self._idle_rows.taken(capacity, self.loop_bytes(capacity))

    def loop_bytes(self, capacity: Capacity) -> int:
        """Bytes of the buffers at this capacity."""
        return capacity.bytes(self._loop.signature.inputs)

    def _new_rows(self, capacity: Capacity) -> DeviceRows:
        encoder, loop = self._encoder, self._loop
        graphs = encoder.session(), encoder.signature, loop.session(), loop.signature
        device = loop.machine.device
        return DeviceRows(*graphs, capacity, device, capture=self._capture, lock=self._loop_lock)

    def load(self) -> None:
        """Loads what is otherwise loaded when it is first needed. Raises BundleError."""
        for graph in (self._chunk, self._beams, self._loop):
            if graph.exists:
                graph.session()
        if self.shortlisting is not None:
            self.shortlisting.load()

    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder graph as it is: its inputs by name → its outputs by name."""
        return self._encoder.run(feeds)

    def run_step(self, feeds: Tensors) -> Tensors:
        """The step graph out of place: its inputs by name → its outputs by name; the inputs stay as they are."""
        return self._step.run(feeds)


def loop_session(file: Path, dimensions: Dimensions) -> ort.InferenceSession:
    """What would run a looped step on the host, with all of a backend's settings but its device. Raises BundleError."""
    machine = _Machine(available_threads(), spin=False, device=HOST, tf32=False)
    return _Graph(file, step_signature(dimensions, LOOP_FEATURES), machine, captured=True).session()


class BoundStep:
    """A step whose inputs and outputs are bound once per row count, `present` onto the buffers of `past`."""

    def __init__(self, graph: _Graph, cache: KVCache) -> None:
        self._session = graph.session()
        self._cache = cache
        self._signature = graph.signature
        self._bindings: dict[int, ort.IOBinding] = {}
        self._allocate()

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n] for the n active rows → logits [n, V] and what else the graph gives, valid until the next
        step.
        """
        n = self._cache.active
        if self._generation != self._cache.generation:
            self._allocate()
        self._input_ids[:n] = input_ids
        self._session.run_with_iobinding(self._binding(n))
        return StepOutput(**{name: output[:n] for name, output in self._outputs.items()})

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
        tokens: Tensors = {"input_ids": self._input_ids, **self._outputs}
        return _bind(self._session, self._signature, self._cache, tokens, n)


class OnnxShortlisting:
    """The graph for a part of the vocabulary, and the output projection beside it, mapped when it is first needed."""

    def __init__(self, graph: _Graph, dimensions: Dimensions, folder: Path) -> None:
        self.cache_specs = cache_specs(dimensions, shared_sources=True)
        self._graph = graph
        self._shape = dimensions.vocab_size, dimensions.heads * dimensions.head_width
        self._path = folder / PROJECTION_FILE

    @functools.cached_property
    def projection(self) -> FloatArray:
        """The rows of the whole output projection [V, E], mapped. Raises BundleError."""
        try:
            array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _no_projection(f"cannot be read ({error})", self._shape) from None
        found = array.dtype, array.shape, array.flags.c_contiguous
        if found != (np.float32, self._shape, True):
            raise _no_projection(f"holds {array.dtype} {list(array.shape)}", self._shape)
        rows: FloatArray = array
        return rows

    def bind(self, cache: KVCache) -> BoundShortlistStep:
        """The step with the cache's buffers as its inputs and outputs."""
        return BoundShortlistStep(self._graph, cache)

    def load(self) -> None:
        """Loads what is otherwise loaded when it is first needed. Raises BundleError."""
        self._graph.session()
        _ = self.projection


class BoundShortlistStep:
    """A step that is bound anew whenever its rows, the cache's buffers or the projection are others."""

    def __init__(self, graph: _Graph, cache: KVCache) -> None:
        self._session = graph.session()
        self._signature = graph.signature
        self._cache = cache
        self._bound: tuple[int, int, FloatArray] | None = None
        self._logits = np.empty(0, np.float32)

    def __call__(self, input_ids: IntArray, projection: FloatArray) -> StepOutput:
        """input_ids [n], projection [C, E] → logits [n, C], valid until the next step."""
        n, generation = self._cache.active, self._cache.generation
        if self._bound is None or self._bound[:2] != (n, generation) or self._bound[2] is not projection:
            self._bind(n, projection)
            self._bound = n, generation, projection
        self._tokens["input_ids"][...] = input_ids
        self._session.run_with_iobinding(self._binding)
        return StepOutput(**self._outputs)

    def _bind(self, n: int, projection: FloatArray) -> None:
        size = n * len(projection)
        if size > self._logits.size:
            self._logits = np.empty(size, np.float32)
        sizes = {"B": n, "C": len(projection), "S": self._cache.capacity.source}
        presents = self._signature.presents
        self._outputs = {
            spec.name: np.empty(spec.shape(sizes), spec.dtype)
            for spec in self._signature.outputs
            if spec.name not in (*presents, "logits")
        }
        self._outputs["logits"] = self._logits[:size].reshape(n, -1)
        self._tokens: Tensors = {
            "input_ids": np.empty(n, np.int64),
            "projection": projection,
            **self._outputs,
        }
        self._binding = _bind(self._session, self._signature, self._cache, self._tokens, n)


def _no_projection(how: str, shape: tuple[int, int]) -> BundleError:
    return BundleError(
        f"{PROJECTION_FILE}, which {how}",
        expected=f"float32 {list(shape)}, as kvx export --with-shortlist writes it",
        remedy="Copy the bundle again, or export it anew.",
    )


def _run_chunk(graph: _Graph, cache: KVCache, input_ids: IntArray) -> StepOutput:
    """Several tokens of each active row [n, Q], bound for this one run, whose logits [n, Q, V] nothing else reuses."""
    session, signature = graph.session(), graph.signature
    n, query = input_ids.shape
    logits = np.empty(signature.outputs[0].shape({"B": n, "Q": query}), np.float32)
    tokens: Tensors = {"input_ids": np.ascontiguousarray(input_ids), "logits": logits}
    session.run_with_iobinding(_bind(session, signature, cache, tokens, n))
    return StepOutput(logits)


def _bind(
    session: ort.InferenceSession, signature: Signature, cache: KVCache, tokens: Tensors, n: int
) -> ort.IOBinding:
    """Binds the leading n rows, and their sentences, of the cache and of the other tensors, `present` onto `past`.

    The leading rows of a C-ordered array are contiguous: the values share its memory.
    """
    lengths = {"past_lengths": cache.lengths, "source_lengths": cache.source_lengths}
    buffers: Tensors = {**tokens, **lengths, **cache.buffers}
    leading: dict[Axis, int | None] = {"B": n, "G": n // cache.capacity.beams, "C": None}
    axes = {spec.name: spec.axes[0] for spec in (*signature.inputs, *signature.outputs)}
    values = {name: ort.OrtValue.ortvalue_from_numpy(buffers[name][: leading[axes[name]]]) for name in buffers}
    binding, presents = session.io_binding(), signature.presents
    for spec in signature.inputs:
        binding.bind_ortvalue_input(spec.name, values[spec.name])
    for spec in signature.outputs:
        binding.bind_ortvalue_output(spec.name, values[presents.get(spec.name, spec.name)])
    return binding


class _Graph:
    """One file of the bundle and what it takes and gives. Its session is made, once, when it is first needed: most
    services never score, or never have several rows a sentence.
    """

    def __init__(self, path: Path, signature: Signature, machine: _Machine, *, captured: bool = False) -> None:
        self.signature = signature
        self.exists = path.is_file()
        self.machine = machine
        self._path = path
        self._captured = captured
        self._lock = threading.Lock()
        self._session: ort.InferenceSession | None = None

    def session(self) -> ort.InferenceSession:
        """What runs it. Raises BundleError where it cannot be loaded or is not the contract's."""
        with self._lock:
            if self._session is None:
                session = _session(self._path, self.machine, captured=self._captured)
                _check_contract(session, self.signature, self._path.name)
                self._session = session
            return self._session

    def run(self, feeds: Tensors) -> Tensors:
        """Inputs by name → outputs by name, out of place."""
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self.session().run(names, dict(feeds)), strict=True))


class _Machine(NamedTuple):
    """What a session runs on, and whether products of float32 may round their factors to 11 bits, as TF32 does."""

    threads: int
    spin: bool
    device: Device
    tf32: bool


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


def _session(path: Path, machine: _Machine, *, captured: bool) -> ort.InferenceSession:
    options = _options(machine)
    wanted, providers = _providers(machine, captured=captured)
    if wanted != CPU and (lacks := cuda_lacks()) is not None:
        raise not_to_be_had(machine.device, "an ONNX Runtime that cannot load it", lacks)
    try:
        session = ort.InferenceSession(path, options, providers=providers, disabled_optimizers=SLOWER_FUSIONS)
    except Exception as error:  # ONNX Runtime raises a type of its own for each status
        raise BundleError(
            f"{path.name} that ONNX Runtime cannot load ({str(error).strip().splitlines()[0][:300]})",
            expected="a graph written by kvx export",
            remedy="Export the bundle again.",
        ) from None
    got = session.get_providers()[0]
    if got != wanted:
        raise not_to_be_had(machine.device, f"a session on {got.removesuffix('ExecutionProvider')}", cuda_lacks())
    return session


def _providers(machine: _Machine, *, captured: bool) -> tuple[str, list[Any]]:
    """Float32 bundles promise the translations of float32, so TF32, ONNX Runtime's default, is not for them; with 16
    bits it rounds nothing that is not rounded anyway.
    """
    device = machine.device
    if device.kind == "cpu":
        return CPU, [CPU]
    if CUDA not in ort.get_available_providers():
        return CUDA, [CPU]
    options = {"device_id": device.index, "enable_cuda_graph": str(int(captured)), "use_tf32": str(int(machine.tf32))}
    return CUDA, [(CUDA, options), CPU]


def cuda_lacks() -> str | None:
    """What keeps ONNX Runtime's CUDA provider from being loaded, or None. The libraries that pip has installed are
    found first; what is missing is said in our own words, not by what is printed or logged meanwhile.
    """
    with _looking, contextlib.redirect_stdout(io.StringIO()):
        if not _looked:
            ort.preload_dlls()
            _looked.append(missing_library(CUDA_LIBRARY))
    return _looked[0]


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
