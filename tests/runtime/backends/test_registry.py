"""The table of backends: what loads, what is refused, and how one more is added."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvx import BundleError, DeviceError, OptionError, Translator
from kvx.runtime import kernels
from kvx.runtime.backends import registry
from kvx.runtime.backends.device import HOST, Device
from kvx.runtime.backends.registry import backend_names, backend_row, check_files, load_backends, place, register
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.graphs import OWN_STEP_FILE
from kvx.runtime.engine.loaded import LoadedModel


@pytest.fixture
def bundle(numbers_bundle: Path) -> Bundle:
    return Bundle.open(numbers_bundle)


@pytest.fixture(autouse=True)
def own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the runtime's own, and what a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_rows", {name: registry._rows[name] for name in ("onnx", "torchscript")})


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_a_backend_is_made_for_each_device_under_its_name(bundle: Bundle, name: str) -> None:
    pytest.importorskip(backend_row(name).module)
    backends = load_backends(bundle, name, [HOST, HOST], threads=1, workers=None, spin=False)
    assert [backend.name for backend in backends] == [name, name]
    assert Translator(LoadedModel(bundle, *backends)).translate(["one"])[0].text == "eins"


def test_a_further_row_is_a_backend_like_any_other(bundle: Bundle) -> None:
    row = replace(backend_row("onnx"), name="mine", files=("model.pt",), module="json", cuda_lacks=None)
    register(row)
    register(row)
    assert backend_names() == ("onnx", "torchscript", "mine")
    [backend] = load_backends(bundle, "mine", [HOST], threads=1, workers=None, spin=False)
    assert Translator(LoadedModel(bundle, backend)).translate(["one"])[0].text == "eins"
    with pytest.raises(DeviceError, match=r"no backend 'yours'\. Expected onnx, torchscript or mine\."):
        backend_row("yours")


def test_a_name_stands_for_one_backend() -> None:
    with pytest.raises(AssertionError, match="onnx"):
        register(replace(backend_row("torchscript"), name="onnx"))


def test_what_a_backend_needs_installed_is_named_with_the_command_that_brings_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, module, command in (("onnx", "onnxruntime", "'kvx[gpu]'"), ("torchscript", "torch", "'kvx[export]'")):
        with pytest.raises(DeviceError) as caught:
            load_backends(bundle, name, [HOST], threads=1, workers=None, spin=False)
        assert f"needs {module}, which is not installed" in caught.value.got
        assert f"pip install {command}" in caught.value.remedy
        assert caught.value.option == "backend"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"spin": True}, "`spin` has no effect on the backend torchscript"),
        ({"spin": "maybe"}, "`spin` is 'maybe'"),
        ({"workers": 0}, "`workers` is 0"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(
    numbers_bundle: Path, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(OptionError, match=problem):
        Translator.load(numbers_bundle, backend="torchscript", **arguments)


def test_a_backend_without_cuda_is_refused_on_it(bundle: Bundle) -> None:
    for refused in (
        lambda: place(bundle, "torchscript", "cuda:1"),
        lambda: load_backends(bundle, "torchscript", [Device("cuda", 1)], threads=1, workers=None, spin=False),
    ):
        with pytest.raises(DeviceError, match=r"torchscript cannot run on cuda:1\. Expected the device cpu\."):
            refused()


@pytest.mark.parametrize(
    ("name", "lowering", "lacks", "device"),
    [
        ("onnx", "cuda", None, Device("cuda")),
        ("onnx", "cuda", "libcublas.so", HOST),
        ("onnx", "ort", None, HOST),
        ("mine", "cuda", None, HOST),
    ],
)
def test_auto_is_cuda_for_a_bundle_exported_for_it_where_nothing_is_missing(
    bundle: Bundle, name: str, lowering: str, lacks: str | None, device: Device
) -> None:
    onnx = backend_row("onnx")
    registry._rows["onnx"] = replace(onnx, cuda_lacks=lambda: lacks)
    register(replace(onnx, name="mine", cuda_lacks=None))
    for_it = replace(bundle, manifest=replace(bundle.manifest, lowering=lowering))
    assert place(for_it, name, "auto") == (device,)
    assert place(for_it, name, "cpu") == (HOST,)


def test_the_files_that_a_backend_needs_are_checked_by_its_row(bundle: Bundle) -> None:
    check_files(bundle, "onnx")
    kept = {name: entry for name, entry in bundle.manifest.files.items() if name != "encoder.onnx"}
    without = replace(bundle, manifest=replace(bundle.manifest, files=kept))
    check_files(without, "torchscript")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        check_files(without, "onnx")


@pytest.mark.parametrize(
    ("threads", "workers", "option"),
    [(0, None, "threads"), (None, 0, "workers"), (2, 3, "workers"), (True, 1, "threads")],
)
def test_threads_and_workers_that_cannot_be_are_refused(
    bundle: Bundle, threads: int | None, workers: int | None, option: str
) -> None:
    with pytest.raises(OptionError, match=f"`{option}` is") as caught:
        load_backends(bundle, "onnx", [HOST], threads=threads, workers=workers, spin=False)
    assert caught.value.option == option


def test_loading_is_logged_once_and_graphs_that_are_loaded_late_when_they_are(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    def told(level: int) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    with caplog.at_level(logging.DEBUG, logger="kvx"):
        backends = load_backends(bundle, "onnx", [HOST], threads=1, workers=None, spin=False)
        translator = Translator(LoadedModel(bundle, *backends))
        assert [message.split(" in ")[0] for message in told(logging.INFO)] == [
            f"kvx's own operators: {kernels.instructions() or 'none'}",
            f"loaded {bundle.folder} with onnx on cpu, 1 threads,",
        ]
        step = OWN_STEP_FILE if kernels.library() else "decoder_step.onnx"
        assert sum(step in message for message in told(logging.DEBUG)) == 1
        caplog.clear()
        for _ in range(2):
            translator.translate(["one"])
        assert not [message for message in told(logging.INFO) if ".onnx" in message]
        for _ in range(2):
            translator.score(["one"], ["eins"])
        late = [message for message in told(logging.INFO) if ".onnx" in message]
    assert len(late) == 1
    assert "decoder_chunk.onnx" in late[0]
