"""The bundles of the first release load, translate to the ids that it gave, and are described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvx import BundleError, Translator
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE, Manifest

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "format-1"
BUNDLES = ("both", "attentive")
RUNNABLE = [("both", "onnx"), ("both", "torchscript"), ("attentive", "onnx")]


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURE / "answers.json").read_text(encoding="utf-8"))
    return found


def load(name: str, backend: str) -> Translator:
    if backend == "torchscript":
        pytest.importorskip("torch")
    return Translator.load(FIXTURE / name, backend=backend, threads=1)


def test_the_manifests_are_those_of_the_first_release() -> None:
    for name in BUNDLES:
        values = json.loads((FIXTURE / name / MANIFEST_FILE).read_text(encoding="utf-8"))
        assert (values["format_version"], values["kvx_version"]) == (1, "0.1.0")
        assert values["features"]["next_ids"] is False  # a feature that no export had


@pytest.mark.parametrize("name", BUNDLES)
def test_every_file_is_as_it_was_written(name: str) -> None:
    Bundle.open(FIXTURE / name).check_hashes()


@pytest.mark.parametrize(("name", "backend"), RUNNABLE)
def test_translations_are_those_of_the_release(name: str, backend: str, answers: dict[str, Any]) -> None:
    translator, expected = load(name, backend), answers[name]
    assert [list(found.ids) for found in translator.translate(expected["texts"])] == expected["greedy"]
    assert [list(found.ids) for found in translator.translate(expected["texts"], beam_size=3)] == expected[
        "beam_size=3"
    ]


def test_alignments_are_those_of_the_release(answers: dict[str, Any]) -> None:
    expected = answers["attentive"]
    found = load("attentive", "onnx").translate(expected["texts"], align=True)
    assert [list(one.alignment or ()) for one in found] == expected["alignment"]


def test_all_its_graphs_are_the_contracts() -> None:
    from kvx.runtime.backends.onnx import OnnxBackend

    for name in BUNDLES:
        manifest = Manifest.read(FIXTURE / name)
        backend = OnnxBackend(FIXTURE / name, manifest.dimensions, manifest.features, threads=1)
        backend.load()
        assert backend.query_tokens
        assert (backend.shortlisting is not None) is (name == "attentive")


def test_its_checkpoint_can_be_read() -> None:
    pytest.importorskip("torch")
    from kvx.models.importers import load_checkpoint

    checkpoint = load_checkpoint(FIXTURE / "both" / "model.pt")
    assert checkpoint.model.config.to_dict().items() >= Manifest.read(FIXTURE / "both").model.items()
    assert checkpoint.max_new_tokens == 18


@pytest.mark.parametrize("name", BUNDLES)
def test_it_is_described(name: str) -> None:
    lines = list(describe(Bundle.open(FIXTURE / name)))
    assert lines[0].endswith("by kvx 0.1.0")
    assert "fp32, lowering ort, opset 24" in lines[2]
    assert any(line.startswith("parity with eager PyTorch: passed") for line in lines)
    graphs = {"encoder", "decoder_step", "decoder_chunk", "decoder_beams"}
    assert graphs | ({"decoder_shortlist"} if name == "attentive" else set()) <= set(lines)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the manifest with a change."""
    shutil.copytree(FIXTURE / "both", folder)
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(values)
    (folder / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(memory={"peak": 1}),
        lambda values: values["limits"].update(cache_bytes_per_row=1),
        lambda values: values["graphs"]["encoder"].update(nodes=100),
        lambda values: values["graphs"].update(decoder_draft={"inputs": [], "outputs": []}),
        lambda values: values["features"].update(draft_tokens=False),
        lambda values: values["features"].update(draft_layer=None),
        lambda values: values["target_ids"].update(unk=0),
        lambda values: values["files"]["encoder.onnx"].update(blake3="0"),
    ],
    ids=["a field", "a limit", "of a graph", "a graph", "a feature", "an unset feature", "an id", "of a file"],
)
def test_what_a_later_release_may_write_beside_is_passed_over(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert Bundle.open(changed(tmp_path / "bundle", change)).manifest == Manifest.read(FIXTURE / "both")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["features"].update(next_ids=True),
        lambda values: values["features"].update(draft_tokens=3),
        lambda values: values["limits"].update(source_positions=1),
        lambda values: values["graphs"].pop("decoder_chunk"),
        lambda values: values["graphs"]["encoder"].pop("outputs"),
        lambda values: values.update(precision="fp64"),
        lambda values: values.update(precision=["fp32"]),
    ],
    ids=["next ids", "an unknown feature", "a limit", "no graph", "no outputs", "a precision", "a list"],
)
def test_what_this_release_cannot_run_or_what_contradicts_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(changed(tmp_path / "bundle", change))


def test_the_name_of_a_precision_in_the_earliest_manifests_is_understood(tmp_path: Path) -> None:
    folder = changed(tmp_path / "bundle", lambda values: values.update(precision="float32"))
    assert Manifest.read(folder).precision == "fp32"
