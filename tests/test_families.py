"""Every family from a folder of the original library to translations, whose ids are those of `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvx import Translator

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.tests.families import KINDS, Made, make, sentences, translation

TEXTS = sentences(64, 77)
BEAMS = {"beam_size": 4, "early_stopping": False, "beam_rules": "transformers"}
SEARCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as the original and as kvx has it
    "greedy": ({"num_beams": 1}, {"beam_size": 1}),
    "beams": ({"num_beams": 4}, BEAMS),
    "early": (
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {**BEAMS, "early_stopping": True, "length_penalty": 2.0},
    ),
    "short": ({"num_beams": 4, "max_length": 5}, {**BEAMS, "max_new_tokens": 4}),
    "ngrams": (
        {"num_beams": 3, "no_repeat_ngram_size": 2, "min_length": 6},
        {**BEAMS, "beam_size": 3, "no_repeated_ngrams": 2, "min_new_tokens": 6},
    ),
}
SEVERAL_ROWS = ("greedy", "beams")


@dataclass(frozen=True)
class Exported:
    """A model, and the translator of its bundle."""

    made: Made
    translator: Translator

    def ids(self, texts: list[str], target: str | None, options: dict[str, Any], **more: Any) -> list[list[int]]:  # noqa: ANN401
        source = self.made.source_language if self.translator.manifest.languages.source else None
        forced = len(self.made.start_ids(target)) - 1
        counted = {
            name: value - forced if name in ("max_new_tokens", "min_new_tokens") else value
            for name, value in options.items()
        }
        found = self.translator.translate(texts, source_language=source, target_language=target, **counted, **more)
        return [list(one.ids) for one in found]


@pytest.fixture(scope="module", params=[(name, seed) for name in KINDS for seed in (0, 1)], ids=str)
def exported_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, seed = request.param
    folder: Path = tmp_path_factory.mktemp("family")
    made = make(name, folder / "model", seed, tied=seed == 0)
    manifest = export(ExportOptions(checkpoint=made.folder, output=folder / "bundle", format="onnx"))
    assert manifest.parity is not None
    assert manifest.parity["passed"]
    return Exported(made, Translator.load(folder / "bundle", threads=1))


@pytest.mark.proof
@pytest.mark.parametrize("search", SEARCHES)
def test_ids_are_those_of_the_original(exported_family: Exported, search: str) -> None:
    original, ours = SEARCHES[search]
    for target in exported_family.made.languages:
        expected = [exported_family.made.generate(text, target, **original) for text in TEXTS]
        assert len({tuple(ids) for ids in expected}) > len(set(TEXTS)) / 2  # different sources, different answers
        for rows in (4, 12, 64) if search in SEVERAL_ROWS else (64,):
            assert exported_family.ids(TEXTS, target, ours, rows=rows) == expected, rows
        if search == "greedy":
            assert exported_family.ids(TEXTS, target, ours, rows=1) == expected
            assert exported_family.ids(TEXTS, target, ours, rows=3) == expected


@pytest.mark.proof
def test_models_have_learnt_the_task(exported_family: Exported) -> None:
    made = exported_family.made
    source = made.source_language if exported_family.translator.manifest.languages.source else None
    for target in made.languages:
        found = exported_family.translator.translate(TEXTS, source_language=source, target_language=target, beam_size=1)
        right = [one.text == translation(text, target, made.kind) for one, text in zip(found, TEXTS, strict=True)]
        assert sum(right) > 0.5 * len(TEXTS)


# What docs/models.md says that every family has. Marian stands for all that is post-norm without a norm of embeddings.
CELLS: dict[str, dict[str, Any]] = {
    "onnx and torchscript, attention, shortlist": {"attention": True, "shortlist": True},
    "standard": {"format": "onnx", "lowering": "standard", "attention": True, "loop": True},
    "fp16": {"precision": "fp16", "shortlist": True, "loop": True},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8", "attention": True, "shortlist": True},
    "int4": {"precision": "int4", "shortlist": True},
}
FAMILIES = ("marian", "marian-apart", "nllb", "bart", "mbart25", "pegasus")


@pytest.fixture(scope="module", params=FAMILIES)
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Weights as a model begins with them: those of a tiny one that has learnt a task are too few for 4 bits."""
    return make(request.param, tmp_path_factory.mktemp("untrained") / "model", 1, steps=0)


@pytest.mark.proof
@pytest.mark.parametrize("cell", CELLS)
def test_every_family_has_it_with_its_proof(untrained: Made, cell: str, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=untrained.folder, output=tmp_path / "bundle", **CELLS[cell])
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
    target, texts = made.languages[0], TEXTS[:8]
    exact = "precision" not in CELLS[cell]
    for backend in Translator.load(bundle).manifest.formats:
        found = Exported(made, Translator.load(bundle, backend=backend))
        for beams, options in ((1, {"beam_size": 1}), (4, BEAMS)):
            ids = found.ids(texts, target, options, rows=8)
            assert all(ids)
            assert not exact or ids == [made.generate(text, target, num_beams=beams) for text in texts], backend
