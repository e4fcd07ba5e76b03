"""Every family from a folder of the original library to translations, whose ids are those of `generate`."""

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
from kvx.tests.families import BEAMS, KINDS, Exported, make, sentences, translation

pytestmark = pytest.mark.usefixtures("operators_listed_once")
TEXTS = sentences(64, 77)
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


@pytest.mark.proof
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_relative_positions_never_run_out(name: str, tmp_path: Path) -> None:
    """Far beyond 512 tokens; since no two may come twice in the same order, the target is not one token repeated. The
    token that a target begins with, which the original counts among these, is kept out.
    """
    made = make(name, tmp_path / "model", 1, steps=0)
    export(ExportOptions(checkpoint=made.folder, output=tmp_path / "bundle", format="onnx"))
    exported = Exported(made, Translator.load(tmp_path / "bundle", threads=1))
    wanted = {"min_new_tokens": 600, "max_new_tokens": 600, "no_repeat_ngram_size": 2, "suppress_tokens": [0]}
    expected = [made.generate(text, None, **wanted) for text in TEXTS[:3]]
    assert all(len(set(ids)) > 50 for ids in expected)
    for rows in (1, 3):
        ours = {"min_new_tokens": 600, "max_new_tokens": 600, "no_repeated_ngrams": 2, "suppress": (0,)}
        assert exported.ids(TEXTS[:3], None, ours, rows=rows) == expected
