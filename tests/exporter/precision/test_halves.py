"""Exports in float16 and bfloat16, on what ONNX Runtime can do of them on a CPU."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kvx import Translator
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.exporter.precision.halves import Peak, in_precision, peaks
from kvx.exporter.proof.caches import poison
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.quality import HALF_LARGEST, check_range
from kvx.exporter.proof.trial import Trial
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.manifest import LOOP_FILE, Manifest
from kvx.runtime.bundle.precision import Lowering
from kvx.runtime.bundle.signature import Dimensions, cache_specs
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.errors import DeviceError, OptionError

NUMBERS = Path(__file__).resolve().parents[3] / "artifacts" / "numbers-checkpoint"
LINES = ["one", "two hundred", "nine hundred and ninety-nine", "twelve thousand three hundred and four"]
PLAN = Plan(
    start=(1,),
    eos=2,
    pad=0,
    rows=4,
    max_new_tokens=6,
    source_positions=24,
    cache_bytes=2**24,
    target_bytes=1,
    source_bytes=1,
)


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float16, proven, with its attention."""
    folder = tmp_path_factory.mktemp("halves")
    (folder / "text").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    export(
        ExportOptions(
            checkpoint=NUMBERS / "model.pt",
            output=folder / "bundle",
            precision="fp16",
            attention=True,
            parity=ParityOptions(steps=8, equal_lines=1.0, verify_text=folder / "text"),
        )
    )
    return folder / "bundle"


def checks(folder: Path) -> dict[str, dict[str, Any]]:
    parity = Manifest.read(folder).parity
    assert parity is not None
    return {check["name"]: check for check in parity["checks"]}


def test_float16_is_for_cuda_and_only_onnx(half_bundle: Path) -> None:
    manifest = Manifest.read(half_bundle)
    assert (manifest.precision, manifest.lowering, manifest.formats) == ("fp16", "cuda", ("onnx",))
    assert LOOP_FILE in manifest.files


def test_keys_and_values_are_float16_in_every_graph_and_half_as_large(half_bundle: Path, numbers_bundle: Path) -> None:
    half, full = Manifest.read(half_bundle), Manifest.read(numbers_bundle)
    assert half.dimensions.element == "float16"
    assert half.cache_bytes(target=3, source=2) * 2 == full.cache_bytes(target=3, source=2)
    for signature in half.graphs.values():
        caches = {spec.dtype for spec in (*signature.inputs, *signature.outputs) if ".key" in spec.name}
        assert caches == {"float16"}


def test_logits_and_attention_stay_float32(half_bundle: Path) -> None:
    outputs = Manifest.read(half_bundle).graphs["decoder_step"].outputs
    assert {spec.name: spec.dtype for spec in outputs if spec.name in ("logits", "attention")} == {
        "logits": "float32",
        "attention": "float32",
    }


def test_its_proof_is_that_of_fewer_bits_with_the_loop_and_the_range(half_bundle: Path) -> None:
    found = checks(half_bundle)
    assert all(check["passed"] for check in found.values())
    assert "largest activation" in found["range of float16"]["detail"]
    assert "the loop: 8 steps, in place and out of place" in found
    assert "of 16 sentences equal" in found["greedy on drawn ids"]["detail"]
    assert "4 of 4 lines equal" in found["greedy lines of the verification text"]["detail"]


def test_it_translates_on_a_cpu_too(half_bundle: Path, numbers_translator: Translator) -> None:
    got, expected = (
        [found.text for found in translator.translate(LINES)]
        for translator in (Translator.load(half_bundle), numbers_translator)
    )
    assert got == expected


@pytest.mark.proof
def test_bfloat16_is_proven_as_float32_where_it_has_no_kernels(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint, folder = tiny_checkpoint_folder / "model.pt", tmp_path / "bundle"
    options = ExportOptions(
        checkpoint=checkpoint,
        output=folder,
        precision="bf16",
        shortlist=True,
        parity=ParityOptions(steps=4, tolerance=0.03),
    )
    manifest = export(options)
    found = checks(folder)
    assert found["contract"]["detail"].endswith("bfloat16 is proven as float32, because a CPU has no kernels for it")
    assert "range of float16" not in found
    assert found["the loop: 4 steps, in place and out of place"]["passed"]
    assert found["a part of the vocabulary"]["passed"]
    assert found["greedy on drawn ids"]["passed"]  # though there is no text
    weights = {tensor.data_type for tensor in onnx.load(folder / LOOP_FILE).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in weights
    with pytest.raises(DeviceError, match=r"bfloat16.*cpu.*device.* cuda"):
        OnnxBackend(folder, manifest.dimensions, manifest.features)


@pytest.mark.parametrize(
    ("wrong", "got", "expected"),
    [
        (
            {"precision": "bf16", "lowering": "ort"},
            "`precision` bf16 does not go together with `lowering` ort",
            "`lowering` cuda with `precision` bf16",
        ),
        (
            {"precision": "bf16", "lowering": "standard"},
            "`precision` bf16 does not go together with `lowering` standard",
            "`lowering` cuda with `precision` bf16",
        ),
        (
            {"precision": "int8", "lowering": "cuda"},
            "`precision` int8 does not go together with `lowering` cuda",
            "`lowering` ort with `precision` int8",
        ),
        (
            {"precision": "fp16", "format": "torchscript"},
            "`precision` fp16 does not go together with `format` torchscript",
            "`format` onnx",
        ),
        (
            {"precision": "fp16", "calibration": Path("text")},
            "`calibration` has no effect with `precision` fp16",
            "int8 or int4",
        ),
        (
            {"lowering": "cuda", "format": "both"},
            "`lowering` cuda does not go together with `format` both",
            "`format` onnx with cuda",
        ),
    ],
)
def test_what_cannot_be_proven_is_refused(wrong: dict[str, Any], got: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(checkpoint=Path("model.pt"), **wrong)
    assert caught.value.got == got
    assert expected in caught.value.expected


@pytest.mark.parametrize("lowering", ["ort", "standard"])
def test_float16_may_have_any_lowering(lowering: Lowering) -> None:
    assert ExportOptions(checkpoint=Path("model.pt"), precision="fp16", lowering=lowering).formats == ("onnx",)


def test_the_model_that_was_given_stays_float32(tiny: Transformer) -> None:
    halved = in_precision(tiny, "fp16")
    assert (halved.element, tiny.element) == ("float16", "float32")
    assert halved.head.weight.dtype == torch.float32
    assert in_precision(tiny, "int8") is tiny


def test_what_float16_cannot_hold_fails_the_proof_by_name(tiny: Transformer) -> None:
    large = in_precision(tiny, "bf16").float()
    with torch.no_grad():
        large.decoder[1].feed_forward.down.weight *= 1e7
    found = check_range(TorchBackend(tiny), large, PLAN, [(4, 5, 6), (7,)])
    assert not found.passed
    assert f"{HALF_LARGEST:.0f} allowed" in found.detail
    assert check_range(TorchBackend(tiny), tiny, PLAN, [(4, 5, 6), (7,)]).passed


def test_a_projection_that_no_norm_sees_is_found_by_name(tiny: Transformer) -> None:
    large = copy.deepcopy(tiny)
    with torch.no_grad():
        large.decoder[1].cross_attention.query.weight *= 1e7
    found = check_range(TorchBackend(tiny), large, PLAN, [(4, 5, 6), (7,)])
    assert not found.passed
    assert "in decoder_layers.1.cross_attention.query," in found.detail


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_whatever_is_not_finite_is_infinite_and_stays_the_peak(value: float) -> None:
    peak = Peak()
    for where, noted in (("before", 6e4), ("here", value), ("after", 1.0)):
        peak.note(where, torch.tensor([0.5, noted]))
    assert (peak.largest, peak.where) == (math.inf, "here")


def test_the_peak_is_looked_for_in_the_residual_stream_and_after_every_product(tiny: Transformer) -> None:
    with peaks(tiny) as peak:
        TorchBackend(tiny, ops=peak).encode(np.array([[4, 5, 6]]), np.array([3]))
    assert 0 < peak.largest < HALF_LARGEST
    assert peak.where == "the residual stream"
    seen = peak.largest
    tiny.encode(torch.tensor([[1, 2]]), torch.tensor([2]))
    assert peak.largest == seen


def test_poison_is_finite_in_float16(tiny: Transformer) -> None:
    dimensions = Dimensions.of_model(tiny.config.to_dict(), "float16")
    cache = KVCache(cache_specs(dimensions), Capacity(2, 3, 4))
    poison(cache, Trial(tiny, ParityOptions(), 1e-2).random)
    assert {abs(float(value)) for buffer in cache.buffers.values() for value in buffer.flat} == {60_000.0}
