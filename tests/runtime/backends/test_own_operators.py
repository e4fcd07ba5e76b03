"""Bundles with kvx's own operators, and the same without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvx import BundleError, Translator
from kvx.runtime import kernels
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.files import FileEntry
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.graphs import OWN_STEP_FILE
from kvx.runtime.bundle.manifest import MANIFEST_FILE, Manifest

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="kvx was installed without its own operators")
TEXTS = ["one", "two hundred", "nine hundred and ninety-nine", "twelve thousand three hundred and four"]


def backend_of(bundle: Path, *, own: bool = True) -> OnnxBackend:
    """The backend of a bundle."""
    manifest = Manifest.read(bundle)
    return OnnxBackend(bundle, manifest.dimensions, manifest.features, own=own)


def test_they_are_used_where_the_bundle_and_the_machine_have_them(
    numbers_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend_of(numbers_bundle).instructions == kernels.instructions()
    assert backend_of(numbers_bundle, own=False).instructions is None
    assert f"kvx's own operators: used on the CPU here, with {kernels.instructions()}" in describe(
        Bundle.open(numbers_bundle)
    )
    older = shutil.copytree(numbers_bundle, tmp_path / "older")
    (older / OWN_STEP_FILE).unlink()
    values = json.loads((older / MANIFEST_FILE).read_text())
    del values["files"][OWN_STEP_FILE], values["graphs"]["decoder_kernels"]
    del values["product_bits"], values["operators"]
    (older / MANIFEST_FILE).write_text(json.dumps(values))
    assert "kvx's own operators: the bundle has no graphs with them" in describe(Bundle.open(older))
    assert Translator.load(older, threads=1).translate(["twelve"])[0].text == "zwölf"
    later = shutil.copytree(numbers_bundle, tmp_path / "later")
    values = json.loads((later / MANIFEST_FILE).read_text())
    (later / MANIFEST_FILE).write_text(json.dumps(values | {"operators": kernels.VERSION + 1}))
    assert any("they are of version 2, and this kvx has version 1" in line for line in describe(Bundle.open(later)))
    assert Translator.load(later, threads=1).translate(["twelve"])[0].text == "zwölf"
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert kernels.library() is None
    assert backend_of(numbers_bundle).instructions is None
    assert any("not used here" in line for line in describe(Bundle.open(numbers_bundle)))


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"beam_size": 4, "rows": 8}, {"rows": 1}])
def test_translations_and_scores_are_those_without_them(
    numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    own = Translator.load(numbers_bundle, threads=1).translate(TEXTS, scores=True, **options)
    monkeypatch.setenv(kernels.SWITCH, "0")
    plain = Translator.load(numbers_bundle, threads=1).translate(TEXTS, scores=True, **options)
    assert [one.ids for one in own] == [one.ids for one in plain]
    for one, other in zip(own, plain, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_graph_with_them_that_is_another_ones_is_refused(numbers_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(numbers_bundle, tmp_path / "bundle")
    shutil.copyfile(bundle / "encoder.onnx", bundle / OWN_STEP_FILE)
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    entry = FileEntry.of(bundle / OWN_STEP_FILE)
    values["files"][OWN_STEP_FILE] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"decoder_kernels\.onnx has the inputs"):
        Translator.load(bundle, threads=1)


def test_unknown_product_bits_are_refused(numbers_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(numbers_bundle, tmp_path / "bundle")
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps(values | {"product_bits": 6}))
    with pytest.raises(BundleError, match="product_bits"):
        Bundle.open(bundle)
