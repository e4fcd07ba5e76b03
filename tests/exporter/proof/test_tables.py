"""The proof sees every weight: one element or one row that differs fails it, whichever it is."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest

from kvx.exporter.proof import checks
from kvx.exporter.proof.bundle import verify
from kvx.exporter.proof.checks import Case
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.tables import MOST_ROWS, _walk
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest
from kvx.runtime.bundle.precision import Precision
from kvx.runtime.bundle.signature import cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.tests.conftest import Exported

FIRST: tuple[Precision, ...] = ("fp32", "int8")
PROVEN = [*FIRST, pytest.param("int4", marks=pytest.mark.proof)]
FEW_STEPS = ParityOptions(steps=4)
CHANGE = 0.05  # of one weight, where all are up to 0.25, norms about 1 and embeddings about 1


class Exports:
    """The tiny model in some precisions, each exported and loaded once."""

    def __init__(self, folder: Callable[[Precision], Path]) -> None:
        self.folder = folder
        self._backends: dict[Precision, OnnxBackend] = {}

    def case(self, precision: Precision, model: Transformer) -> Case:
        """An export held against this model."""
        folder = self.folder(precision)
        manifest = Manifest.read(folder)
        if precision not in self._backends:
            self._backends[precision] = OnnxBackend(folder, manifest.dimensions, manifest.features, threads=1)
        plan = Plan.of(manifest, cache_specs(manifest.dimensions))
        files = {"folder": folder, "files": manifest.files}
        return Case(model, self._backends[precision], plan, FEW_STEPS, precision=precision, **files)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exports(tiny_bundle: Path, tiny_checkpoint_folder: Path, exported: Exported) -> Exports:
    checkpoint = tiny_checkpoint_folder / "model.pt"

    def folder(precision: Precision) -> Path:
        if precision == "fp32":
            return tiny_bundle
        return exported(f"tiny-{precision}", checkpoint, precision=precision, verify=False)

    return Exports(folder)


def tables_pass(case: Case) -> bool:
    """Whether the checks of tokens and positions do."""
    return all(check.passed for table in (checks.SOURCE_TABLES, checks.TARGET_TABLES) for check in table.run(case))


@pytest.mark.parametrize("precision", PROVEN)
def test_the_tables_of_a_right_export_pass(exports: Exports, tiny: Transformer, precision: Precision) -> None:
    assert tables_pass(exports.case(precision, tiny))


def test_one_element_that_differs_in_any_tensor_fails_the_proof(exports: Exports, tiny: Transformer) -> None:
    unseen = []
    for number, name in enumerate(tiny.state_dict()):
        model = copy.deepcopy(tiny)
        tensor = model.state_dict()[name].view(-1)
        tensor[np.random.default_rng(number).integers(len(tensor))] += CHANGE
        if all(check.passed for check in checks.prove(exports.case("fp32", model))):
            unseen.append(name)
    assert not unseen


@pytest.mark.parametrize("precision", PROVEN)
@pytest.mark.parametrize("side", ["source", "target"])
def test_any_token_that_has_its_neighbours_row_fails_the_proof(
    exports: Exports, tiny: Transformer, precision: Precision, side: str
) -> None:
    name = f"{side}_embedding.tokens.weight"
    rows = tiny.state_dict()[name]
    unseen = []
    for row in range(0, len(rows), 3):
        model = copy.deepcopy(tiny)
        model.state_dict()[name][row] = rows[(row + 1) % len(rows)]
        if tables_pass(exports.case(precision, model)):
            unseen.append(row)
    assert not unseen


@pytest.mark.parametrize("precision", PROVEN)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_vocabulary_shifted_by_one_fails_the_proof(
    exports: Exports, tiny: Transformer, precision: Precision, side: str
) -> None:
    model = copy.deepcopy(tiny)
    weight = model.state_dict()[f"{side}_embedding.tokens.weight"]
    weight[:] = weight.roll(1, 0)
    assert not tables_pass(exports.case(precision, model))


@pytest.mark.parametrize("side", ["source", "target"])
def test_any_position_that_has_its_neighbours_row_fails_the_proof(
    exports: Exports, tiny: Transformer, side: str
) -> None:
    rows = tiny.state_dict()[f"{side}_embedding.positions"]
    for row in range(len(rows)):
        model = copy.deepcopy(tiny)
        model.state_dict()[f"{side}_embedding.positions"][row] = rows[row - 1]
        assert not tables_pass(exports.case("fp32", model)), row


@pytest.mark.parametrize("precision", PROVEN)
@pytest.mark.parametrize(("side", "file"), [("source", "encoder.onnx"), ("target", "decoder_step.onnx")])
def test_a_row_altered_in_the_file_is_found_although_the_hashes_are_right(
    exports: Exports, tiny_checkpoint_folder: Path, tmp_path: Path, precision: Precision, side: str, file: str
) -> None:
    bundle = shutil.copytree(exports.folder(precision), tmp_path / "bundle")
    model = onnx.load(bundle / file)
    tables = [tensor for tensor in model.graph.initializer if f"{side}_embedding.tokens.weight" in tensor.name]
    assert tables
    for tensor in tables:  # codes and scales where it is quantised
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[37] = values[38]
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (bundle / f"{file}.data").unlink()
    onnx.save(model, bundle / file, save_as_external_data=True, location=f"{file}.data", size_threshold=256)
    vouch(bundle, file, f"{file}.data")
    if side == "target":  # the other graphs of the decoder read the data by the places that it had
        for other in ("decoder_chunk.onnx", "decoder_beams.onnx"):
            (bundle / other).unlink()
            vouch(bundle, other)
    report = verify(bundle, tiny_checkpoint_folder / "model.pt", FEW_STEPS)
    failed = {check.name.split(":")[0]: check.detail for check in report.checks if not check.passed}
    assert f"{side} tables" in failed
    assert "row 37" in failed[f"{side} tables"]


def vouch(bundle: Path, *names: str) -> None:
    """Makes the manifest right for these files again."""
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    for name in names:
        values["files"].pop(name)
        if (bundle / name).is_file():
            values["files"][name] = asdict(FileEntry.of(bundle / name))
    (bundle / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("positions", [1, 2, 7, 256, 257, 1000])
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
def test_a_walk_takes_every_position_with_no_more_rows_than_it_may(positions: int, rows: int) -> None:
    walk = _walk(positions, rows)
    assert set(walk.ravel().tolist()) == set(range(positions))
    assert walk.shape[1] <= rows
