"""Bundles exported once for the whole run, and the reference model where it is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvx import Translator
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.models.config import ModelConfig
from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.manifest import BEAMS_FILE

torch.set_num_threads(1)  # two threads on a busy machine wait for each other most of the time

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "artifacts" / "numbers-checkpoint"
SEED = ROOT.parent / "shared" / "seed"
TINY: dict[str, Any] = {
    "d_model": 16,
    "heads": 2,
    "d_ff": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "source_positions": 24,
    "target_positions": 20,
}


@dataclass(frozen=True, slots=True)
class Seed:
    """The reference checkpoint with what it must reproduce."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best_transformer.pt"

    @property
    def sources(self) -> list[str]:
        return (self.folder / "test_2016.de").read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def references(self) -> list[str]:
        return (self.folder / "test_2016.en").read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def greedy(self) -> list[dict[str, object]]:
        return self._lines("greedy")

    @property
    def beam3(self) -> list[dict[str, object]]:
        return self._lines("beam3")

    def bleu(self, search: str) -> float:
        scores = json.loads((self.folder / "reference" / "scores.json").read_text(encoding="utf-8"))
        bleu: float = scores[search]["bleu"]
        return bleu

    def _lines(self, search: str) -> list[dict[str, object]]:
        lines = (self.folder / "reference" / f"{search}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def seed() -> Seed:
    if not SEED.is_dir():
        pytest.skip("the reference model is not here (../shared/seed)")
    return Seed(SEED)


@pytest.fixture(scope="session")
def seed_checkpoint(seed: Seed) -> Checkpoint:
    return load_checkpoint(seed.checkpoint)


@pytest.fixture(scope="session")
def seed_bundle(seed: Seed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "seed"
    export(ExportOptions(checkpoint=seed.checkpoint, output=folder))
    return folder


@pytest.fixture(scope="session")
def seed_translator(seed_bundle: Path) -> Translator:
    return Translator.load(seed_bundle)


@pytest.fixture(scope="session")
def numbers_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "numbers"
    export(ExportOptions(checkpoint=NUMBERS / "model.pt", output=folder))
    return folder


@pytest.fixture(scope="session")
def numbers_translator(numbers_bundle: Path) -> Translator:
    return Translator.load(numbers_bundle)


@pytest.fixture(scope="session")
def beams_translator(numbers_bundle: Path) -> Translator:
    """The numbers model for several rows a sentence: with its own graph, or the plain step where there is none."""
    translator = Translator.load(numbers_bundle, threads=1)
    if not (numbers_bundle / BEAMS_FILE).is_file() and isinstance(translator.backend, OnnxBackend):
        translator.backend.beam_cache_specs = translator.backend.cache_specs
    return translator


@pytest.fixture(scope="session")
def shortlist_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with what translating with a shortlist needs."""
    folder = tmp_path_factory.mktemp("bundles") / "shortlist"
    checkpoint = NUMBERS / "model.pt"
    export(ExportOptions(checkpoint=checkpoint, output=folder, format="onnx", verify=False, shortlist=True))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few thousand weights with the demo's tokenizers, in kvx's own format."""
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(Checkpoint(tiny_model(), max_new_tokens=18), folder / "model.pt")
    for name in ("source.model", "target.model"):
        (folder / name).write_bytes((NUMBERS / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export(ExportOptions(checkpoint=tiny_checkpoint_folder / "model.pt", output=folder))
    return folder


@pytest.fixture(scope="session")
def standard_bundle(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "standard"
    checkpoint = tiny_checkpoint_folder / "model.pt"
    export(ExportOptions(checkpoint=checkpoint, output=folder, format="onnx", lowering="standard", verify=False))
    return folder


@pytest.fixture(scope="session")
def tiny() -> Transformer:
    return tiny_model()


def tiny_model() -> Transformer:
    numbers = load_checkpoint(NUMBERS / "model.pt").model.config
    vocabularies = {name: getattr(numbers, name) for name in ("source_vocab_size", "target_vocab_size")}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**TINY, **vocabularies)).eval().requires_grad_(requires_grad=False)
