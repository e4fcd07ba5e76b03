"""The bundle's TorchScript modules. The only module of the runtime that imports torch; loaded on demand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.backends.graphs import THREADS, GraphBackend, check_outputs, sizes_of
from kvx.runtime.backends.torchscript_code import check_module
from kvx.runtime.bundle.files import Files, files_of
from kvx.runtime.bundle.manifest import GRAPH_FILES
from kvx.runtime.bundle.signature import Dimensions, Signature, StepFeatures
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.errors import BundleError, CapacityError
from kvx.runtime.rules import refuse, wrong_value

ENCODER_FILE, STEP_FILE = GRAPH_FILES["torchscript"]
LONGEST_REASON = 300


class TorchScriptBackend(GraphBackend):
    """Two traced modules on the CPU; a step writes straight into the cache's buffers, whose memory its tensors share.

    `threads` sets torch's compute threads, which are one setting of the whole process. Raises OptionError, and
    BundleError for a module that is not the contract's.
    """

    name = "torchscript"
    decodes = 1  # torch's compute threads are one pool, which a second decode would only fight for

    def __init__(
        self, files: Files | Path, dimensions: Dimensions, features: StepFeatures, *, threads: int | None = None
    ) -> None:
        super().__init__(dimensions, features)
        if threads is not None:
            refuse(wrong_value("threads", threads, THREADS))
            torch.set_num_threads(threads)
        files = files_of(files)
        self._encoder = _load(files.folder / ENCODER_FILE, self.encoder_signature)
        self._step = _load(files.folder / STEP_FILE, self.step_signature)
        files.check([ENCODER_FILE, STEP_FILE])

    def bind(self, cache: KVCache) -> Step:
        """The step for one token of each row, input_ids [n], over the cache's buffers."""
        names = [spec.name for spec in self.step_signature.inputs]
        given = [spec for spec in self.step_signature.outputs if spec.name not in self.step_signature.presents]

        def step(input_ids: IntArray) -> StepOutput:
            n = cache.active
            arrays = {
                "input_ids": input_ids,
                "past_lengths": cache.lengths[:n],
                "source_lengths": cache.source_lengths[:n],
            } | {name: buffer[:n] for name, buffer in cache.buffers.items()}
            with torch.inference_mode(), _running(STEP_FILE):
                outputs = self._step(*(torch.from_numpy(arrays[name]) for name in names))
            named = _named(STEP_FILE, self.step_signature, outputs)
            found = {spec.name: named[spec.name].numpy() for spec in given}
            check_outputs(STEP_FILE, given, {**cache.capacity.sizes, "B": n}, found)
            return StepOutput(**found)

        return step

    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder module as it is: its inputs by name → its outputs by name."""
        return _run(self._encoder, ENCODER_FILE, self.encoder_signature, feeds)

    def run_step(self, feeds: Tensors) -> Tensors:
        """The step module out of place: its inputs by name → its outputs by name; the inputs stay as they are."""
        copies = {name: array.copy() for name, array in feeds.items()}
        return _run(self._step, STEP_FILE, self.step_signature, copies)


@contextlib.contextmanager
def _running(file: str) -> Iterator[None]:
    """What torch raises while a module runs becomes a CapacityError where memory is short and else a BundleError."""
    try:
        yield
    except (RuntimeError, IndexError, MemoryError) as error:
        *_, last = str(error).strip().splitlines() or [type(error).__name__]
        got = f"TorchScript cannot run {file} ({last[:LONGEST_REASON]})"
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise CapacityError(
                got, expected="enough free memory", remedy="Plan fewer `rows` or fewer `max_new_tokens`."
            ) from error
        raise BundleError(
            got,
            expected="a module that kvx export wrote",
            remedy="Export the bundle again with this version of kvx.",
        ) from error


def _run(module: torch.jit.ScriptModule, file: str, signature: Signature, feeds: Tensors) -> Tensors:
    with torch.inference_mode(), _running(file):
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in signature.inputs))
    found = {name: output.numpy() for name, output in _named(file, signature, outputs).items()}
    check_outputs(file, signature.outputs, sizes_of(signature, feeds), found)
    return found


def _named(file: str, signature: Signature, outputs: object) -> dict[str, torch.Tensor]:
    if not isinstance(outputs, tuple) or len(outputs) != len(signature.outputs):
        raise BundleError(
            f"{file} has {len(outputs) if isinstance(outputs, tuple) else 1} outputs",
            expected=f"{len(signature.outputs)}: {', '.join(spec.name for spec in signature.outputs)}",
            remedy="Export the bundle again with this version of kvx.",
        )
    return {spec.name: output for spec, output in zip(signature.outputs, outputs, strict=True)}


def _load(path: Path, signature: Signature) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated", category=DeprecationWarning)
        try:
            check_module(path.name, torch._C.PyTorchFileReader(str(path)))
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise BundleError(
                f"TorchScript cannot load {path.name} ({str(error).strip().splitlines()[0][:300]})",
                expected="a module that kvx export wrote",
                remedy="Export the bundle again with this version of kvx.",
            ) from None
    got = [argument.name for argument in module.forward.schema.arguments[1:]]  # type: ignore[attr-defined]
    if len(got) != len(signature.inputs):
        raise BundleError(
            f"{path.name} has {len(got)} inputs",
            expected=f"{len(signature.inputs)}: {', '.join(spec.name for spec in signature.inputs)}",
            remedy="Export the bundle again with this version of kvx.",
        )
    return module
