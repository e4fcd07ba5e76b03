"""What the ONNX backend adds to the contract: steps bound beforehand, and errors of ONNX Runtime in our own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvx import BundleError, CapacityError, DeviceError
from kvx.runtime.backends.device import HOST, Device
from kvx.runtime.backends.onnx import STEP_FILE, BoundChunk, BoundStep, OnnxBackend
from kvx.runtime.backends.sessions import Bound, Failing, Graph, SessionSettings
from kvx.runtime.bundle.files import Files
from kvx.runtime.bundle.graphs import OWN_STEP_FILE
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.cache import Capacity, KVCache


@pytest.fixture(scope="module")
def backend(numbers_bundle: Path) -> OnnxBackend:
    manifest = Manifest.read(numbers_bundle)
    return OnnxBackend(numbers_bundle, manifest.dimensions, manifest.features, threads=1)


def test_one_token_and_several_are_two_bound_steps(backend: OnnxBackend) -> None:
    cache = KVCache(backend.cache_specs, Capacity(2, 4, 4))
    assert isinstance(backend.bind(cache), BoundStep)
    assert isinstance(backend.bind_chunk(cache), BoundChunk)


def test_what_onnx_runtime_raises_in_a_run_is_an_error_that_names_the_file(backend: OnnxBackend) -> None:
    sizes = {"B": 1, "G": 1, "T": 4, "S": 4}
    feeds = {spec.name: np.zeros(spec.shape(sizes), spec.dtype) for spec in backend.step_signature.inputs}
    feeds["past_lengths"] = np.array([4])  # beyond the capacity
    with pytest.raises(BundleError, match=f"cannot run ({STEP_FILE}|{OWN_STEP_FILE})") as caught:
        backend.run_step(feeds)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (RuntimeError("BFCArena: Failed to allocate memory\nand more"), CapacityError),
        (MemoryError(), CapacityError),
        (RuntimeError("Non-zero status code"), BundleError),
        (RuntimeError("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"), DeviceError),
        (RuntimeError("libcudart.so.13: cannot open shared object file"), DeviceError),
        (RuntimeError("Load model from x failed: open file x fail, errcode = 24"), CapacityError),
        (RuntimeError("pthread_create failed: Resource temporarily unavailable"), CapacityError),
        (RuntimeError(""), BundleError),
    ],
)
def test_errors_are_told_apart_by_their_cause(raised: Exception, becomes: type[Exception]) -> None:
    with pytest.raises(becomes, match="It broke") as caught, Failing("It broke"):
        raise raised
    assert caught.value.__cause__ is raised


def test_a_session_never_falls_back_to_another_device(
    backend: OnnxBackend, numbers_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not backend._step.session()._enable_fallback
    damaged = tmp_path / STEP_FILE
    damaged.write_bytes((numbers_bundle / STEP_FILE).read_bytes()[:-100])
    graph = Graph(Files(tmp_path), STEP_FILE, backend.step_signature, backend._step.settings)
    with pytest.raises(BundleError):
        graph.load()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "says",
    ["pthread_create failed, error code: 11 error msg: Resource temporarily unavailable", "can't start new thread"],
)
def test_a_limit_on_threads_is_told_as_one(says: str) -> None:
    with pytest.raises(CapacityError, match="no more threads") as caught, Failing("It broke"):
        raise RuntimeError(says)
    assert caught.value.option == "threads"


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), CapacityError("Full", expected="room", remedy="Make room.")])
def test_errors_of_ours_and_interrupts_pass_as_they_are(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, Failing("It broke"):
        raise raised
    assert caught.value is raised


@pytest.mark.parametrize(("device", "bound"), [(HOST, 1), (Device("cuda"), 3)])
def test_inputs_are_bound_again_for_every_run_where_binding_copies_them(device: Device, bound: int) -> None:
    calls: list[str] = []

    class Session:
        def run_with_iobinding(self, binding: object) -> None:
            calls.append("run")

    class Binding:
        def bind_ortvalue_input(self, name: str, value: object) -> None:
            calls.append(name)

    settings = SessionSettings(threads=1, spin=False, device=device, tf32=False, widened=False, own=None)
    step = Bound(Session(), Binding(), {"input_ids": object()}, settings)
    step.run()
    step.run()
    assert calls.count("input_ids") == bound
    assert calls.count("run") == 2
    assert calls[:2] == ["input_ids", "run" if device == HOST else "input_ids"]
