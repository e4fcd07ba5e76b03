"""Sessions of ONNX Runtime: how they are set up, loaded when they are needed, checked against the contract and run."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from kvx.runtime.arrays import Tensors
from kvx.runtime.backends.device import CUDA_EXTRA, HOST, Device, missing_library, unavailable
from kvx.runtime.backends.graphs import check_outputs, sizes_of
from kvx.runtime.backends.ort import ort
from kvx.runtime.bundle.external import external_files
from kvx.runtime.bundle.files import Files
from kvx.runtime.bundle.signature import Axis, Signature, TensorSpec
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.errors import (
    REMEDIES,
    BundleError,
    CapacityError,
    DeviceError,
    KvxError,
    is_out_of_threads,
    out_of_threads,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_LIBRARY = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
ERRORS_ONLY_AS_EXCEPTIONS = 4
SLOWER_FUSIONS = ["SkipLayerNormFusion"]  # 0.3 ms instead of 0.05 for 256 tokens of 256 channels on a CPU
NO_SURPRISES: dict[str, Any] = {  # a fallback goes to the CPU, and says so on standard output
    "disabled_optimizers": SLOWER_FUSIONS,
    "enable_fallback": 0,
}
OUT_OF_MEMORY = ("failed to allocate", "out of memory", "bad_alloc", "bad allocation", "cudnn_status_alloc_failed")
LONGEST_REASON = 300
ELEMENT_TYPES = {
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}

Values = Mapping[str, ort.OrtValue]

_log = logging.getLogger("kvx")
_registering = threading.Lock()
_looking, _looked = threading.Lock(), list[str | None]()  # once for the process


class SessionSettings(NamedTuple):
    """How a session runs: its compute threads, whether they spin, its device, whether products of float32 may round
    their factors to 11 bits, as TF32 does, whether signed weights of 8 bits are made unsigned as they are loaded, since
    their products would saturate, and the library of kvx's own operators where it may have them.
    """

    threads: int
    spin: bool
    device: Device
    tf32: bool
    widened: bool
    own: Path | None


class Cause(NamedTuple):
    """Why a session cannot be made or run: the `signs` of it in what ONNX Runtime says, in small letters, and the error
    that it becomes.
    """

    signs: tuple[str, ...]
    kind: type[KvxError]
    expected: str
    remedy: str

    def error(self, got: str) -> KvxError:
        """The error whose first sentence is `got`."""
        return self.kind(got, expected=self.expected, remedy=self.remedy)


SHORT_OF_MEMORY = Cause(
    OUT_OF_MEMORY,
    CapacityError,
    "enough free memory",
    "Plan fewer `rows` or fewer `max_new_tokens`, or free memory of the device.",
)
CAUSES = (
    Cause(
        ("driver version is insufficient", "no cuda-capable device", "invalid device ordinal", "cuda failure 100"),
        DeviceError,
        "a GPU and a driver for CUDA 13 or newer",
        "Check nvidia-smi, or use `device` cpu.",
    ),
    Cause(
        ("cannot open shared object", "loadlibrary failed", "failed to load library"),
        DeviceError,
        "the libraries that ONNX Runtime links",
        f"Install them with pip install '{CUDA_EXTRA}', or use `device` cpu.",
    ),
    Cause(("errcode = 24", "too many open files"), CapacityError, "a free file descriptor", REMEDIES[errno.EMFILE]),
    Cause(("errcode = 13", "permission denied"), BundleError, "files that may be read", REMEDIES[errno.EACCES]),
)
OTHER_CAUSE = Cause(
    (), BundleError, "a graph that kvx export wrote", "Export the bundle again with this version of kvx."
)


class Graph:
    """One graph of the bundle and its signature. Its session is made once, when it is first needed: most services never
    score, or never have several rows a sentence.

    `fresh` are the outputs that are not written in place. `running` is the context for every run of its session: what
    ONNX Runtime raises there becomes an error of kvx.
    """

    def __init__(
        self, files: Files, file: str, signature: Signature, settings: SessionSettings, *, captured: bool = False
    ) -> None:
        self.signature = signature
        self.fresh = tuple(spec for spec in signature.outputs if spec.name not in signature.presents)
        self.settings = settings
        self.exists = file in files
        self.running = Failing(f"ONNX Runtime cannot run {file}")
        self._files = files
        self._file = file
        self._opened: tuple[str, ...] = ()
        self._captured = captured
        self._lock = threading.Lock()
        self._session: ort.InferenceSession | None = None

    def load(self) -> None:
        """Makes the session now. Raises BundleError where the graph cannot be loaded or is not the contract's."""
        self._loaded(logging.DEBUG)

    def unload(self) -> None:
        """Gives up the session. It is made again when it is next needed."""
        with self._lock:
            self._session = None

    def session(self) -> ort.InferenceSession:
        """What runs the graph. Raises BundleError where it cannot be loaded or is not the contract's."""
        return self._session or self._loaded(logging.INFO)

    def begin(self) -> ort.InferenceSession:
        """The session, for a use that begins now. Raises BundleError where it cannot be loaded, and where its files,
        from which weights are mapped, have been written over.
        """
        session = self.session()
        self._files.check_open(self._opened)
        return session

    def run(self, feeds: Tensors) -> Tensors:
        """Inputs by name → outputs by name, out of place."""
        session, names = self.begin(), [spec.name for spec in self.signature.outputs]
        with self.running:
            outputs = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        check_outputs(self._file, self.signature.outputs, sizes_of(self.signature, feeds), outputs)
        return outputs

    def bind(self, cache: KVCache, tokens: Tensors, n: int) -> Bound:
        """Binds the leading n rows, and their sentences, of the cache and of the other tensors, `present` onto `past`.

        The leading rows of a C-ordered array are contiguous: the values share its memory.
        """
        session, signature = self.session(), self.signature
        lengths = {"past_lengths": cache.lengths, "source_lengths": cache.source_lengths}
        buffers: Tensors = {**tokens, **lengths, **cache.buffers}
        leading: dict[Axis, int | None] = {"B": n, "G": n // cache.capacity.beams, "C": None}
        axes = {spec.name: spec.axes[0] for spec in (*signature.inputs, *signature.outputs)}
        with self.running:
            values = {name: ort.OrtValue.ortvalue_from_numpy(buffers[name][: leading[axes[name]]]) for name in buffers}
            binding, presents = session.io_binding(), signature.presents
            for spec in signature.outputs:
                binding.bind_ortvalue_output(spec.name, values[presents.get(spec.name, spec.name)])
            return Bound(session, binding, {spec.name: values[spec.name] for spec in signature.inputs}, self.settings)

    def run_bound(self, bound: Bound) -> None:
        """Runs over what is bound."""
        with self.running:
            bound.run()

    def _loaded(self, level: int) -> ort.InferenceSession:
        with self._lock:
            if self._session is None:
                started = time.perf_counter()
                path = self._files.folder / self._file
                self._files.check([self._file])
                opened = self._file, *_beside(self._files, path)
                self._files.check(opened)
                session = _session(path, self.settings, captured=self._captured)
                self._files.check(opened)
                _check_contract(session, self.signature, self._file)
                self._opened, self._session = opened, session
                _log.log(level, "loaded %s in %.2f s", path, time.perf_counter() - started)
            return self._session


class Bound:
    """A binding of a session to arrays on the host, which may be run any number of times.

    On the host the session reads the arrays themselves. A session on a device copies an input when it is bound, not
    when it is run: there the inputs are bound again for every run.
    """

    __slots__ = ("_binding", "_copied", "_session")

    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, inputs: Values, settings: SessionSettings
    ) -> None:
        self._session = session
        self._binding = binding
        self._copied = () if settings.device == HOST else tuple(inputs.items())
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)

    def run(self) -> None:
        """Over what the arrays hold now."""
        for name, value in self._copied:
            self._binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(self._binding)


def _beside(files: Files, path: Path) -> list[str]:
    """The files of external data that a graph names, all of which must be the bundle's. Raises BundleError."""
    with Failing(f"{path.name} cannot be read"):
        names = sorted(external_files(path))
    strangers = [name for name in names if name not in files]
    if strangers:
        raise BundleError(
            f"{path.name} keeps weights in {' and '.join(map(repr, strangers))}",
            expected="files that the manifest names",
            remedy="Do not use this bundle: it may have been tampered with.",
        )
    return names


class Failing:
    """A context in which an exception of ONNX Runtime becomes a CapacityError where memory or threads are short and
    else a BundleError. `got` is the sentence for what failed.
    """

    __slots__ = ("_got",)

    def __init__(self, got: str) -> None:
        self._got = got

    def __enter__(self) -> None:
        """Nothing is done beforehand: a step enters this context, too."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises the error of kvx."""
        if isinstance(error, Exception) and not isinstance(error, KvxError):
            raise _failure(f"{self._got} ({reason(error)})", error) from error


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:LONGEST_REASON]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory is short."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)


def _failure(got: str, error: Exception) -> KvxError:
    """The error for what ONNX Runtime says, by its cause."""
    if is_out_of_threads(error):
        return out_of_threads(got)
    if is_out_of_memory(error):
        return SHORT_OF_MEMORY.error(got)
    text = str(error).lower()
    known = (cause for cause in CAUSES if any(sign in text for sign in cause.signs))
    return next(known, OTHER_CAUSE).error(got)


def cuda_lacks() -> str | None:
    """What keeps ONNX Runtime's CUDA provider from being loaded, or None. The libraries that pip has installed are
    found first.
    """
    with _looking:
        if not _looked:
            _preload_libraries()
            _looked.append(missing_library(CUDA_LIBRARY))
    return _looked[0]


def _preload_libraries() -> None:
    """Without the words that ONNX Runtime prints where something is missing, which our errors say. The name `print` is
    another one in its module alone: standard output belongs to all threads of the process.
    """
    names = vars(ort)
    names["print"] = lambda *values, **options: None
    try:
        ort.preload_dlls()
    finally:
        del names["print"]


def _session(path: Path, settings: SessionSettings, *, captured: bool) -> ort.InferenceSession:
    wanted, providers = _providers(settings, captured=captured)
    if wanted != CPU and (lacks := cuda_lacks()) is not None:
        raise unavailable(settings.device, f"ONNX Runtime cannot run on {settings.device}", lacks)
    with Failing(f"ONNX Runtime cannot load {path.name}"):
        options = _options(settings)
        session = ort.InferenceSession(path, options, providers=providers, **NO_SURPRISES)
    got = session.get_providers()[0]
    if got != wanted:
        place = got.removesuffix("ExecutionProvider")
        raise unavailable(settings.device, f"ONNX Runtime made a session on {place} instead", cuda_lacks())
    return session


def _options(settings: SessionSettings) -> ort.SessionOptions:
    """Spinning ends with each run: threads that spin on, of another session too, take cores from those that work."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = ERRORS_ONLY_AS_EXCEPTIONS
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(settings.widened)))
    if settings.own is not None:
        with _registering:
            options.register_custom_ops_library(str(settings.own))
    return options


def _providers(settings: SessionSettings, *, captured: bool) -> tuple[str, list[Any]]:
    """Float32 bundles promise the translations of float32, so TF32, ONNX Runtime's default, is not for them; with 16
    bits it rounds nothing that is not rounded anyway.
    """
    device = settings.device
    if device.kind == "cpu":
        return CPU, [CPU]
    if CUDA not in ort.get_available_providers():
        return CUDA, [CPU]
    options = {"enable_cuda_graph": str(int(captured)), "use_tf32": str(int(settings.tf32))}
    if device.index:  # named, the first device too, it brings a warning about plugins for each session
        options["device_id"] = str(device.index)
    return CUDA, [(CUDA, options), CPU]


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
                f"{file} has the {side} {[f'{spec.name} {list(spec.axes)}' for spec in described]}",
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
