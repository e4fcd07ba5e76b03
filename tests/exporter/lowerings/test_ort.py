"""The `ort` lowering: the same contract, in ONNX Runtime's own operators."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.writing.graphs import EncoderGraph, StepGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.config import ModelConfig
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import ENCODER_FILE, STEP_FILE, OnnxBackend
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.bundle.signature import Dimensions, StepFeatures
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

FLOAT32_NOISE = 2e-5


@pytest.fixture(scope="module")
def used(tiny_bundle: Path) -> dict[str, int]:
    """How often the step has each operator."""
    return collections.Counter(node.op_type for node in onnx.load(tiny_bundle / STEP_FILE).graph.node)


def test_both_attentions_of_a_layer_are_one_operator(tiny: Transformer, used: dict[str, int]) -> None:
    assert used["GroupQueryAttention"] == 2 * tiny.config.decoder_layers
    assert used["TensorScatter"] == used["Attention"] == used["Transpose"] == used["Split"] == 0


def test_queries_keys_and_values_come_from_one_product(tiny: Transformer, used: dict[str, int]) -> None:
    packed, output, query, merged, up, down = (1,) * 6
    assert used["Gemm"] == (packed + output + query + merged + up + down) * tiny.config.decoder_layers + 1


def test_what_serves_all_layers_is_there_once(used: dict[str, int]) -> None:
    two_lengths, two_capacities = 2, 2
    assert used["Cast"] <= two_lengths + two_capacities
    assert used["Gather"] == 2  # the token's embedding and its position's
    assert used["ConstantOfShape"] == used["Concat"] == 1


def test_it_differs_from_the_standard_one_in_the_step_alone(tiny_bundle: Path, standard_bundle: Path) -> None:
    def operators(folder: Path) -> list[str]:
        return [node.op_type for node in onnx.load(folder / ENCODER_FILE).graph.node]

    assert operators(tiny_bundle) == operators(standard_bundle)


def test_the_manifest_says_that_the_source_is_given_back(tiny_bundle: Path, standard_bundle: Path) -> None:
    ort, standard = Manifest.read(tiny_bundle), Manifest.read(standard_bundle)
    assert (ort.lowering, ort.features.source_presents) == ("ort", True)
    assert (standard.lowering, standard.features.source_presents) == ("standard", False)


def test_heads_that_the_fused_operator_does_not_take_go_the_standard_way(tmp_path: Path) -> None:
    config = ModelConfig(
        source_vocab_size=11,
        target_vocab_size=13,
        d_model=12,
        encoder_heads=3,
        decoder_heads=3,
        encoder_d_ff=20,
        decoder_d_ff=20,
        encoder_layers=1,
        decoder_layers=2,
        source_positions=9,
        target_positions=9,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model, features = Transformer(config).eval(), StepFeatures(source_presents=True)
    ops = OrtOperators(model)
    write_onnx(EncoderGraph(model, ops), tmp_path / ENCODER_FILE)
    write_onnx(StepGraph(model, ops, features), tmp_path / STEP_FILE)
    backend = OnnxBackend(tmp_path, Dimensions.of_model(config.to_dict()), features, threads=1)
    assert_step_of_eager(model, backend, rows=3, source=5, capacity=6)


@pytest.mark.parametrize(("rows", "source", "capacity"), [(1, 1, 1), (3, 6, 9), (5, 2, 17)])
def test_any_rows_source_and_capacity_give_the_step_of_eager(
    tiny: Transformer, tiny_bundle: Path, rows: int, source: int, capacity: int
) -> None:
    manifest = Manifest.read(tiny_bundle)
    backend = OnnxBackend(tiny_bundle, manifest.dimensions, manifest.features, threads=1)
    assert_step_of_eager(tiny, backend, rows, source, capacity)


def assert_step_of_eager(model: Transformer, backend: OnnxBackend, rows: int, source: int, capacity: int) -> None:
    """Logits after `capacity` steps, and the sources' keys, are those of eager."""
    random = np.random.default_rng(rows)
    input_ids = random.integers(0, model.config.source_vocab_size, (rows, source))
    lengths = np.full(rows, source)
    logits, sources = [], []
    for tried in (TorchBackend(model), backend):
        cache = KVCache(tried.cache_specs, Capacity(rows, capacity, source))
        encoded = tried.encode(input_ids, lengths)
        for row in range(rows):
            cache.admit(EncodedSource(encoded, row, source))
        step = tried.bind(cache)
        for position in range(capacity):
            last = step(np.full(rows, position)).logits.copy()
            cache.advance()
        logits.append(last)
        sources.append(cache.buffers["past_key_values.0.encoder.key"])
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=FLOAT32_NOISE)
    np.testing.assert_allclose(sources[1], sources[0], rtol=0, atol=FLOAT32_NOISE)
