"""Every family with everything that docs/models.md says it has, each cell of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvx import Translator

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.exporter.proof.limits import ParityOptions
from kvx.runtime import kernels
from kvx.tests.families import BEAMS, Exported, Made, make, sentences

pytestmark = pytest.mark.usefixtures("operators_listed_once")
TEXTS = sentences(8, 77)
# Marian stands for all that is post-norm without a norm of embeddings.
CELLS: dict[str, dict[str, Any]] = {
    "onnx and torchscript, attention, shortlist": {"attention": True, "shortlist": True},
    "standard": {"format": "onnx", "lowering": "standard", "attention": True, "loop": True},
    "fp16": {"precision": "fp16", "shortlist": True, "loop": True},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8", "attention": True, "shortlist": True},
    "int4": {"precision": "int4", "shortlist": True},
    "cache in 8 bits": {"format": "onnx", "cache_precision": "int8"},
}
GATED = ("flan", "umt5")  # both factors of a gate have few bits, and their errors multiply
WIDER = {"int4": 0.5, "int8": 0.2}  # the tolerances for them, whose tiny random weights leave nothing to average
FAMILIES = ("marian", "marian-apart", "nllb", "bart", "mbart25", "pegasus", "t5", "flan", "umt5")
# In 16 bits and in standard operators a family is the sum of its parts: norms after or before, of embeddings, relative.
FEWER: dict[str, tuple[str, ...]] = {
    "standard": ("marian", "nllb", "bart", "t5", "umt5"),
    "fp16": ("marian", "nllb", "t5"),
    "bf16": ("bart", "flan"),
    "cache in 8 bits": ("t5",),  # with a bias of scores
}


@pytest.fixture(scope="module", params=FAMILIES)
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Weights as a model begins with them: those of a tiny one that has learnt a task are too few for 4 bits."""
    return make(request.param, tmp_path_factory.mktemp("untrained") / "model", 1, steps=0)


@pytest.mark.proof
@pytest.mark.parametrize("cell", CELLS)
def test_every_family_has_it_with_its_proof(untrained: Made, cell: str, tmp_path: Path) -> None:
    if untrained.name not in FEWER.get(cell, FAMILIES):
        pytest.skip(f"{untrained.name} has no part that others do not have in {cell}")
    if "cache_precision" in CELLS[cell] and kernels.library() is None:
        pytest.skip("kvx was installed without its own operators")
    parity = ParityOptions(tolerance=WIDER.get(cell) if untrained.name in GATED else None)
    options = ExportOptions(checkpoint=untrained.folder, output=tmp_path / "bundle", parity=parity, **CELLS[cell])
    manifest = export(options)
    assert manifest.parity is not None
    assert manifest.parity["passed"]
    assert manifest.family == untrained.model.config.model_type
    assert ("decoder_shortlist" in manifest.graphs) is CELLS[cell].get("shortlist", False)
    assert (manifest.features.attention is not None) is CELLS[cell].get("attention", False)
    if CELLS[cell].get("precision") != "bf16":  # which no CPU computes
        _translates(untrained, tmp_path / "bundle", cell)


def _translates(made: Made, bundle: Path, cell: str) -> None:
    """With every backend of the bundle. In float32 the ids are those of the original, otherwise there are some."""
    target = made.languages[0]
    exact = {"precision", "cache_precision"}.isdisjoint(CELLS[cell])
    for backend in Translator.load(bundle).manifest.formats:
        found = Exported(made, Translator.load(bundle, backend=backend))
        for beams, options in ((1, {"beam_size": 1}), (4, BEAMS)):
            ids = found.ids(TEXTS, target, options, rows=8)
            assert all(ids)
            assert not exact or ids == [made.generate(text, target, num_beams=beams) for text in TEXTS], backend
