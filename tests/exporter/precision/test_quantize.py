"""Weights in fewer bits: the codes, the graphs, and that a sentence keeps its translation whoever is beside it."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvx import OptionError, ParityError, Translator
from kvx.exporter.export import export
from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.options import ExportOptions
from kvx.exporter.precision.calibrate import calibrate
from kvx.exporter.precision.quantize import BLOCK, GROUP, PANEL, Panels, blocks, panels
from kvx.exporter.proof.bundle import verify
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.writing.graphs import StepGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.importers import load_checkpoint
from kvx.runtime.backends.onnx import STEP_FILE
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.bundle.precision import PRECISIONS, Precision
from kvx.runtime.bundle.signature import cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.rules import described

TEXTS = ["one", "two hundred", "nine hundred and ninety-nine", "twelve thousand three hundred and four", "seventy"]
QUANTIZED: list[Precision] = ["int8", "int4"]
CALIBRATED = pytest.param("calibrated", marks=pytest.mark.proof)


def weights(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def unpacked(codes: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """[rows, blocks, bytes] → numbers around zero [rows, blocks, BLOCK]."""
    if bits == 8:
        return codes.astype(np.float32) - 128
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return pairs.astype(np.float32) - 8


@pytest.fixture(scope="module")
def checkpoint(numbers_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("model.pt", "source.model", "target.model"):
        shutil.copyfile(numbers_bundle / name, folder / name)
    return folder / "model.pt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


class Quantized(dict[str, Path]):
    """Exports, each made when it is first asked for."""

    def __init__(self, all_options: dict[str, ExportOptions]) -> None:
        super().__init__()
        self._all_options = all_options

    def __missing__(self, name: str) -> Path:
        export(self._all_options[name])
        self[name] = self._all_options[name].folder
        return self[name]


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The demo model as int8, int8 calibrated and int4, each with its proof."""
    folder = tmp_path_factory.mktemp("quantized")
    options = ExportOptions(
        checkpoint=checkpoint, output=folder / "int8", precision="int8", parity=ParityOptions(verify_text=text)
    )
    calibrated = dataclasses.replace(options, output=folder / "calibrated", calibration=text)
    int4 = dataclasses.replace(options, output=folder / "int4", precision="int4")
    return Quantized({one.folder.name: one for one in (options, calibrated, int4)})


def matrix_of(packed: Panels, inputs: int) -> NDArray[np.float32]:
    """What the panels of a matrix [N, K] stand for."""
    filled = packed.codes.transpose(0, 2, 1, 3).reshape(len(packed.codes) * PANEL, -1)
    outputs = len(packed.scales)
    assert not filled[outputs:].any()
    assert not filled[:, inputs:].any()
    return filled[:outputs, :inputs] * packed.scales[:, None]


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_codes_of_7_bits_are_near_and_fit_in_panels(rows: int, columns: int, seed: int) -> None:
    matrix = weights(rows, columns, seed)
    packed = panels(matrix)
    assert packed.codes.shape == (-(-rows // PANEL), -(-columns // GROUP), PANEL, GROUP)
    assert np.abs(packed.codes).max() <= 63
    assert packed.sums.tolist() == np.rint(matrix_of(packed, columns) / packed.scales[:, None]).sum(axis=1).tolist()
    extreme = np.abs(matrix).max(axis=1, keepdims=True)
    found = np.square(matrix_of(packed, columns) - matrix).sum(axis=1)
    plain = np.square(np.rint(matrix / (extreme / 63)) * (extreme / 63) - matrix).sum(axis=1)
    assert (found <= plain * 1.001 + 1e-9).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_blocks_are_near_and_padded_with_zeros(bits: int, rows: int, columns: int, seed: int) -> None:
    matrix = weights(rows, columns, seed)
    packed = blocks(matrix, bits)
    count = -(-columns // BLOCK)
    assert packed.codes.shape == (rows, count, BLOCK * bits // 8)
    restored = (unpacked(packed.codes, bits) * packed.scales[..., None]).reshape(rows, -1)
    reach = np.abs(packed.scales).repeat(BLOCK, axis=1)[:, :columns]
    assert (np.abs(restored[:, :columns] - matrix) <= (1 if bits == 8 else 4) * reach * 1.001).all()
    assert (restored[:, columns:] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    packed = blocks(np.zeros((2, BLOCK), np.float32), bits)
    assert not (unpacked(packed.codes, bits) * packed.scales[..., None]).any()
    assert not panels(np.zeros((2, 3), np.float32)).codes.any()


def test_a_searched_scale_is_never_worse_than_the_one_that_reaches_the_extreme() -> None:
    matrix = weights(64, BLOCK, 1)
    packed = blocks(matrix, 4)
    found = np.square(unpacked(packed.codes, 4)[:, 0] * packed.scales - matrix).sum(axis=1)
    extreme = np.take_along_axis(matrix, np.abs(matrix).argmax(axis=1)[:, None], axis=1) / -8
    plain = np.square(np.rint(matrix / extreme).clip(-8, 7) * extreme - matrix).sum(axis=1)
    assert (found <= plain * 1.0001).all()
    assert (found < plain * 0.999).any()


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("int8", "MatMulIntegerToFloat"),
        pytest.param("calibrated", "MatMulIntegerToFloat", marks=pytest.mark.proof),
        ("int4", "MatMulNBits"),
    ],
)
def test_no_product_or_lookup_of_a_weight_stays_in_float(quantized: dict[str, Path], name: str, product: str) -> None:
    for file in ("decoder_step.onnx", "decoder_chunk.onnx", "decoder_beams.onnx"):
        used = collections.Counter(node.op_type for node in onnx.load(quantized[name] / file).graph.node)
        assert used[product] > 0
        assert used["Gemm"] == used["MatMul"] == 0
        assert used["GatherBlockQuantized"] == 1
    encoder = collections.Counter(node.op_type for node in onnx.load(quantized[name] / "encoder.onnx").graph.node)
    assert encoder["MatMulIntegerToFloat"] > 0
    assert encoder["Gemm"] == 0


@pytest.mark.parametrize("file", ["encoder.onnx", "decoder_step.onnx", "decoder_chunk.onnx", "decoder_beams.onnx"])
def test_what_relu_gives_uses_all_256_levels(quantized: dict[str, Path], file: str) -> None:
    nodes = onnx.load(quantized["int8"] / file).graph.node
    layers = sum(node.op_type == "Relu" for node in nodes)
    assert sum(node.op_type == "QuantizeLinear" and "zero_at_0" in node.input for node in nodes) == layers > 0


def test_calibrated_scales_need_no_pass_over_the_rows(
    checkpoint: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    model, manifest = load_checkpoint(checkpoint).model, Manifest.read(quantized["int8"])
    calibrate(model, [(4, 5, 6), (7,)], Plan.of(manifest, cache_specs(manifest.dimensions)))
    step = StepGraph(model, OrtOperators(model), manifest.features)
    write_onnx(step, tmp_path / STEP_FILE, widths=PRECISIONS["int8"].step)
    calibrated, int8 = (
        collections.Counter(node.op_type for node in onnx.load(folder / STEP_FILE).graph.node)
        for folder in (tmp_path, quantized["int8"])
    )
    assert calibrated["MatMulIntegerToFloat"] == int8["MatMulIntegerToFloat"] > 0
    assert calibrated["ReduceMax"] == 0 < int8["ReduceMax"]


@pytest.mark.proof
def test_an_export_that_was_calibrated_has_no_pass_over_the_rows(quantized: dict[str, Path]) -> None:
    nodes = onnx.load(quantized["calibrated"] / STEP_FILE).graph.node
    assert not [node for node in nodes if node.op_type == "ReduceMax"]


@pytest.mark.parametrize("name", ["int8", CALIBRATED])
def test_a_sentence_keeps_its_translation_whoever_is_beside_it(quantized: dict[str, Path], name: str) -> None:
    translator = Translator.load(quantized[name], threads=1)
    alone = [translator.translate([text])[0].ids for text in TEXTS]
    for rows in (1, 2, 5):
        assert [found.ids for found in translator.translate(TEXTS, rows=rows)] == alone
    assert [found.ids for found in translator.translate(TEXTS[::-1])] == alone[::-1]


@pytest.mark.parametrize("name", ["int8", CALIBRATED, "int4"])
def test_several_tokens_at_once_score_as_one_after_the_other(quantized: dict[str, Path], name: str) -> None:
    translator = Translator.load(quantized[name], threads=1)
    found = translator.translate(TEXTS, scores=True)
    scores = translator.score(TEXTS, [translation.ids for translation in found])
    for translation, score in zip(found, scores, strict=True):
        assert score.sum == pytest.approx(translation.score, abs=1e-2)  # a byte may round the other way


@pytest.mark.parametrize("name", ["int8", CALIBRATED])
def test_weights_have_7_bits_so_that_no_processor_saturates(quantized: dict[str, Path], name: str) -> None:
    for file in ("encoder.onnx", "decoder_step.onnx"):
        tensors = onnx.load(quantized[name] / file).graph.initializer
        codes = [onnx.numpy_helper.to_array(tensor) for tensor in tensors if tensor.name.endswith(".weight.int8")]
        assert codes
        assert all(one.dtype == np.int8 and np.abs(one.astype(int)).max() <= 63 for one in codes)


@pytest.mark.parametrize("name", ["int8", CALIBRATED, "int4"])
def test_the_proof_states_what_was_lost(quantized: dict[str, Path], name: str) -> None:
    manifest = Manifest.read(quantized[name])
    assert manifest.precision == ("int4" if name == "int4" else "int8")
    assert manifest.formats == ("onnx",)
    assert manifest.parity is not None
    details = {check["name"]: check["detail"] for check in manifest.parity["checks"]}
    alone = details["rows alone against rows among others"]
    assert name == "int4" or alone == "largest difference 0 in logits"
    assert "of 5 lines equal" in details["greedy lines of the verification text"]


def test_a_bundle_shrinks_with_its_bits(quantized: dict[str, Path], numbers_bundle: Path) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".data")  # the weights

    assert size(quantized["int4"]) < size(quantized["int8"]) < size(numbers_bundle) / 2


@pytest.mark.proof
@pytest.mark.parametrize(
    "limits", [ParityOptions(tolerance=1e-6), ParityOptions(tolerance=0.9, equal_lines=1.0)], ids=["tensors", "lines"]
)
def test_an_export_over_its_limits_fails_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, limits: ParityOptions
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"{word} thousand and {text}" for word in TEXTS for text in TEXTS) + "\n" * 2)
    options = ExportOptions(
        checkpoint=checkpoint,
        output=tmp_path / "bundle",
        precision="int4",
        parity=dataclasses.replace(limits, verify_text=lines),
    )
    with pytest.raises(ParityError):
        export(options)
    assert not (tmp_path / "bundle").exists()


def test_references_show_what_bleu_loses(
    checkpoint: Path, text: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    reference = tmp_path / "reference.txt"
    reference.write_text("eins\nzweihundert\nneunhundertneunundneunzig\nzwölftausenddreihundertvier\nsiebzig\n")
    options = ParityOptions(bleu_lost=100.0, equal_lines=0.0, verify_text=text, verify_reference=reference)
    report = verify(quantized["int8"], checkpoint, options)
    details = [check.detail for check in report.checks if check.name.startswith("BLEU")]
    assert details
    assert all(one.endswith("chrF 100.00 and 100.00; at most 100 of BLEU may be lost") for one in details)


TEXT, REFERENCE = {"verify_text": Path("text")}, {"verify_reference": Path("references")}
LINES_WANTED, BLEU_LOST = {"equal_lines": 0.9}, {"bleu_lost": 1.0}


def of_proof(*values: dict[str, Any], **options: object) -> dict[str, Any]:
    """Export options with these of their proof."""
    return {"parity": ParityOptions(**{name: value for one in values for name, value in one.items()}), **options}


@pytest.mark.parametrize(
    ("wrong", "got", "expected"),
    [
        (
            {"precision": "int8", "lowering": "standard"},
            "`precision` int8 does not go together with `lowering` standard",
            "`lowering` ort with `precision` int8",
        ),
        (
            {"precision": "int4", "format": "both"},
            "`precision` int4 does not go together with `format` both",
            "`format` onnx with fewer bits",
        ),
        (
            {"precision": "int8", "format": "torchscript"},
            "`precision` int8 does not go together with `format` torchscript",
            "fewer bits",
        ),
        (
            {"calibration": Path("text")},
            "`calibration` has no effect with `precision` fp32",
            "`calibration` only with int8 or int4",
        ),
        (
            of_proof(REFERENCE),
            "`verify_reference` has no effect without `verify_text` and with `precision` fp32",
            "only with fewer bits",
        ),
        (
            of_proof(REFERENCE, TEXT),
            "`verify_reference` has no effect with `precision` fp32",
            "only with fewer bits and `verify_text`",
        ),
        (
            of_proof(LINES_WANTED, TEXT),
            "`equal_lines` has no effect with `precision` fp32",
            "only with fewer bits and `verify_text`",
        ),
        (
            of_proof(LINES_WANTED, precision="int8"),
            "`equal_lines` has no effect without `verify_text`",
            "only with fewer bits",
        ),
        (
            of_proof(BLEU_LOST, TEXT, precision="int8"),
            "`bleu_lost` has no effect without `verify_reference`",
            "only with `verify_reference`",
        ),
        ({"precision": "float32"}, "`precision` is 'float32'", "fp32, fp16, bf16, int8 or int4 for `precision`"),
        (
            {"attention_layer": 1},
            "`attention_layer` 1 has no effect without `attention`",
            "`attention_layer` only with `attention`",
        ),
        ({"attention_layer": -1, "attention": True}, "`attention_layer` is -1", "a whole number from 0 to "),
        ({"lowering": "ORT"}, "`lowering` is 'ORT'", "ort, standard or cuda for `lowering`"),
        ({"format": "ONNX"}, "`format` is 'ONNX'", "onnx, torchscript or both for `format`"),
        (
            {"lowering": "standard", "format": "torchscript"},
            "`lowering` has no effect with `format` torchscript",
            "`lowering` only with `format` onnx",
        ),
        (
            {"loop": True, "format": "torchscript"},
            "`loop` has no effect with `format` torchscript",
            "`loop` only with `format` onnx",
        ),
        (of_proof(TEXT, verify=False), "`verify_text` has no effect without `verify`", "only of a proof"),
        (
            of_proof(LINES_WANTED, BLEU_LOST, {"tolerance": 0.1}, verify=False),
            "`tolerance` has no effect without `verify`. `equal_lines` has no effect without `verify`. "
            "`bleu_lost` has no effect without `verify`",
            "only of a proof",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_would(wrong: dict[str, Any], got: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(checkpoint=Path("model.pt"), **wrong)
    assert caught.value.got.startswith(got)
    assert expected in caught.value.expected
    assert caught.value.option is not None
    assert caught.value.got.startswith(f"`{caught.value.option}`")


@pytest.mark.parametrize("values", [LINES_WANTED | TEXT, BLEU_LOST | TEXT, TEXT | REFERENCE, REFERENCE], ids="+".join)
def test_a_proof_refuses_limits_and_files_that_would_judge_nothing(tiny_bundle: Path, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="only with"):
        verify(tiny_bundle, tiny_bundle / "model.pt", ParityOptions(**values))


def test_all_that_does_not_go_together_is_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(checkpoint=Path("model.pt"), precision="int8", lowering="standard", format="both")
    assert "`lowering` standard" in caught.value.got
    assert "`format` both" in caught.value.got


def test_every_precision_has_limits() -> None:
    assert PRECISIONS.keys() == set(get_args(Precision))
    limits = PRECISIONS["int8"].limits
    assert ParityOptions(tolerance=0.5).limits("int8") == limits._replace(tolerance=0.5)


def test_the_defaults_of_every_limit_are_named_where_it_is_described() -> None:
    options = described(ParityOptions)
    for name in ("tolerance", "equal_lines", "bleu_lost"):
        for precision, arithmetic in PRECISIONS.items():
            judged = arithmetic.reduced or name == "tolerance"
            assert (f"{precision} {getattr(arithmetic.limits, name):g}" in (options[name].unset or "")) is judged
