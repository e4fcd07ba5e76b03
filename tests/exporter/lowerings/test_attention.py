"""What a decoder layer attends to in the source: the same from every backend, and zero beyond the source.

Letters: B rows, S source positions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from kvx import BundleError, OptionError
from kvx.exporter.export import export
from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.options import ExportOptions
from kvx.exporter.writing.graphs import StepGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.eager import NoCacheBackend, TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime import kernels
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.backends.onnx import ENCODER_FILE, STEP_FILE, OnnxBackend
from kvx.runtime.backends.torchscript import TorchScriptBackend
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import BEAMS_FILE, MANIFEST_FILE, Manifest
from kvx.runtime.bundle.precision import PRECISIONS
from kvx.runtime.bundle.signature import step_signature
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

FLOAT32_NOISE = 2e-5
POISON = 1e30
SOURCE_LENGTHS = np.array([6, 1, 4])
CAPACITY = 5
LAST_LAYER = 1


@pytest.fixture(scope="module")
def ort_bundle(attended_bundle: Path) -> Path:
    """With its proof, and the last layer's attention."""
    return attended_bundle


@pytest.fixture(scope="module")
def first_layer_bundle(attended_standard_bundle: Path) -> Path:
    """The `standard` lowering, with the first layer's."""
    return attended_standard_bundle


def open_onnx(folder: Path) -> OnnxBackend:
    manifest = Manifest.read(folder)
    return OnnxBackend(folder, manifest.dimensions, manifest.features, threads=1)


def open_torchscript(folder: Path) -> TorchScriptBackend:
    manifest = Manifest.read(folder)
    return TorchScriptBackend(folder, manifest.dimensions, manifest.features)


def attentions(backend: Backend, input_ids: IntArray, beams: int = 1) -> list[FloatArray]:
    """The attention [B, S] of some steps on a cache with ±1e30 beyond every length."""
    specs = backend.cache_specs if beams == 1 else backend.beam_cache_specs
    cache = KVCache(specs, Capacity(3 * beams, CAPACITY, 6, beams))
    encoded = backend.encode(input_ids, SOURCE_LENGTHS)
    for index, length in enumerate(SOURCE_LENGTHS.tolist()):
        cache.admit(EncodedSource(encoded, index, length))
    poison(cache)
    step, found = backend.bind(cache), []
    for number in range(CAPACITY):
        attention = step(np.arange(3 * beams) + number).attention
        assert attention is not None
        found.append(attention.copy())
        cache.advance()
    return found


def poison(cache: KVCache) -> None:
    for spec in cache.specs:
        if "S" in spec.axes:
            buffer = cache.buffers[spec.name]
            outside = np.arange(buffer.shape[2]) >= cache.source_lengths[:, None]
            signs = np.where(np.arange(buffer.size).reshape(buffer.shape) % 3, POISON, -POISON).astype(np.float32)
            np.copyto(buffer, signs, where=outside[:, None, :, None])


@pytest.fixture
def input_ids(tiny: Transformer) -> IntArray:
    ids: IntArray = np.random.default_rng(0).integers(0, tiny.config.source_vocab_size, (3, 6))
    return ids


def assert_attention(got: list[FloatArray], expected: list[FloatArray], atol: float = FLOAT32_NOISE) -> None:
    for ours, truth in zip(got, expected, strict=True):
        lengths = np.repeat(SOURCE_LENGTHS, len(ours) // 3)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, truth, rtol=0, atol=atol)
        np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=0, atol=FLOAT32_NOISE)
        assert not ours[np.arange(6) >= lengths[:, None]].any()


def test_every_backend_gives_the_attention_of_eager_without_a_cache(
    tiny: Transformer, ort_bundle: Path, input_ids: IntArray
) -> None:
    truth = attentions(NoCacheBackend(tiny, attention_layer=LAST_LAYER), input_ids)
    eager: Backend = TorchBackend(tiny, attention_layer=LAST_LAYER)
    for backend in (eager, open_onnx(ort_bundle), open_torchscript(ort_bundle)):
        assert_attention(attentions(backend, input_ids), truth)


def test_the_standard_lowering_gives_the_layer_that_was_asked_for(
    tiny: Transformer, first_layer_bundle: Path, input_ids: IntArray
) -> None:
    first, last = (attentions(TorchBackend(tiny, attention_layer=layer), input_ids) for layer in (0, LAST_LAYER))
    assert np.abs(first[0] - last[0]).max() > 1e-3
    assert_attention(attentions(open_onnx(first_layer_bundle), input_ids), first)


@pytest.mark.parametrize("lowering", ["ort", "standard"])
@pytest.mark.parametrize("beams", [2, 3])
def test_rows_that_share_a_source_have_attentions_of_their_own(
    tiny: Transformer, ort_bundle: Path, first_layer_bundle: Path, input_ids: IntArray, lowering: str, beams: int
) -> None:
    bundle, layer = (ort_bundle, LAST_LAYER) if lowering == "ort" else (first_layer_bundle, 0)
    truth = attentions(TorchBackend(tiny, attention_layer=layer), input_ids, beams)
    assert_attention(attentions(open_onnx(bundle), input_ids, beams), truth)
    assert np.abs(truth[0][0] - truth[0][1]).max() > 1e-4


def test_onnxs_own_evaluator_gives_the_attention_of_eager(
    tiny: Transformer, first_layer_bundle: Path, input_ids: IntArray
) -> None:
    manifest, eager = Manifest.read(first_layer_bundle), TorchBackend(tiny, attention_layer=0)
    names = [spec.name for spec in step_signature(manifest.dimensions, manifest.features).outputs]
    cache = KVCache(eager.cache_specs, Capacity(3, CAPACITY, 6))
    encoded = eager.encode(input_ids, SOURCE_LENGTHS)
    for index, length in enumerate(SOURCE_LENGTHS.tolist()):
        cache.admit(EncodedSource(encoded, index, length))
    poison(cache)
    feeds = {"input_ids": np.arange(3), "past_lengths": cache.lengths, "source_lengths": cache.source_lengths}
    evaluator = ReferenceEvaluator(onnx.load(first_layer_bundle / STEP_FILE))
    _, attention, *_ = map(np.asarray, evaluator.run(names, {**feeds, **cache.buffers}))
    expected = eager.bind(cache)(feeds["input_ids"]).attention
    assert expected is not None
    assert_attention([attention], [expected])


@pytest.mark.parametrize("name", [STEP_FILE, BEAMS_FILE])
def test_the_standard_lowering_stays_plain_onnx(first_layer_bundle: Path, name: str) -> None:
    model = onnx.load(first_layer_bundle / name)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)


def test_int8_gives_an_attention_near_that_of_eager(
    tiny: Transformer, ort_bundle: Path, tmp_path: Path, input_ids: IntArray
) -> None:
    for name in (MANIFEST_FILE, ENCODER_FILE, f"{ENCODER_FILE}.data"):
        shutil.copyfile(ort_bundle / name, tmp_path / name)
    step = StepGraph(tiny, OrtOperators(tiny), Manifest.read(ort_bundle).features)
    write_onnx(step, tmp_path / STEP_FILE, widths=PRECISIONS["int8"].step)
    truth = attentions(TorchBackend(tiny, attention_layer=LAST_LAYER), input_ids)
    assert_attention(attentions(open_onnx(tmp_path), input_ids), truth, atol=0.1)


def test_the_proof_says_how_far_the_attention_is_from_eagers(ort_bundle: Path) -> None:
    parity = Manifest.read(ort_bundle).parity
    assert parity is not None
    found = [check for check in parity["checks"] if check["name"].startswith(f"attention of layer {LAST_LAYER}")]
    own = ["onnx, own operators"] if kernels.library() else []
    assert [check["backend"] for check in found] == ["onnx", *own, "torchscript"]
    assert all(check["differences"]["attention"] < 1e-4 for check in found)


def test_a_bundle_says_which_layers_attention_it_gives(
    ort_bundle: Path, first_layer_bundle: Path, tiny_bundle: Path
) -> None:
    layers = [Manifest.read(bundle).features.attention for bundle in (ort_bundle, first_layer_bundle, tiny_bundle)]
    assert layers == [LAST_LAYER, 0, None]
    written = json.loads((ort_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))["features"]
    assert written["attention"] == LAST_LAYER
    lines = [line.split() for line in describe(Bundle.open(ort_bundle))]
    # Of the step, of the beams, of the step over a part of the vocabulary, and of that with kvx's own operators.
    assert lines.count(["out", "attention", "float32", "[B,", "S]"]) == 3 + (kernels.library() is not None)


def test_without_the_option_there_is_no_attention(tiny: Transformer, tiny_bundle: Path, input_ids: IntArray) -> None:
    for backend in (open_onnx(tiny_bundle), open_torchscript(tiny_bundle), TorchBackend(tiny), NoCacheBackend(tiny)):
        cache = KVCache(backend.cache_specs, Capacity(3, CAPACITY, 6))
        encoded = backend.encode(input_ids, SOURCE_LENGTHS)
        for index, length in enumerate(SOURCE_LENGTHS.tolist()):
            cache.admit(EncodedSource(encoded, index, length))
        assert backend.bind(cache)(np.arange(3)).attention is None


def test_a_layer_that_the_model_has_not_is_refused(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint_folder / "model.pt"
    options = ExportOptions(checkpoint=checkpoint, output=tmp_path / "bundle", attention=True, attention_layer=2)
    with pytest.raises(OptionError, match=r"`attention_layer` is 2\. Expected 0 to 1"):
        export(options)
    assert not list(tmp_path.iterdir())


def change_features(bundle: Path, folder: Path, **changes: object) -> Path:
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    values["features"].update(changes)
    values["features"] = {name: value for name, value in values["features"].items() if value != "absent"}
    (folder / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_manifest_from_before_these_features_can_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    older = change_features(tiny_bundle, tmp_path, attention="absent", shared_sources="absent")
    assert Manifest.read(older).features == Manifest.read(tiny_bundle).features


@pytest.mark.parametrize("layer", [-1, 2, True, 1.0, "1"])
def test_an_impossible_layer_in_a_manifest_is_refused(ort_bundle: Path, tmp_path: Path, layer: object) -> None:
    with pytest.raises(BundleError, match=r"features\.attention"):
        Manifest.read(change_features(ort_bundle, tmp_path, attention=layer))
