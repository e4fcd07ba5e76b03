"""The reference model in fewer bits: how much smaller it gets, and how little it loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sacrebleu

from kvx import Translator
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.runtime.bundle.manifest import Precision

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

pytestmark = [pytest.mark.proof, pytest.mark.usefixtures("operators_listed_once")]

CALIBRATION_LINES = 500
MOST_BLEU: dict[Precision, float] = {"int8": 0.2, "int4": 0.7}  # points by which the reference's may be missed
MOST_BYTES: dict[Precision, float] = {"int8": 0.30, "int4": 0.22}  # of the float32 bundle's


def exported(seed: Seed, folder: Path, precision: Precision, calibration: Path | None = None) -> Path:
    export(
        ExportOptions(
            checkpoint=seed.folder / "best_transformer.pt",
            output=folder,
            heads=4,
            format="onnx",
            precision=precision,
            calibration=calibration,
        )
    )
    return folder


def bleu(seed: Seed, bundle: Path) -> float:
    translations = Translator.load(bundle, threads=2, workers=2).translate(seed.sources)
    return sacrebleu.corpus_bleu([translation.text for translation in translations], [seed.references]).score


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(scope="module")
def float32(seed: Seed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(seed, tmp_path_factory.mktemp("float32") / "seed", "fp32")


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_fewer_bits_are_smaller_and_hardly_worse(
    seed: Seed, float32: Path, tmp_path: Path, precision: Precision, calibrated: bool
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("\n".join(seed.sources[:CALIBRATION_LINES]) + "\n", encoding="utf-8")
    bundle = exported(seed, tmp_path / "bundle", precision, text if calibrated else None)
    assert size(bundle) <= MOST_BYTES[precision] * size(float32)
    assert bleu(seed, bundle) == pytest.approx(seed.bleu("greedy"), abs=MOST_BLEU[precision])


def test_every_number_of_rows_gives_the_same_lines_in_int8(seed: Seed, tmp_path: Path) -> None:
    translator = Translator.load(exported(seed, tmp_path / "bundle", "int8"), threads=1)
    expected = [translation.ids for translation in translator.translate(seed.sources, rows=64)]
    for rows in (1, 7, 32):
        assert [translation.ids for translation in translator.translate(seed.sources, rows=rows)] == expected


def test_the_standard_lowering_gives_every_line_of_the_reference(seed: Seed, tmp_path: Path) -> None:
    checkpoint = seed.folder / "best_transformer.pt"
    export(
        ExportOptions(checkpoint=checkpoint, output=tmp_path / "bundle", heads=4, format="onnx", lowering="standard")
    )
    translations = Translator.load(tmp_path / "bundle").translate(seed.sources)
    assert [list(translation.ids) for translation in translations] == [line["ids"] for line in seed.greedy]
