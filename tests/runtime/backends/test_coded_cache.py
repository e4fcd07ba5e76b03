"""Bundles whose cache is in codes of 8 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvx import BundleError, Translator
from kvx.runtime import kernels
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE, Manifest

TEXTS = [
    *("one", "two hundred", "nine hundred and ninety-nine", "twelve thousand three hundred and four"),
    *("eleven", "forty thousand and two", "six hundred and sixty-six thousand", "seventy-one thousand and ninety"),
]


@pytest.fixture(scope="module")
def translator(coded_bundle: Path) -> Translator:
    return Translator.load(coded_bundle, threads=1)


def test_its_targets_take_a_byte_a_channel_and_a_step(coded_bundle: Path, numbers_bundle: Path) -> None:
    manifest = Manifest.read(coded_bundle)
    model = manifest.model
    backend = OnnxBackend(coded_bundle, manifest.dimensions, manifest.features)
    own = [spec for spec in backend.cache_specs if "T" in spec.axes]
    assert {(spec.dtype, spec.axes[-1]) for spec in own} == {("int8", model["decoder_head_width"] + 4)}
    a_token = 2 * model["decoder_layers"] * model["decoder_heads"] * (model["decoder_head_width"] + 4)
    assert sum(spec.bytes({"B": 1, "T": 1}) for spec in own) == a_token
    said = f"cache bytes per target token {a_token:,} in codes of 8 bits"
    assert any(said in line for line in describe_of(coded_bundle))
    assert not any("in codes" in one for one in describe_of(numbers_bundle))


def describe_of(bundle: Path) -> list[str]:
    """What `kvx inspect` says of a bundle."""
    return list(describe(Bundle.open(bundle)))


@pytest.mark.parametrize("options", [{}, {"beam_size": 4}])
def test_its_translations_are_nearly_those_of_float32(
    translator: Translator, numbers_translator: Translator, options: dict[str, Any]
) -> None:
    got, expected = (one.translate(TEXTS, scores=True, **options) for one in (translator, numbers_translator))
    assert [one.text for one in got] == [one.text for one in expected]
    scores = [np.array([one.score for one in those], float) for those in (got, expected)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.05


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_text_gets_the_same_to_the_last_bit_alone_and_among_others(
    coded_bundle: Path, threads: int, options: dict[str, Any]
) -> None:
    translator = Translator.load(coded_bundle, threads=threads)
    together = translator.translate(TEXTS, scores=True, **options)
    for text, among in zip(TEXTS, together, strict=True):
        [alone] = translator.translate([text], scores=True, **options)
        assert (alone.ids, alone.score) == (among.ids, among.score)


def test_a_given_target_gets_the_scores_of_its_translation(translator: Translator) -> None:
    translated = translator.translate(TEXTS, scores=True)
    scored = translator.score(TEXTS, [one.text for one in translated])
    for one, other in zip(scored, translated, strict=True):
        assert one.sum == pytest.approx(other.score, abs=1e-6)


def test_without_kvxs_own_operators_it_computes_in_float32(
    coded_bundle: Path, numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.SWITCH, "0")
    got, expected = (
        Translator.load(bundle, threads=1).translate(TEXTS, scores=True) for bundle in (coded_bundle, numbers_bundle)
    )
    assert [(one.ids, one.score) for one in got] == [(one.ids, one.score) for one in expected]


def test_other_bits_are_refused(coded_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(coded_bundle, tmp_path / "bundle")
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    values["features"]["cache_bits"] = 5
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"features\.cache_bits"):
        Bundle.open(bundle)
