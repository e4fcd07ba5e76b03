"""The ONNX graphs: the contract's names and axes, plain ai.onnx, and the numbers of eager on a third implementation.

Letters: B rows, S source positions, T capacity of a row's cache, V target vocabulary.
"""

from __future__ import annotations

import copy
import getpass
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch.onnx._internal.exporter import _onnx_program

from kvx.exporter.lowerings.standard import StandardOperators
from kvx.exporter.writing import onnx as writing
from kvx.exporter.writing.graphs import StepGraph
from kvx.exporter.writing.onnx import LARGEST_INSIDE, write_onnx
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.backends.onnx import ENCODER_FILE, STEP_FILE, OnnxBackend
from kvx.runtime.bundle.external import external_files
from kvx.runtime.bundle.manifest import BEAMS_FILE, CHUNK_FILE
from kvx.runtime.bundle.signature import Dimensions, Signature, StepFeatures, encoder_signature, step_signature
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

ROOT = Path(__file__).resolve().parents[3]
POISON = 1e30
FLOAT32_NOISE = 2e-5
SOURCE_LENGTHS = np.array([6, 1, 4])
CAPACITY = 9
ELEMENT_TYPES = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}


@pytest.fixture(scope="module")
def dimensions(tiny: Transformer) -> Dimensions:
    return Dimensions.of_model(tiny.config.to_dict())


@pytest.fixture
def input_ids(tiny: Transformer) -> IntArray:
    """Source ids [3, 6], random beyond the lengths too."""
    ids: IntArray = np.random.default_rng(0).integers(0, tiny.config.source_vocab_size, (3, 6))
    return ids


def cache_of(backend: TorchBackend | OnnxBackend, input_ids: IntArray) -> KVCache:
    cache = KVCache(backend.cache_specs, Capacity(3, CAPACITY, 6))
    tensors = backend.encode(input_ids, SOURCE_LENGTHS)
    for index, length in enumerate(SOURCE_LENGTHS.tolist()):
        cache.admit(EncodedSource(tensors, index, length))
    return cache


def poisoned(cache: KVCache) -> Tensors:
    """Copies of the buffers with ±1e30 beyond the lengths."""
    copies = {}
    for spec in cache.specs:
        lengths = cache.source_lengths if "S" in spec.axes else cache.lengths
        buffer = cache.buffers[spec.name]
        outside = np.arange(buffer.shape[2]) >= lengths[:, None]
        signs = np.where(np.arange(buffer.size).reshape(buffer.shape) % 3, POISON, -POISON).astype(buffer.dtype)
        copies[spec.name] = np.where(outside[:, None, :, None], signs, buffer)
    return copies


def run(evaluator: ReferenceEvaluator, signature: Signature, feeds: Tensors) -> Tensors:
    names = [spec.name for spec in signature.outputs]
    return dict(zip(names, evaluator.run(names, dict(feeds)), strict=True))


def assert_equal_within(got: Tensors, expected: Tensors, names: dict[str, str], lengths: IntArray) -> None:
    """Tensors [B, H, positions, D], `names` of `got` to those of `expected`, agree within the rows' lengths."""
    for name, past in names.items():
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                got[name][row, :, :length], expected[past][row, :, :length], rtol=0, atol=FLOAT32_NOISE
            )


def test_onnxs_own_evaluator_gives_the_encoder_outputs_of_eager(
    tiny: Transformer, standard_bundle: Path, dimensions: Dimensions, input_ids: IntArray
) -> None:
    signature = encoder_signature(dimensions)
    evaluator = ReferenceEvaluator(onnx.load(standard_bundle / ENCODER_FILE))
    got = run(evaluator, signature, {"input_ids": input_ids, "source_lengths": SOURCE_LENGTHS})
    expected = TorchBackend(tiny).encode(input_ids, SOURCE_LENGTHS)
    assert_equal_within(got, expected, signature.presents, SOURCE_LENGTHS)


def test_onnxs_own_evaluator_gives_the_steps_of_eager(
    tiny: Transformer, standard_bundle: Path, dimensions: Dimensions, input_ids: IntArray
) -> None:
    signature = step_signature(dimensions, StepFeatures())
    evaluator = ReferenceEvaluator(onnx.load(standard_bundle / STEP_FILE))
    random, eager = np.random.default_rng(1), TorchBackend(tiny)
    cache = cache_of(eager, input_ids)
    step = eager.bind(cache)
    for number in range(CAPACITY):
        ids = random.integers(0, tiny.config.target_vocab_size, 3)
        lengths = {"past_lengths": cache.lengths, "source_lengths": cache.source_lengths}
        got = run(evaluator, signature, {"input_ids": ids, **lengths, **poisoned(cache)})
        np.testing.assert_allclose(got["logits"], step(ids).logits, rtol=0, atol=FLOAT32_NOISE)
        cache.advance()
        assert_equal_within(got, cache.buffers, signature.presents, cache.lengths)
        if number in (1, 4):
            cache.lengths[number // 2] = 0  # a row begins anew
    assert len(set(cache.lengths.tolist())) == 3


@pytest.mark.parametrize("name", [ENCODER_FILE, STEP_FILE, BEAMS_FILE])
def test_a_graph_needs_nothing_but_opset_24(standard_bundle: Path, name: str) -> None:
    model = onnx.load(standard_bundle / name)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert model.ir_version == 12
    onnx.checker.check_model(model, full_check=True)


def test_the_step_uses_the_operators_made_for_a_cache(tiny: Transformer, standard_bundle: Path) -> None:
    used = [node.op_type for node in onnx.load(standard_bundle / STEP_FILE).graph.node]
    layers = tiny.config.decoder_layers
    assert used.count("TensorScatter") == 2 * layers
    assert used.count("Attention") == 2 * layers
    assert "Concat" not in used


@pytest.mark.parametrize("name", [ENCODER_FILE, STEP_FILE, BEAMS_FILE])
def test_a_graph_says_nothing_about_the_machine_that_wrote_it(standard_bundle: Path, name: str) -> None:
    content = (standard_bundle / name).read_bytes()
    for path in (ROOT, Path.home(), Path(sys.prefix), Path(torch.__file__).parent, standard_bundle.parent):
        assert str(path).encode() not in content
    assert b".py" not in content
    assert f"/{getpass.getuser()}/".encode() not in content


@pytest.mark.parametrize("name", [ENCODER_FILE, STEP_FILE, BEAMS_FILE])
def test_a_graph_carries_no_metadata_of_its_exporter(standard_bundle: Path, name: str) -> None:
    model = onnx.load(standard_bundle / name)
    graph = model.graph
    parts = [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    assert not [part.name for part in parts if part.metadata_props or part.doc_string]
    assert not model.metadata_props
    assert not model.doc_string


@pytest.mark.parametrize("name", [ENCODER_FILE, STEP_FILE, BEAMS_FILE])
def test_names_types_and_axes_are_the_contracts(standard_bundle: Path, dimensions: Dimensions, name: str) -> None:
    graph = onnx.load(standard_bundle / name).graph
    expected = {
        ENCODER_FILE: encoder_signature(dimensions),
        STEP_FILE: step_signature(dimensions, StepFeatures()),
        BEAMS_FILE: step_signature(dimensions, StepFeatures().beams),
    }[name]
    for values, specs in ((graph.input, expected.inputs), (graph.output, expected.outputs)):
        got = [(value.name, ELEMENT_TYPES[value.type.tensor_type.elem_type], axes(value)) for value in values]
        assert got == [(spec.name, spec.dtype, spec.axes) for spec in specs]


def axes(value: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize(("rows", "source", "capacity"), [(1, 1, 1), (1, 7, 2), (6, 1, 20)])
def test_the_free_axes_are_free(
    tiny: Transformer, standard_bundle: Path, dimensions: Dimensions, rows: int, source: int, capacity: int
) -> None:
    backend, eager = OnnxBackend(standard_bundle, dimensions, StepFeatures(), threads=1), TorchBackend(tiny)
    random = np.random.default_rng(2)
    sources = random.integers(0, tiny.config.source_vocab_size, (rows, source))
    logits = {}
    for one in (backend, eager):
        cache = KVCache(one.cache_specs, Capacity(rows, capacity, source))
        tensors = one.encode(sources, np.full(rows, source))
        for index in range(rows):
            cache.admit(EncodedSource(tensors, index, source))
        logits[one.name] = one.bind(cache)(np.full(rows, 3)).logits
    np.testing.assert_allclose(logits["onnx"], logits["torch"], rtol=0, atol=FLOAT32_NOISE)


@pytest.fixture(scope="module")
def step_alone(tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step that shares no weights."""
    folder: Path = tmp_path_factory.mktemp("step")
    write_onnx(StepGraph(tiny, StandardOperators()), folder / STEP_FILE)
    return folder


def test_large_weights_lie_beside_the_graph(standard_bundle: Path, step_alone: Path) -> None:
    for path in (standard_bundle / ENCODER_FILE, standard_bundle / STEP_FILE, step_alone / STEP_FILE):
        external = [
            entry.value
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        ]
        assert set(external) == {f"{path.name}.data"}


def inside(path: Path) -> dict[str, int]:
    """The bytes of every tensor that lies in the graph's own file."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    tensors = [*graph.initializer, *constants]
    return {one.name: one.ByteSize() for one in tensors if one.data_location != onnx.TensorProto.EXTERNAL}


def test_large_weights_that_cannot_be_shared_lie_beside_their_graph_too(
    tiny: Transformer, step_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LARGEST_INSIDE", 512)
    shutil.copytree(step_alone, tmp_path, dirs_exist_ok=True)
    other = copy.deepcopy(tiny)
    other.head.weight = torch.nn.Parameter(tiny.head.weight * 2, requires_grad=False)
    write_onnx(StepGraph(other, StandardOperators()), tmp_path / CHUNK_FILE, weights_of=tmp_path / STEP_FILE)
    assert max(inside(tmp_path / CHUNK_FILE).values()) < 1024
    assert external_files(tmp_path / CHUNK_FILE) == {f"{STEP_FILE}.data", f"{CHUNK_FILE}.data"}
    assert (tmp_path / f"{CHUNK_FILE}.data").stat().st_size == other.head.weight.nbytes
    session = onnxruntime.InferenceSession(tmp_path / CHUNK_FILE, providers=["CPUExecutionProvider"])
    for model in (tiny, other):
        eager = TorchBackend(model)
        cache = cache_of(eager, np.ones((3, 6), np.int64))
        feeds = {"input_ids": np.full(3, 4), "past_lengths": cache.lengths, "source_lengths": SOURCE_LENGTHS}
        logits = session.run(["logits"], {**feeds, **cache.buffers})[0]
        expected = eager.bind(cache)(np.full(3, 4)).logits
        assert np.allclose(logits, expected, rtol=0, atol=FLOAT32_NOISE) == (model is other)


def test_a_large_model_does_not_store_what_it_shares(
    tiny: Transformer, step_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond this size torch's own writing copies every weight beside each graph."""
    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    shutil.copytree(step_alone, tmp_path, dirs_exist_ok=True)
    write_onnx(StepGraph(tiny, StandardOperators()), tmp_path / CHUNK_FILE, weights_of=tmp_path / STEP_FILE)
    assert {path.name for path in tmp_path.iterdir()} == {STEP_FILE, f"{STEP_FILE}.data", CHUNK_FILE}


@pytest.mark.parametrize("name", ["attention", "loop", "numbers", "shortlist", "standard"])
def test_no_graph_of_a_bundle_holds_a_large_tensor(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{name}_bundle")
    largest = {path.name: max(inside(path).values(), default=0) for path in folder.glob("*.onnx")}
    assert largest
    assert max(largest.values()) <= LARGEST_INSIDE + 1024, largest
