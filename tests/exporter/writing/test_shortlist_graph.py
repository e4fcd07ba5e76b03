"""The step over a part of the vocabulary: exported, proven, and found wanting where it is wrong.

Letters: B rows, G sentences, C tokens of the shortlist.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from kvx import OptionError
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.exporter.proof.bundle import verify
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.report import Check
from kvx.exporter.proof.trial import Trial
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import PROJECTION_FILE, SHORTLIST_FILE, FileEntry, Manifest, Precision
from kvx.runtime.bundle.precision import Lowering
from kvx.runtime.bundle.signature import TensorSpec, step_signature
from kvx.runtime.decoding.backend import Shortlisting, ShortlistStep, StepOutput, shortlisting_of
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

FLOAT32_NOISE = 2e-5
SOURCE_LENGTHS = np.array([6, 1, 4])
CAPACITY = 9
STEPS = 5
NAME = "a part of the vocabulary"


@pytest.fixture(scope="module")
def shortlisted(attended_bundle: Path, attended_standard_bundle: Path) -> dict[Lowering, Path]:
    return {"ort": attended_bundle, "standard": attended_standard_bundle}


@pytest.fixture(params=["ort", "standard"])
def bundle(request: pytest.FixtureRequest, shortlisted: dict[Lowering, Path]) -> Path:
    return shortlisted[request.param]


def open_bundle(folder: Path) -> tuple[OnnxBackend, Shortlisting]:
    manifest = Manifest.read(folder)
    backend = OnnxBackend(folder, manifest.dimensions, manifest.features, threads=1)
    shortlisting = shortlisting_of(backend)
    assert shortlisting is not None
    return backend, shortlisting


def cache_of(
    eager: TorchBackend, specs: tuple[TensorSpec, ...], beams: int, sentences: int = 3, *, poison: float = 0.0
) -> KVCache:
    """Sentences [G, S], a seat each, the same whoever asks; beyond every length stands the poison."""
    ids = np.random.default_rng(0).integers(0, eager.model.config.source_vocab_size, (3, 6))
    cache, encoded = KVCache(specs, Capacity(sentences * beams, CAPACITY, 6, beams)), eager.encode(ids, SOURCE_LENGTHS)
    for buffer in cache.buffers.values():
        buffer[...] = poison
    for index in range(sentences):
        cache.admit(EncodedSource(encoded, index, int(SOURCE_LENGTHS[index])))
    return cache


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 31, 10_000])
def test_logits_are_eagers_columns(tiny: Transformer, bundle: Path, beams: int, count: int) -> None:
    backend, shortlisting = open_bundle(bundle)
    eager = TorchBackend(tiny, attention_layer=backend.features.attention)
    truth = cache_of(eager, eager.cache_specs, beams)
    tried = cache_of(eager, shortlisting.cache_specs, beams, poison=1e30)
    eager_step, step, random = eager.bind(truth), shortlisting.bind(tried), np.random.default_rng(1)
    for number in range(STEPS):
        ids = random.integers(0, tiny.config.target_vocab_size, 3 * beams)
        listed = random.permutation(tiny.config.target_vocab_size)[:count]
        got, expected = step(ids, shortlisting.projection[listed]), eager_step(ids)
        np.testing.assert_allclose(got.logits, expected.logits[:, listed], rtol=0, atol=FLOAT32_NOISE)
        assert got.attention is not None
        assert expected.attention is not None
        np.testing.assert_allclose(got.attention, expected.attention, rtol=0, atol=FLOAT32_NOISE)
        for cache in (truth, tried):
            cache.advance()
            if number == 1:
                cache.lengths[beams : 2 * beams] = 0


def test_a_sentence_alone_gets_the_very_logits_that_it_gets_among_others(
    tiny: Transformer, shortlisted: dict[Lowering, Path]
) -> None:
    eager = TorchBackend(tiny)
    _, shortlisting = open_bundle(shortlisted["ort"])
    width = shortlisting.projection.shape[1]
    projection = np.random.default_rng(2).normal(size=(512, width)).astype(np.float32)
    together, alone = (
        shortlisting.bind(cache_of(eager, shortlisting.cache_specs, 1, sentences))(ids, projection).logits
        for sentences, ids in ((3, np.array([5, 6, 7])), (1, np.array([5])))
    )
    assert (together[:1] == alone).all()


def test_onnxs_own_evaluator_gives_eagers_columns(tiny: Transformer, shortlisted: dict[Lowering, Path]) -> None:
    bundle, eager = shortlisted["standard"], TorchBackend(tiny)
    _, shortlisting = open_bundle(bundle)
    manifest = Manifest.read(bundle)
    shared, copied = cache_of(eager, shortlisting.cache_specs, 2), cache_of(eager, eager.cache_specs, 2)
    ids = np.random.default_rng(3).integers(0, tiny.config.target_vocab_size, 6)
    feeds = {
        "input_ids": ids,
        "past_lengths": shared.lengths,
        "source_lengths": shared.source_lengths,
        "projection": np.array(shortlisting.projection[5:16]),
    }
    names = [spec.name for spec in step_signature(manifest.dimensions, manifest.features.shortlisted).outputs]
    evaluator = ReferenceEvaluator(onnx.load(bundle / SHORTLIST_FILE))
    got, *_ = map(np.asarray, evaluator.run(names, {**feeds, **shared.buffers}))
    np.testing.assert_allclose(got, eager.bind(copied)(ids).logits[:, 5:16], rtol=0, atol=FLOAT32_NOISE)


def test_the_bundle_has_the_graph_and_the_projection_and_says_so(tiny: Transformer, bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert {SHORTLIST_FILE, PROJECTION_FILE} <= manifest.files.keys()
    assert (np.load(bundle / PROJECTION_FILE, allow_pickle=False) == tiny.head.weight.numpy()).all()
    described = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["graphs"]["decoder_shortlist"]
    graph = onnx.load(bundle / SHORTLIST_FILE, load_external_data=False).graph
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        shapes = [[axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in values]
        assert [(one["name"], one["axes"]) for one in described[side]] == [
            (value.name, shape) for value, shape in zip(values, shapes, strict=True)
        ]
    lines = list(describe(Bundle.open(bundle)))
    assert "decoder_shortlist" in lines
    assert any("projection" in line and "[C, 16]" in line for line in lines)
    assert manifest.parity is not None
    assert any(check["name"] == NAME for check in manifest.parity["checks"])


def test_its_weights_are_the_steps_and_the_output_projection_is_not_among_them(bundle: Path) -> None:
    model = onnx.load(bundle / SHORTLIST_FILE, load_external_data=False)
    matrices = [part for part in model.graph.initializer if len(part.dims) == 2]
    assert len(matrices) > 10
    places = {entry.value for part in matrices for entry in part.external_data if entry.key == "location"}
    assert places == {"decoder_step.onnx.data"}
    assert all(part.data_location == onnx.TensorProto.EXTERNAL for part in matrices)
    assert not any("head" in part.name for part in matrices)


def test_other_bundles_have_neither(tiny_bundle: Path) -> None:
    assert Manifest.read(tiny_bundle).files.keys().isdisjoint({SHORTLIST_FILE, PROJECTION_FILE})


@pytest.mark.proof
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_graphs_are_proven_too(
    tiny: Transformer, tiny_checkpoint_folder: Path, tmp_path: Path, precision: Precision
) -> None:
    bundle = tmp_path / "bundle"
    options = ExportOptions(
        checkpoint=tiny_checkpoint_folder / "model.pt",
        output=bundle,
        format="onnx",
        precision=precision,
        parity=ParityOptions(steps=4),
        attention=True,
        shortlist=True,
    )
    parity = export(options).parity
    assert parity is not None
    [check] = [check for check in parity["checks"] if check["name"] == NAME]
    assert check["passed"]
    assert (np.load(bundle / PROJECTION_FILE) == tiny.head.weight.numpy()).all()  # stays float32


def test_what_has_no_such_graph_is_refused_with_all_else() -> None:
    with pytest.raises(
        OptionError, match=r"`shortlist` does .* `format` torch.*\. `calibration` has no effect with `precision` fp32"
    ):
        ExportOptions(checkpoint=Path("x"), format="torchscript", calibration=Path("y"), shortlist=True)


class Faulty:
    """Steps that are wrong in one way."""

    def __init__(self, shortlisting: Shortlisting) -> None:
        self.shortlisting = shortlisting
        self.cache_specs = shortlisting.cache_specs
        self.projection = shortlisting.projection

    def bind(self, cache: KVCache) -> ShortlistStep:
        step = self.shortlisting.bind(cache)
        return lambda input_ids, projection: self.alter(cache, step(input_ids, projection))

    def alter(self, cache: KVCache, output: StepOutput) -> StepOutput:
        return output


class ColumnsAreShifted(Faulty):
    def alter(self, cache: KVCache, output: StepOutput) -> StepOutput:
        return output._replace(logits=np.roll(output.logits, 1, axis=1))


class RowsAreSwapped(Faulty):
    def alter(self, cache: KVCache, output: StepOutput) -> StepOutput:
        return output._replace(logits=output.logits[::-1].copy())


class TouchesTheSource(Faulty):
    def alter(self, cache: KVCache, output: StepOutput) -> StepOutput:
        cache.buffers["past_key_values.0.encoder.key"][0, 0, -1, 0] += 1
        return output


class HasOneOtherRow(Faulty):
    def __init__(self, shortlisting: Shortlisting) -> None:
        super().__init__(shortlisting)
        self.projection: FloatArray = np.array(shortlisting.projection)
        self.projection[-1, 0] += 0.1


@pytest.mark.parametrize("fault", [ColumnsAreShifted, RowsAreSwapped, TouchesTheSource, HasOneOtherRow])
def test_the_proof_finds_steps_that_are_wrong(tiny: Transformer, bundle: Path, fault: type[Faulty]) -> None:
    backend, shortlisting = open_bundle(bundle)
    checked = [proof(tiny, backend, one) for one in (shortlisting, fault(shortlisting))]
    assert [check.passed for check in checked] == [True, False]


def proof(tiny: Transformer, backend: OnnxBackend, shortlisting: Shortlisting) -> Check:
    layer = backend.features.attention
    return Trial(tiny, ParityOptions(), 1e-4, layer).check_shortlist(backend, shortlisting)


def test_verify_finds_another_projection_though_the_manifest_vouches_for_it(
    tiny_checkpoint_folder: Path, shortlisted: dict[Lowering, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(shortlisted["ort"], tmp_path / "tiny")
    rows = np.load(bundle / PROJECTION_FILE)
    rows[3, 0] += 0.1
    np.save(bundle / PROJECTION_FILE, rows)
    manifest = Manifest.read(bundle)
    files = {**manifest.files, PROJECTION_FILE: FileEntry.of(bundle / PROJECTION_FILE)}
    dataclasses.replace(manifest, files=files).write(bundle)
    report = verify(bundle, tiny_checkpoint_folder / "model.pt", ParityOptions(steps=2))
    assert [check.name for check in report.checks if not check.passed] == [NAME]
