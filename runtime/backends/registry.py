"""A bundle's backends, made while the hashes of its files are checked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvx.runtime.backends.device import Device
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import GRAPH_FILES
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.errors import DeviceError


def load_backends(
    bundle: Bundle, name: str, devices: Sequence[Device], *, threads: int | None, workers: int | None, spin: bool
) -> list[Backend]:
    """A backend for each device. An altered file is a BundleError, which explains whatever a backend made of it."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = pool.submit(bundle.check_hashes, _files_in_use(bundle, name))
        try:
            return [_make_backend(bundle, name, one, threads=threads, workers=workers, spin=spin) for one in devices]
        finally:
            hashes.result()


def _files_in_use(bundle: Bundle, backend: str) -> list[str]:
    endings = {"onnx": (".onnx", ".data", ".npy"), "torchscript": (".ts",)}.get(backend, ())
    return [name for name in bundle.manifest.files if name.endswith((*endings, ".model"))]


def _make_backend(
    bundle: Bundle, name: str, device: Device, *, threads: int | None, workers: int | None, spin: bool
) -> Backend:
    arguments = (bundle.folder, bundle.manifest.dimensions, bundle.manifest.features)
    if name == "onnx":
        if importlib.util.find_spec("onnxruntime") is None:
            raise DeviceError(
                "ONNX Runtime is not installed",
                expected="the package onnxruntime or onnxruntime-gpu",
                remedy="Install one of them: pip install 'kvx[cpu]' for a CPU, pip install 'kvx[gpu]' for a GPU.",
            )
        from kvx.runtime.backends import onnx

        bundle.require(*GRAPH_FILES[name])
        return onnx.OnnxBackend(*arguments, threads=threads, workers=workers, spin=spin, device=device)
    if name == "torchscript":
        if importlib.util.find_spec("torch") is None:
            raise DeviceError(
                "backend torchscript without torch", expected="torch", remedy="pip install 'kvx[export]', or use onnx."
            )
        from kvx.runtime.backends import torchscript

        bundle.require(*GRAPH_FILES[name])
        return torchscript.TorchScriptBackend(*arguments, threads=threads, device=str(device))
    raise DeviceError(f"backend {name!r}", expected="onnx or torchscript", remedy="Correct the backend.")
