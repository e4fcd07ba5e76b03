"""What a CUDA device gives, against the CPU, in float32: the same tokens, whatever the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvx import Translator
from kvx.runtime.backends.device import missing_library
from kvx.runtime.backends.sessions import CUDA_LIBRARY
from kvx.tests.conftest import NUMBERS

pytestmark = pytest.mark.gpu

TEXTS = ["one", "twelve thousand and four", "ninety-nine", "seven hundred and eighty-one thousand"] * 5
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, few rows": {"rows": 3},
    "scores": {"scores": True},
    "beams": {"beam_size": 4, "n_best": 2},
    "beams, few rows": {"beam_size": 4, "rows": 8},
    "samples": {"temperature": 1.2, "seed": 7, "samples": 2},
    "filters": {"no_repeated_ngrams": 2, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing_library(CUDA_LIBRARY) is not None:
        pytest.skip("no CUDA here")
    pytest.importorskip("torch", reason="exporting a bundle needs torch")
    from kvx.exporter.export import export
    from kvx.exporter.options import ExportOptions

    folder = tmp_path_factory.mktemp("cuda") / "numbers"
    export(ExportOptions(checkpoint=NUMBERS / "model.pt", output=folder, lowering="cuda"))
    return folder


@pytest.fixture(scope="module")
def cpu(folder: Path) -> Translator:
    return Translator.load(folder)


@pytest.fixture(scope="module")
def cuda(folder: Path) -> Translator:
    return Translator.load(folder, device="cuda")


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_finds_the_same_on_the_device(cpu: Translator, cuda: Translator, name: str) -> None:
    expected, found = (translator.translate(TEXTS, **SEARCHES[name]) for translator in (cpu, cuda))
    assert [one.ids for one in found] == [one.ids for one in expected]


def test_a_device_that_is_used_again_starts_afresh(cpu: Translator, cuda: Translator) -> None:
    expected = [cpu.translate([text], beam_size=3)[0].ids for text in TEXTS[:4]]
    assert [cuda.translate([text], beam_size=3)[0].ids for text in TEXTS[:4]] == expected


def test_scores_are_those_of_the_cpu(cpu: Translator, cuda: Translator) -> None:
    targets = [one.text for one in cpu.translate(TEXTS)]
    expected, found = (translator.score(TEXTS, targets) for translator in (cpu, cuda))
    np.testing.assert_allclose([one.sum for one in found], [one.sum for one in expected], atol=1e-3)


def test_alternatives_are_those_of_the_cpu(cpu: Translator, cuda: Translator) -> None:
    expected, found = (translator.alternatives("twelve", "", count=3) for translator in (cpu, cuda))
    assert [one.ids for one in found] == [one.ids for one in expected]


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Translator.load(folder, device="cuda").translate(["one"], beam_size=2)
    assert capfd.readouterr() == ("", "")
