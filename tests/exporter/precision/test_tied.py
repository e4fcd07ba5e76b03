"""A weight that serves both as an embedding and as the output projection is exported right in every precision."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kvx.exporter import graphs
from kvx.exporter.graphs import write_graphs
from kvx.exporter.options import ExportOptions
from kvx.exporter.progress import Progress
from kvx.exporter.proof import checks
from kvx.exporter.proof.checks import Case
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.writing.graphs import StepGraph
from kvx.exporter.writing.onnx import HEAD, _weights
from kvx.models.config import ModelConfig
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.bundle.graphs import BEAMS, CHUNK, ENCODER, STEP, Graph
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.bundle.precision import PRECISIONS, Precision
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.tests.conftest import TINY

IDS = SpecialIds(pad=0, bos=1, eos=2)


@pytest.fixture
def tied(tiny: Transformer) -> Transformer:
    """The tiny model, whose target embedding and head share one parameter."""
    model = copy.deepcopy(tiny)
    model.target_embedding.tokens.weight = nn.Parameter(tiny.head.weight.clone() * 4, requires_grad=False)
    model.head.weight = model.target_embedding.tokens.weight
    return model


@pytest.mark.parametrize(
    ("precision", "left_out"),
    [
        ("int8", (BEAMS, CHUNK)),
        *(pytest.param(name, (), marks=pytest.mark.proof) for name in ("fp32", "fp16", "int8", "int4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "some" if value else "all",
)
def test_a_tied_model_passes_its_proof(
    tied: Transformer,
    tiny_bundle: Path,
    tmp_path: Path,
    precision: Precision,
    left_out: tuple[Graph, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "RECIPES", [one for one in graphs.RECIPES if one.graph not in left_out])
    options = ExportOptions(
        checkpoint=tmp_path / "none", format="onnx", precision=precision, lowering="ort", shortlist=True
    )
    features = options.features(tied.config.decoder_layers)
    write_graphs(tmp_path, options, tied, Framing.plain(IDS, IDS), features, Progress())
    dimensions = Dimensions.of_model(tied.config.to_dict(), PRECISIONS[precision].element)
    backend = OnnxBackend(tmp_path, dimensions, features, threads=1)
    plan = Plan.of(Manifest.read(tiny_bundle), cache_specs(dimensions))
    case = Case(tied, backend, plan, ParityOptions(steps=6), precision=precision, folder=tmp_path)
    assert [check for check in checks.prove(case) if not check.passed] == []
    assert np.load(tmp_path / "projection.npy").dtype == np.float32
    if PRECISIONS[precision].quantized:
        names = [tensor.name for tensor in onnx.load(tmp_path / "decoder_step.onnx").graph.initializer]
        assert len(names) == len(set(names))
        assert [name for name in names if name.endswith((".int8", ".int4")) and "head" in name] == [
            f"{HEAD}.{precision}"
        ]
        assert not [name for name in names if "target_embedding.tokens" in name]


def test_what_calibration_saw_of_a_tied_weight_is_found_by_either_name(tied: Transformer) -> None:
    tied.head.largest_input = 3.0
    weights = _weights(StepGraph(tied))
    assert weights["model.head.weight"] == weights["model.target_embedding.tokens.weight"] == 3.0
    assert weights["model.source_embedding.tokens.weight"] is None


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(name, marks=pytest.mark.proof) for name in ("int8", "fp16", "int4"))]
)
def test_a_table_of_both_sides_and_the_head_stands_once_in_a_bundle(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "RECIPES", [one for one in graphs.RECIPES if one.graph in (ENCODER, STEP)])
    torch.manual_seed(0)
    sizes = {**TINY, "source_vocab_size": 67, "target_vocab_size": 67}
    model = Transformer(ModelConfig(**sizes, shared_embeddings=True, tied_head=True)).eval()
    model.requires_grad_(requires_grad=False)
    options = ExportOptions(checkpoint=tmp_path / "none", format="onnx", precision=precision)
    write_graphs(tmp_path, options, model, Framing.plain(IDS, IDS), StepFeatures(), Progress())
    found = {
        file: places(tmp_path / file, 67 * sizes["d_model"] // 2) for file in ("encoder.onnx", "decoder_step.onnx")
    }
    assert found["encoder.onnx"] == found["decoder_step.onnx"]
    assert len(found["encoder.onnx"]) == 1


def places(file: Path, least: int) -> set[tuple[str, str]]:
    """Where the tensors of the head's weight with at least so many elements are stored."""
    held = onnx.load(file, load_external_data=False).graph.initializer
    large = [one for one in held if one.name.startswith(HEAD) and np.prod(one.dims) >= least]
    entries = [{entry.key: entry.value for entry in one.external_data} for one in large]
    return {(entry["location"], entry["offset"]) for entry in entries}
