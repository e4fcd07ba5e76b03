"""The bundle's ONNX graphs on ONNX Runtime, the cache bound in place."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from kvx.runtime import kernels
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.backends.device import HOST, Device
from kvx.runtime.backends.device_rows import DeviceRows, IdleRows
from kvx.runtime.backends.graphs import THREADS, GraphBackend
from kvx.runtime.backends.ort import ort
from kvx.runtime.backends.sessions import Bound, Graph, SessionSettings, reason
from kvx.runtime.bundle.files import Files, files_of
from kvx.runtime.bundle.graphs import OWN_ENCODER_FILE, OWN_STEP_FILE
from kvx.runtime.bundle.manifest import BEAMS_FILE, CHUNK_FILE, GRAPH_FILES, LOOP_FILE, PROJECTION_FILE, SHORTLIST_FILE
from kvx.runtime.bundle.signature import (
    CHUNK_FEATURES,
    Dimensions,
    Signature,
    StepFeatures,
    cache_specs,
    step_signature,
)
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.errors import BundleError, DeviceError
from kvx.runtime.rules import Problem, refuse, wrong_value
from kvx.runtime.system import available_threads, bytes_saturate

ENCODER_FILE, STEP_FILE = GRAPH_FILES["onnx"]

_log = logging.getLogger("kvx")


class OnnxBackend(GraphBackend):
    """The sessions over one bundle's weights; every decode has buffers and bindings of its own.

    `files` are the bundle's, or all of a folder that has no manifest yet.

    `threads` compute threads (default: the cores this process may use), all in each operator, or shared out to
    `workers` where their number is given; `spin` lets them wait busily within a run, never between runs; without
    `capture` the steps of a loop on a device are launched one by one; without `own` kvx's own operators stay out where
    the bundle and this machine have them; `product_bits` are those of the manifest. Raises OptionError, BundleError
    where a graph is not the contract's, DeviceError where the session runs elsewhere than asked.
    """

    name = "onnx"

    def __init__(
        self,
        files: Files | Path,
        dimensions: Dimensions,
        features: StepFeatures,
        *,
        threads: int | None = None,
        workers: int | None = None,
        spin: bool = False,
        device: Device = HOST,
        capture: bool = True,
        own: bool = True,
        product_bits: int | None = None,
    ) -> None:
        super().__init__(dimensions, features)
        _check_element(dimensions.element, device)
        on_host = device.kind == "cpu"
        each, decodes = _shared_threads(threads, workers)
        self.decodes = decodes if on_host or workers is not None else 1  # a device is shared by the rows of one decode
        held, library = files_of(files), kernels.library() if own and on_host else None
        self.instructions = kernels.instructions() if library is not None and OWN_STEP_FILE in held else None
        self._settings = SessionSettings(
            each,
            spin,
            device,
            tf32=dimensions.element != "float32",
            widened=product_bits in (None, 8) and bytes_saturate(),
            own=None if self.instructions is None else library,
        )
        _log.info("kvx's own operators: %s", self.instructions or "none")
        self._open(held, dimensions)
        bits = None if self.instructions is None else features.cache_bits
        self.query_tokens = self._chunk.exists and bits is None  # it knows no codes
        self.cache_specs = cache_specs(dimensions, cache_bits=bits)
        self.beam_cache_specs = cache_specs(dimensions, shared_sources=self._beams.exists, cache_bits=bits)
        self.loops = self._loop.exists and not on_host
        self._capture = capture and not on_host
        self._idle_rows = IdleRows(self._new_rows, device)
        self._loop_lock = threading.Lock()
        for graph in (self._encoder, self._step):
            graph.load()

    def _open(self, files: Files, dimensions: Dimensions) -> None:
        """The graphs, of which the bundle may lack all but the first two."""

        def step(file: str, features: StepFeatures, *, captured: bool = False) -> Graph:
            return Graph(files, file, step_signature(dimensions, features), self._settings, captured=captured)

        own = self.instructions is not None
        encoder = OWN_ENCODER_FILE if own and OWN_ENCODER_FILE in files else ENCODER_FILE
        self._encoder = Graph(files, encoder, self.encoder_signature, self._settings)
        self._beams = step(OWN_STEP_FILE, self.features.own) if own else step(BEAMS_FILE, self.features.beams)
        self._step = self._beams if own else step(STEP_FILE, self.features.step)
        self.step_signature = self._step.signature
        self._chunk = step(CHUNK_FILE, CHUNK_FEATURES)
        self._loop = step(LOOP_FILE, self.features.loop, captured=True)
        shortlist = step(SHORTLIST_FILE, self.features.shortlisted)
        self.shortlisting = OnnxShortlisting(shortlist, dimensions, files) if shortlist.exists else None

    def bind(self, cache: KVCache) -> Step:
        """The step for one token of each row, input_ids [n], with the cache's buffers as its inputs and outputs: the
        graph for several rows a sentence where they share its source.
        """
        return BoundStep(self._beams if cache.shared_sources else self._step, cache)

    def bind_chunk(self, cache: KVCache) -> Step:
        """The step for several tokens of a row, input_ids [n, Q] → logits [n, Q, V], where `query_tokens` is true."""
        return BoundChunk(self._chunk, cache)

    def loop_rows(self, capacity: Capacity) -> AbstractContextManager[DeviceRows]:
        """Idle rows of this capacity, for one decode. Raises CapacityError where the device cannot hold them."""
        return self._idle_rows.taken(capacity, self.loop_bytes(capacity))

    def loop_bytes(self, capacity: Capacity) -> int:
        """Bytes of the buffers at this capacity."""
        return capacity.bytes(self._loop.signature.inputs)

    def _new_rows(self, capacity: Capacity) -> DeviceRows:
        return DeviceRows(self._encoder, self._loop, capacity, capture=self._capture, lock=self._loop_lock)

    def load(self, *, kept: bool = True) -> None:
        """Loads what is otherwise loaded when it is first needed, or, unless `kept`, only sees that each can be loaded.
        Raises BundleError.
        """
        for graph in self._on_demand():
            graph.load()
            if not kept:
                graph.unload()

    def release(self) -> None:
        """Gives up all graphs but the encoder and the step. They are loaded again when they are needed."""
        for graph in self._on_demand():
            graph.unload()

    def _on_demand(self) -> Iterator[Graph | OnnxShortlisting]:
        """What the bundle has beside the encoder and the step."""
        graphs = (self._chunk, self._beams, self._loop)
        yield from (graph for graph in graphs if graph.exists and graph is not self._step)
        if self.shortlisting is not None:
            yield self.shortlisting

    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder graph as it is: its inputs by name → its outputs by name."""
        return self._encoder.run(feeds)

    def run_step(self, feeds: Tensors) -> Tensors:
        """The step graph out of place: its inputs by name → its outputs by name; the inputs stay as they are."""
        return self._step.run(feeds)


def loop_session(file: Path, signature: Signature) -> ort.InferenceSession:
    """What would run a looped step on the host, with all of a backend's settings but its device. Raises BundleError."""
    settings = SessionSettings(
        available_threads(), spin=False, device=HOST, tf32=False, widened=bytes_saturate(), own=None
    )
    return Graph(Files(file.parent), file.name, signature, settings, captured=True).session()


class BoundStep:
    """A step whose inputs and outputs are bound once per row count, `present` onto the buffers of `past`."""

    def __init__(self, graph: Graph, cache: KVCache) -> None:
        graph.begin()
        self._graph = graph
        self._cache = cache
        self._bindings: dict[int, Bound] = {}
        self._allocate()

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n] for the n active rows → logits [n, V] and what else the graph gives, valid until the next
        step.
        """
        n = self._cache.active
        if self._generation != self._cache.generation:
            self._allocate()
        self._input_ids[:n] = input_ids
        self._graph.run_bound(self._binding(n))
        return StepOutput(**{name: output[:n] for name, output in self._outputs.items()})

    def _binding(self, n: int) -> Bound:
        if n not in self._bindings:
            tokens: Tensors = {"input_ids": self._input_ids, **self._outputs}
            self._bindings[n] = self._graph.bind(self._cache, tokens, n)
        return self._bindings[n]

    def _allocate(self) -> None:
        """Buffers for what is not in the cache, for as many rows as the cache has; earlier bindings are void."""
        sizes = self._cache.capacity.sizes
        self._generation = self._cache.generation
        self._bindings.clear()
        self._input_ids = np.zeros(sizes["B"], np.int64)
        self._outputs = {spec.name: np.zeros(spec.shape(sizes), spec.dtype) for spec in self._graph.fresh}


class BoundChunk:
    """A step for several tokens of each row, which is bound for every run: their number differs from run to run."""

    def __init__(self, graph: Graph, cache: KVCache) -> None:
        graph.begin()
        self._graph = graph
        self._cache = cache

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n, Q] for the n active rows → logits [n, Q, V], which nothing else reuses."""
        n, query = input_ids.shape
        outputs = {spec.name: np.empty(spec.shape({"B": n, "Q": query}), spec.dtype) for spec in self._graph.fresh}
        tokens: Tensors = {"input_ids": np.ascontiguousarray(input_ids), **outputs}
        self._graph.run_bound(self._graph.bind(self._cache, tokens, n))
        return StepOutput(**outputs)


class OnnxShortlisting:
    """The graph for a part of the vocabulary, and the output projection beside it, mapped when it is first needed."""

    def __init__(self, graph: Graph, dimensions: Dimensions, files: Files) -> None:
        self.cache_specs = cache_specs(dimensions, shared_sources=True)
        self._graph = graph
        self._shape = dimensions.vocab_size, dimensions.projection
        self._files = files

    @functools.cached_property
    def projection(self) -> FloatArray:
        """The rows of the whole output projection [V, E], mapped. Raises BundleError."""
        if PROJECTION_FILE not in self._files:
            raise _no_projection("is not in the manifest", self._shape)
        self._files.check([PROJECTION_FILE])
        try:
            array = np.load(self._files.folder / PROJECTION_FILE, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, and raises what that raises
            raise _no_projection(f"cannot be read ({reason(error)})", self._shape) from None
        found = array.dtype, array.shape, array.flags.c_contiguous
        if found != (np.float32, self._shape, True):
            raise _no_projection(f"holds {array.dtype} {list(array.shape)}", self._shape)
        rows: FloatArray = array
        return rows

    def bind(self, cache: KVCache) -> BoundShortlistStep:
        """The step with the cache's buffers as its inputs and outputs."""
        self._files.check_open([PROJECTION_FILE])
        return BoundShortlistStep(self._graph, cache)

    def load(self) -> None:
        """Loads what is otherwise loaded when it is first needed. Raises BundleError."""
        self._graph.load()
        _ = self.projection

    def unload(self) -> None:
        """Gives up the graph until it is needed again."""
        self._graph.unload()


class BoundShortlistStep:
    """A step that is bound anew whenever the number of rows, the cache's buffers or the projection change."""

    def __init__(self, graph: Graph, cache: KVCache) -> None:
        graph.begin()
        self._graph = graph
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
        self._graph.run_bound(self._binding)
        return StepOutput(**self._outputs)

    def _bind(self, n: int, projection: FloatArray) -> None:
        """The logits have a buffer that only grows: it is as large as all other outputs together, and rebound often."""
        size = n * len(projection)
        if size > self._logits.size:
            self._logits = np.empty(size, np.float32)
        sizes = {"B": n, "C": len(projection), "S": self._cache.capacity.source}
        others = (spec for spec in self._graph.fresh if spec.name != "logits")
        self._outputs = {spec.name: np.empty(spec.shape(sizes), spec.dtype) for spec in others}
        self._outputs["logits"] = self._logits[:size].reshape(n, -1)
        self._tokens: Tensors = {"input_ids": np.empty(n, np.int64), "projection": projection, **self._outputs}
        self._binding = self._graph.bind(self._cache, self._tokens, n)


def _shared_threads(threads: int | None, workers: int | None) -> tuple[int, int]:
    """The threads of each operator, and how many decodes side by side share all of them. Raises OptionError."""
    given = {name: value for name, value in (("threads", threads), ("workers", workers)) if value is not None}
    refuse(problem for name, value in given.items() for problem in wrong_value(name, value, THREADS))
    available = available_threads() if threads is None else threads
    if workers is None:
        return available, 1
    if workers > available:
        got = f"`workers` is {workers} and there are {available} threads"
        refuse([Problem("workers", got, "no more `workers` than `threads`")])
    return available // workers, workers


def _check_element(element: str, device: Device) -> None:
    if element == "bfloat16" and device.kind == "cpu":
        raise DeviceError(
            "ONNX Runtime cannot run a bfloat16 bundle on cpu",
            expected="the device cuda, for which it has kernels",
            remedy="Use `device` cuda, or export the checkpoint with another `precision`.",
            option="device",
        )


def _no_projection(how: str, shape: tuple[int, int]) -> BundleError:
    return BundleError(
        f"{PROJECTION_FILE} {how}",
        expected=f"float32 {list(shape)}, as an export with a shortlist writes it",
        remedy="Copy the bundle again, or export it anew.",
    )
