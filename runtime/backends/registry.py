"""The backends, one row each, and how those of a bundle are made while the hashes of its files are checked."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvx.runtime import kernels
from kvx.runtime.backends.device import HOST, Device
from kvx.runtime.backends.graphs import THREADS
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.graphs import FORMAT_ENDINGS, GRAPH_FILES
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.errors import DeviceError, out_of_threads
from kvx.runtime.rules import Problem, flag, refuse, wrong_value
from kvx.runtime.system import available_threads

AUTO = "auto"

_log = logging.getLogger("kvx")


class MakeBackend(Protocol):
    """Makes a backend for a bundle on a device; it imports what it needs only then."""

    def __call__(
        self, bundle: Bundle, device: Device, *, threads: int | None, workers: int | None, spin: bool
    ) -> Backend:
        """The backend. Raises BundleError, DeviceError and OptionError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """One backend.

    `files` of a bundle it needs; the hashes of files that end as `checked` says are compared, those of the tokenizers
    always. `module` is what it needs installed, which the command `install` brings. `own_threads`: each of its decodes
    has compute threads of its own, which several workers share and which may spin. `cuda_lacks` says what is missing
    for CUDA, None where nothing is; a backend without it runs on the CPU alone.
    """

    name: str
    files: tuple[str, ...]
    checked: tuple[str, ...]
    module: str
    install: str
    make: MakeBackend
    own_threads: bool = False
    cuda_lacks: Callable[[], str | None] | None = None


def _make_onnx(bundle: Bundle, device: Device, *, threads: int | None, workers: int | None, spin: bool) -> Backend:
    from kvx.runtime.backends.onnx import OnnxBackend

    manifest = bundle.manifest
    return OnnxBackend(
        bundle.files,
        manifest.dimensions,
        manifest.features,
        threads=threads,
        workers=workers,
        spin=spin,
        device=device,
        own=kernels.run(manifest.operators),
        product_bits=manifest.product_bits,
    )


def _onnx_cuda_lacks() -> str | None:
    from kvx.runtime.backends.sessions import cuda_lacks

    return cuda_lacks()


def _make_torchscript(
    bundle: Bundle, device: Device, *, threads: int | None, workers: int | None, spin: bool
) -> Backend:
    from kvx.runtime.backends.torchscript import TorchScriptBackend

    return TorchScriptBackend(bundle.files, bundle.manifest.dimensions, bundle.manifest.features, threads=threads)


_rows = {
    row.name: row
    for row in (
        BackendRow(
            name="onnx",
            files=GRAPH_FILES["onnx"],
            checked=FORMAT_ENDINGS["onnx"],
            module="onnxruntime",
            install="pip install 'kvx[gpu]', or 'kvx[cpu]' for a machine without an NVIDIA GPU",
            make=_make_onnx,
            own_threads=True,
            cuda_lacks=_onnx_cuda_lacks,
        ),
        BackendRow(
            name="torchscript",
            files=GRAPH_FILES["torchscript"],
            checked=FORMAT_ENDINGS["torchscript"],
            module="torch",
            install="pip install 'kvx[export]'",
            make=_make_torchscript,
        ),
    )
}


def register(row: BackendRow) -> None:
    """Adds a backend, whose name must be new. Whoever composes a program does this once, before anything is loaded."""
    known = _rows.setdefault(row.name, row)
    assert known == row, f"there is a backend {row.name} already"


def backend_names() -> tuple[str, ...]:
    """The names of all backends."""
    return tuple(_rows)


def backend_row(name: str) -> BackendRow:
    """The row of a backend. Raises DeviceError for an unknown name."""
    if name not in _rows:
        *first, last = _rows
        raise DeviceError(
            f"There is no backend {name!r}",
            expected=f"{', '.join(first)} or {last}",
            remedy="Correct `backend`.",
            option="backend",
        )
    return _rows[name]


def place(bundle: Bundle, name: str, device: str) -> tuple[Device, ...]:
    """The devices that a backend of this name shall run on: those that `device` lists or, where it is "auto", CUDA for
    a bundle that was exported for it where the backend finds all that it needs, else the CPU. Raises DeviceError.
    """
    row = backend_row(name)
    if device == AUTO:
        usable = row.cuda_lacks is not None and bundle.manifest.lowering == "cuda" and row.cuda_lacks() is None
        return (Device("cuda") if usable else HOST,)
    devices = Device.parse_list(device)
    _check_devices(row, devices)
    return devices


def check_files(bundle: Bundle, name: str) -> None:
    """Raises BundleError where the bundle lacks a file that the backend needs, DeviceError for an unknown backend."""
    bundle.require(*backend_row(name).files)


def load_backends(
    bundle: Bundle, name: str, devices: Sequence[Device], *, threads: int | None, workers: int | None, spin: bool
) -> list[Backend]:
    """A backend for each device. An altered file is a BundleError, which explains any failure of a backend.

    Raises BundleError, DeviceError and OptionError.
    """
    row, started = backend_row(name), time.perf_counter()
    _check_devices(row, devices)
    _check_threads(row, workers=workers, spin=spin)
    _check_installed(row)
    bundle.require(*row.files)
    checked = [file for file in bundle.manifest.files if file.endswith((*row.checked, ".model"))]
    make = partial(row.make, bundle, threads=threads, workers=workers, spin=spin)
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            hashes = pool.submit(bundle.check_hashes, checked)
        except RuntimeError as error:
            raise out_of_threads("The thread that checks the files cannot be started") from error
        try:
            backends = [make(device) for device in devices]
        finally:
            hashes.result()
    where, seconds = ", ".join(map(str, devices)), time.perf_counter() - started
    _log.info(
        "loaded %s with %s on %s, %d threads, in %.2f s",
        *(bundle.folder, name, where, threads or available_threads(), seconds),
    )
    return backends


def _check_devices(row: BackendRow, devices: Sequence[Device]) -> None:
    elsewhere = [device for device in devices if device != HOST]
    if elsewhere and row.cuda_lacks is None:
        raise DeviceError(
            f"The backend {row.name} cannot run on {elsewhere[0]}",
            expected="the device cpu",
            remedy="Use `device` cpu, or another `backend`.",
            option="device",
        )


def _check_threads(row: BackendRow, *, workers: int | None, spin: bool) -> None:
    problems = list(wrong_value("spin", spin, flag()))
    if workers is not None:
        problems += wrong_value("workers", workers, THREADS)
    if spin and not row.own_threads:
        got = f"`spin` has no effect on the backend {row.name}"
        problems.append(Problem("spin", got, "`spin` only with onnx"))
    refuse(problems)


def _check_installed(row: BackendRow) -> None:
    if importlib.util.find_spec(row.module) is None:
        raise DeviceError(
            f"The backend {row.name} needs {row.module}, which is not installed",
            expected=f"{row.module} in this Python environment",
            remedy=f"Install it with {row.install}, or use another `backend`.",
            option="backend",
        )
