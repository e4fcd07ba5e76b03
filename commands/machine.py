"""What runs a model: the options that say so, and a bundle loaded as they say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from kvx import Translator
from kvx.commands.console import require, say
from kvx.exporter.proof.limits import ParityOptions
from kvx.runtime.backends.device import HOST, Device
from kvx.runtime.backends.graphs import THREADS
from kvx.runtime.backends.registry import BackendRow, backend_row, check_files, place, register
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle, newest_bundle
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import OPTIONS
from kvx.runtime.rules import Option, choice, flag, refuse, text, wrong_values
from kvx.runtime.system import available_threads

BackendName = Literal["onnx", "torchscript", "torch", "torch-no-cache"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
ARTIFACTS = Path("artifacts")
EXPORT_NEEDS = ("torch", "onnx", "onnx_ir", "onnxscript")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """What runs a model. Raises OptionError."""

    backend: Annotated[
        BackendName,
        Option(
            choice(BACKENDS),
            "What runs the model: ONNX Runtime, TorchScript, or eager PyTorch with or without its cache, for "
            "comparison.",
        ),
    ] = "onnx"
    device: Annotated[
        str,
        Option(
            text(),
            "Where the model runs: auto, cpu, cuda, cuda:<index>, or several GPUs as cuda:0,cuda:1. auto takes the "
            "GPU if the bundle was exported with --lowering cuda and CUDA works, and otherwise the CPU.",
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Option(THREADS, "Compute threads, which the workers share.", unset="the cores available"),
    ] = None
    workers: Annotated[int | None, OPTIONS["workers"]] = None
    spin: Annotated[
        bool,
        Option(
            flag(),
            "Let idle threads spin instead of sleep. Single texts get faster, if nothing else needs the cores.",
        ),
    ] = False

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


@dataclass(frozen=True, slots=True)
class Machine:
    """An open bundle with what runs it: the options, and the devices that they name, or that "auto" stands for."""

    bundle: Bundle
    options: MachineOptions
    devices: tuple[Device, ...]

    @classmethod
    def of(cls, bundle: Bundle, options: MachineOptions) -> Self:
        """The device is chosen once, here."""
        return cls(bundle, options, place(bundle, options.backend, options.device))

    def check(self) -> None:
        """Raises BundleError where the bundle lacks what the backend needs."""
        check_files(self.bundle, self.options.backend)

    def load(self, *, bulk: bool) -> LoadedModel:
        """The bundle in memory; for `bulk` work on the CPU every worker has one thread."""
        threads, workers = self.options.threads, self.options.workers
        if workers is None and bulk and backend_row(self.options.backend).own_threads and self.devices == (HOST,):
            workers = threads or available_threads()
        return LoadedModel.load(
            self.bundle,
            backend=self.options.backend,
            threads=threads,
            workers=workers,
            spin=self.options.spin,
            devices=self.devices,
        )


def _make_eager(
    bundle: Bundle, device: Device, *, threads: int | None, workers: int | None, spin: bool, cached: bool
) -> Backend:
    """The bundle's own checkpoint on eager PyTorch, which only the command line offers."""
    import torch

    from kvx.models.eager import NoCacheBackend, TorchBackend
    from kvx.models.importers import load_checkpoint

    bundle.check_hashes([CHECKPOINT_FILE])  # before it is read
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_checkpoint(bundle.folder / CHECKPOINT_FILE).model
    backend = TorchBackend if cached else NoCacheBackend
    return backend(model, attention_layer=bundle.manifest.features.attention)


for name, cached in (("torch", True), ("torch-no-cache", False)):
    register(
        BackendRow(
            name=name,
            files=(CHECKPOINT_FILE,),
            checked=(),
            module="torch",
            install="pip install 'kvx[export]'",
            make=partial(_make_eager, cached=cached),
        )
    )


def open_bundle(model: Path | None) -> Bundle:
    """The bundle in this folder, or the newest. Raises BundleError."""
    return Bundle.open(model or newest_bundle(ARTIFACTS))


def load_and_say(bundle: Bundle, options: MachineOptions, *, bulk: bool, named: bool) -> Translator:
    """Loads the bundle, and says what was chosen where the user left it open, or has not `named` the bundle."""
    machine = Machine.of(bundle, options)
    loaded = machine.load(bulk=bulk)
    if not named or options.device == "auto":
        say(f"{bundle.folder} on {options.backend}, {', '.join(map(str, machine.devices))}")
    return Translator(loaded)


def ready_torch(parity: ParityOptions) -> None:
    """What an export or a proof needs. One thread for torch takes no longer: on busy cores several only wait."""
    require(*EXPORT_NEEDS, extra="export")
    require("onnxruntime", extra="gpu")
    if parity.verify_reference is not None:
        require("sacrebleu", extra="evaluate")
    import torch

    torch.set_num_threads(1)
