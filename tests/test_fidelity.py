"""The reference model: every backend gives the original code's tokens, scores and numbers.

Letters: B rows, S source positions, T target positions or cache capacity, V target vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import sacrebleu
import torch
from numpy.typing import NDArray

from kvx import Translation, Translator
from kvx.models.eager import NoCacheBackend, TorchBackend
from kvx.models.importers import Checkpoint
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.backends.torchscript import TorchScriptBackend
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.signature import key_value_names
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.text.sources import SourceReader

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

SAMPLE = 100
BEAM_SAMPLE = 40
SCORE_TOLERANCE = 1e-3
BLEU_TOLERANCE = 0.05
TOLERANCE = 1e-4
STEPS = 30


@pytest.fixture(scope="module", params=["onnx", "torchscript", "torch", "torch-no-cache"])
def translator(request: pytest.FixtureRequest, seed_bundle: Path, seed_checkpoint: Checkpoint) -> Translator:
    if request.param in ("onnx", "torchscript"):
        return Translator.load(seed_bundle, backend=request.param)
    backend = TorchBackend if request.param == "torch" else NoCacheBackend
    return Translator(LoadedModel(Bundle.open(seed_bundle), backend(seed_checkpoint.model)))


def differing_lines(translations: list[Translation], expected: list[dict[str, object]]) -> list[int]:
    """The numbers, from 1, of lines whose ids or text are not the reference's."""
    return [
        number
        for number, (got, line) in enumerate(zip(translations, expected, strict=True), 1)
        if list(got.ids) != line["ids"] or got.text != line["text"]
    ]


def test_a_hundred_lines_equal_the_reference_with_their_scores(translator: Translator, seed: Seed) -> None:
    expected = seed.greedy[:SAMPLE]
    translations = translator.translate(seed.sources[:SAMPLE], scores=True)
    assert differing_lines(translations, expected) == []
    got = np.array([translation.score for translation in translations], float)
    np.testing.assert_allclose(got, np.array([line["logprob"] for line in expected], float), 0, SCORE_TOLERANCE)


@pytest.mark.proof
def test_all_lines_equal_the_reference(translator: Translator, seed: Seed) -> None:
    translations = translator.translate(seed.sources)
    assert differing_lines(translations, seed.greedy) == []
    bleu = sacrebleu.corpus_bleu([translation.text for translation in translations], [seed.references])
    assert bleu.score == pytest.approx(seed.bleu("greedy"), abs=BLEU_TOLERANCE)


def test_lines_of_three_beams_equal_the_reference(translator: Translator, seed: Seed) -> None:
    translations = translator.translate(seed.sources[:BEAM_SAMPLE], beam_size=3, rows=24)
    assert differing_lines(translations, seed.beam3[:BEAM_SAMPLE]) == []


@pytest.mark.proof
def test_all_lines_of_three_beams_equal_the_reference(translator: Translator, seed: Seed) -> None:
    translations = translator.translate(seed.sources, beam_size=3)
    assert differing_lines(translations, seed.beam3) == []
    bleu = sacrebleu.corpus_bleu([translation.text for translation in translations], [seed.references])
    assert bleu.score == pytest.approx(seed.bleu("beam3"), abs=BLEU_TOLERANCE)


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_the_seeds_own_proof_is_within_the_tolerance(seed_bundle: Path, backend: str) -> None:
    parity = json.loads((seed_bundle / "manifest.json").read_text(encoding="utf-8"))["parity"]
    differences = [check["differences"] for check in parity["checks"] if check["backend"] == backend]
    compared = {tensor: worst for check in differences for tensor, worst in check.items()}
    layers = [
        f"present.{layer}.{side}.{part}"
        for layer in range(3)
        for side in ("encoder", "decoder")
        for part in ("key", "value")
    ]
    assert {"logits", *layers} <= compared.keys()
    assert max(worst for check in differences for worst in check.values()) <= TOLERANCE
    assert any(f"{STEPS} steps" in check["name"] for check in parity["checks"] if check["backend"] == backend)


@pytest.fixture(scope="module")
def graphs(seed_bundle: Path) -> dict[str, OnnxBackend | TorchScriptBackend]:
    manifest = Bundle.open(seed_bundle).manifest
    arguments = seed_bundle, manifest.dimensions, manifest.features
    return {"onnx": OnnxBackend(*arguments), "torchscript": TorchScriptBackend(*arguments)}


@pytest.fixture(scope="module")
def ragged(seed: Seed, seed_bundle: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sources [6, S] of very different lengths [6]; what lies beyond a length is another piece, not the pad."""
    ids = [text.ids for text in SourceReader(Bundle.open(seed_bundle)).read(seed.sources)]
    chosen = [*sorted(ids, key=len)[:: len(ids) // 5], max(ids, key=len)]
    lengths = np.array([len(row) for row in chosen])
    padded = np.full((len(chosen), int(lengths.max())), 77)
    for row, one in zip(padded, chosen, strict=True):
        row[: len(one)] = one
    return padded, lengths


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_encoder_outputs_equal_eager(
    graphs: dict[str, OnnxBackend | TorchScriptBackend],
    seed_checkpoint: Checkpoint,
    ragged: tuple[NDArray[np.int64], NDArray[np.int64]],
    backend: str,
) -> None:
    input_ids, lengths = ragged
    got = graphs[backend].run_encoder({"input_ids": input_ids, "source_lengths": lengths})
    expected = seed_checkpoint.model.encode(torch.from_numpy(input_ids), torch.from_numpy(lengths))
    for layer, pair in enumerate(expected):
        for name, tensor in zip(key_value_names("present", layer, "encoder"), pair, strict=True):
            for row, length in enumerate(lengths):
                np.testing.assert_allclose(
                    got[name][row, :, :length], tensor[row, :, :length], rtol=0, atol=TOLERANCE, err_msg=name
                )


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_steps_at_different_positions_equal_one_full_eager_pass(
    graphs: dict[str, OnnxBackend | TorchScriptBackend],
    seed_checkpoint: Checkpoint,
    ragged: tuple[NDArray[np.int64], NDArray[np.int64]],
    backend: str,
) -> None:
    input_ids, lengths = ragged
    rows = len(lengths)
    target_ids = np.random.default_rng(5).integers(4, 6000, (rows, STEPS))
    expected = seed_checkpoint.model(*map(torch.from_numpy, (input_ids, lengths, target_ids))).numpy()
    tried = graphs[backend]
    cache = KVCache(tried.cache_specs, Capacity(rows, STEPS, input_ids.shape[1]))
    tensors = tried.encode(input_ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        cache.admit(EncodedSource(tensors, row, length))
    step, worst = tried.bind(cache), 0.0
    for number in range(STEPS + rows - 1):
        # Row r starts r steps after the first, so no two rows share a position.
        cache.lengths[:] = np.clip(number - np.arange(rows), 0, STEPS - 1)
        logits = step(target_ids[np.arange(rows), cache.lengths]).logits
        worst = max(worst, float(np.abs(logits - expected[np.arange(rows), cache.lengths]).max()))
    assert worst <= TOLERANCE
