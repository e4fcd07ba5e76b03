"""Devices by name, and errors that say what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvx import DeviceError, Translator
from kvx.runtime.backends import sessions
from kvx.runtime.backends.device import Device, missing_library, unavailable
from kvx.runtime.backends.ort import ort
from kvx.runtime.backends.sessions import CUDA_LIBRARY

TEXTS = ["one", "twelve thousand and four", "ninety-nine", "seven"] * 10


def without_cuda() -> None:
    if missing_library(CUDA_LIBRARY) is None:
        pytest.skip("the CUDA libraries are here")


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", Device()), ("cuda", Device("cuda", 0)), ("cuda:3", Device("cuda", 3))]
)
def test_a_device_is_called_by_its_kind_and_index(name: str, device: Device) -> None:
    assert Device.parse(name) == device
    assert Device.parse(str(device)) == device


@pytest.mark.parametrize("name", ["", "tpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:0:1"])
def test_names_that_are_no_devices_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="Expected cpu, cuda or cuda:<index>"):
        Device.parse(name)


def test_several_devices_are_named_with_commas_each_once() -> None:
    assert Device.parse_list("cuda:0, cuda:1") == (Device("cuda", 0), Device("cuda", 1))
    with pytest.raises(DeviceError, match="each device once"):
        Device.parse_list("cuda,cuda:0")


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    without_cuda()
    missing = missing_library(CUDA_LIBRARY)
    assert missing is not None
    assert ".so" in missing
    assert missing_library(tmp_path / "libnothing.so") == "libnothing.so"


@pytest.mark.parametrize(
    ("library", "remedy"),
    [("libcublasLt.so.13", r"pip install 'kvx\[cuda\]'"), ("libcuda.so.1", "driver"), (None, "this index exists")],
)
def test_the_error_names_what_brings_the_missing_library(library: str | None, remedy: str) -> None:
    error = unavailable(Device("cuda", 1), "ONNX Runtime made a session on CPU instead", library)
    with pytest.raises(DeviceError, match=remedy) as raised:
        raise error
    assert "cuda:1" in str(raised.value)
    assert (library or "") in str(raised.value)


def test_looking_for_cuda_leaves_standard_output_to_the_other_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, preload, seen = sys.stdout, ort.preload_dlls, list[object]()

    def watched() -> None:
        seen.append(sys.stdout)
        preload()

    monkeypatch.setattr(sessions, "_looked", [])
    monkeypatch.setattr(ort, "preload_dlls", watched)
    sessions.cuda_lacks()
    assert seen == [before]
    assert capsys.readouterr().out == ""
    assert "print" not in vars(ort)


def test_cuda_that_cannot_be_used_names_the_library_and_leaves_the_process_usable(numbers_bundle: Path) -> None:
    without_cuda()
    with pytest.raises(DeviceError, match=r"lib\S+\.so\S* is missing"):
        Translator.load(numbers_bundle, device="cuda:0,cuda:1")
    assert Translator.load(numbers_bundle).translate(["one"])[0].text == "eins"
