"""Bundles exported once for the whole run, and the reference model where its files are present.

The tests of the runtime also run where torch is not installed. The bundles then come from the folder that the
environment variable KVX_TEST_BUNDLES names. `make bundles` fills it. Tests that need torch itself are skipped.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvx import Translator
from kvx.runtime import kernels
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.manifest import BEAMS_FILE

if TYPE_CHECKING:
    from kvx.models.importers import Checkpoint
    from kvx.models.transformer import Transformer

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)  # two threads on a busy machine wait for each other most of the time

Exported = Callable[..., Path]

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "artifacts" / "numbers-checkpoint"
SEED = ROOT.parent / "shared" / "seed"
KEPT = Path(os.environ["KVX_TEST_BUNDLES"]).absolute() if "KVX_TEST_BUNDLES" in os.environ else None
TINY: dict[str, Any] = {
    "d_model": 16,
    "encoder_heads": 2,
    "decoder_heads": 2,
    "encoder_d_ff": 24,
    "decoder_d_ff": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "source_positions": 24,
    "target_positions": 20,
}


LONG_FILES = (
    "commands/test_translate.py",
    "commands/test_export.py",
    "runtime/test_languages.py",
    "exporter/precision/test_quantize.py",
    "exporter/precision/test_halves.py",
    "exporter/precision/test_tied.py",
    "commands/test_streams.py",
    "exporter/writing/test_loop.py",
    "runtime/measuring/test_evaluation.py",
    "runtime/decoding/test_search.py",
    "exporter/proof/test_tables.py",
    "test_gpu_benchmark.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files are given to workers in the order of their tests, not those with most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first, so that no worker is still at one of them when the others are done."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


@pytest.fixture
def plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kvx's own operators: the graphs that every machine runs."""
    monkeypatch.setenv(kernels.SWITCH, "0")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without garbage collection, which takes a time that grows with all that a process of many tests holds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def seed() -> Seed:
    if not SEED.is_dir():
        pytest.skip("the reference model is not here (../shared/seed)")
    return Seed(SEED)


@pytest.fixture(scope="session")
def seed_checkpoint(seed: Seed) -> Checkpoint:
    pytest.importorskip("torch")
    from kvx.models.importers import load_checkpoint

    return load_checkpoint(seed.checkpoint)


@pytest.fixture(scope="session")
def operators_listed_once() -> None:
    """For tests that write many graphs."""
    pytest.importorskip("torch")
    list_operators_once()


def list_operators_once() -> None:
    """torch lists the operators that it can export once, and not again for every graph, which takes a quarter of the
    time that writing one does.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    if not hasattr(ONNXRegistry.from_torchlib, "cache_info"):
        kept = functools.cache(ONNXRegistry.from_torchlib)
        ONNXRegistry.from_torchlib = staticmethod(kept)  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundles: kept ones, or those of this run alone."""
    return tmp_path_factory.mktemp("bundles") if KEPT is None else KEPT


@pytest.fixture(scope="session")
def exported(bundles: Path) -> Exported:
    """A function of a name, the path of a checkpoint and the options of an export → the bundle's folder."""

    def bundle(name: str, checkpoint: Path, **options: str | int) -> Path:
        if not (bundles / name).is_dir():
            pytest.importorskip("torch", reason="exporting a bundle needs torch")
            list_operators_once()
            from kvx.exporter.export import export
            from kvx.exporter.options import ExportOptions

            export(ExportOptions(checkpoint=checkpoint, output=bundles / name, **options))  # type: ignore[arg-type]
        return bundles / name

    return bundle


@pytest.fixture(scope="session")
def seed_bundle(seed: Seed, exported: Exported) -> Path:
    return exported("seed", seed.checkpoint)


@pytest.fixture(scope="session")
def seed_translator(seed_bundle: Path) -> Translator:
    return Translator.load(seed_bundle)


@pytest.fixture(scope="session")
def numbers_bundle(exported: Exported) -> Path:
    return exported("numbers", NUMBERS / "model.pt")


@pytest.fixture(scope="session")
def numbers_translator(numbers_bundle: Path) -> Translator:
    return Translator.load(numbers_bundle)


@pytest.fixture(scope="session")
def beams_translator(numbers_bundle: Path) -> Translator:
    """The numbers model for several rows a sentence: with its own graph, or the plain step where there is none."""
    translator = Translator.load(numbers_bundle, threads=1)
    if not (numbers_bundle / BEAMS_FILE).is_file() and isinstance(translator._model.backend, OnnxBackend):
        translator._model.backend.beam_cache_specs = translator._model.backend.cache_specs
    return translator


@pytest.fixture(scope="session")
def shortlist_bundle(exported: Exported) -> Path:
    """The demo with what translating with a shortlist needs."""
    return exported("shortlist", NUMBERS / "model.pt", format="onnx", verify=False, shortlist=True)


@pytest.fixture(scope="session")
def attention_bundle(exported: Exported) -> Path:
    """The demo with steps that also give attention."""
    return exported("attention", NUMBERS / "model.pt", attention=True, verify=False)


@pytest.fixture(scope="session")
def loop_bundle(exported: Exported) -> Path:
    """The demo with the step that feeds itself, in operators that a CPU runs."""
    return exported("loop", NUMBERS / "model.pt", format="onnx", loop=True, verify=False)


@pytest.fixture(scope="session")
def coded_bundle(exported: Exported) -> Path:
    """The demo with a cache in codes of 8 bits, and its proof."""
    if kernels.library() is None:
        pytest.skip("kvx was installed without its own operators")
    return exported("coded", NUMBERS / "model.pt", format="onnx", cache_precision="int8")


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(bundles: Path) -> Path:
    """A random model of a few thousand weights with the demo's tokenizers, in kvx's own format."""
    folder = bundles / "tiny-checkpoint"
    if not folder.is_dir():
        pytest.importorskip("torch", reason="making a checkpoint needs torch")
        from kvx.models.importers import Checkpoint, save_checkpoint

        bundles.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=bundles))
        save_checkpoint(Checkpoint(tiny_model(), max_new_tokens=18), making / "model.pt")
        for name in ("source.model", "target.model"):
            (making / name).write_bytes((NUMBERS / name).read_bytes())
        try:
            making.rename(folder)
        except OSError:  # another worker has made the same meanwhile
            shutil.rmtree(making)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint_folder: Path, exported: Exported) -> Path:
    return exported("tiny", tiny_checkpoint_folder / "model.pt")


@pytest.fixture(scope="session")
def standard_bundle(tiny_checkpoint_folder: Path, exported: Exported) -> Path:
    checkpoint = tiny_checkpoint_folder / "model.pt"
    return exported("standard", checkpoint, format="onnx", lowering="standard", verify=False)


@pytest.fixture(scope="session")
def attended_bundle(tiny_checkpoint_folder: Path, exported: Exported) -> Path:
    """The random model with its proof, in both formats, with the last layer's attention and a shortlist's graph."""
    return exported("attended", tiny_checkpoint_folder / "model.pt", attention=True, shortlist=True)


@pytest.fixture(scope="session")
def attended_standard_bundle(tiny_checkpoint_folder: Path, exported: Exported) -> Path:
    """The same in the `standard` lowering, with the first layer's attention."""
    asked = {"format": "onnx", "lowering": "standard", "attention": True, "attention_layer": 0, "shortlist": True}
    return exported("attended_standard", tiny_checkpoint_folder / "model.pt", **asked)


@pytest.fixture(scope="session")
def languages_bundle(bundles: Path, exported: Exported) -> Path:
    """A small M2M100 that repeats German words in French and, backwards, in Dutch."""
    return exported("languages", _made(bundles, "m2m100", seed=1))


@pytest.fixture(scope="session")
def languages_translator(languages_bundle: Path) -> Translator:
    return Translator.load(languages_bundle)


@pytest.fixture(scope="session")
def marked_bundle(bundles: Path, exported: Exported) -> Path:
    """A small Marian whose texts begin with the language of their target, and which is searched with four beams."""
    return exported("marked", _made(bundles, "marian-languages", seed=0, num_beams=4), format="onnx")


@pytest.fixture(scope="session")
def marked_translator(marked_bundle: Path) -> Translator:
    return Translator.load(marked_bundle)


def _made(bundles: Path, family: str, *, seed: int, **generation: int) -> Path:
    """The folder of a family's small model."""
    folder = bundles / f"{family}-checkpoint"
    if not folder.is_dir():
        pytest.importorskip("transformers", reason="making a checkpoint of a family needs transformers")
        from kvx.tests.families import make

        make(family, folder, seed, generation=generation)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Transformer:
    pytest.importorskip("torch")
    return tiny_model()


def tiny_model() -> Transformer:
    from kvx.models.config import ModelConfig
    from kvx.models.importers import load_checkpoint
    from kvx.models.transformer import Transformer

    numbers = load_checkpoint(NUMBERS / "model.pt").model.config
    vocabularies = {name: getattr(numbers, name) for name in ("source_vocab_size", "target_vocab_size")}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**TINY, **vocabularies)).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def modules_of_parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """TorchScript of small models that together have the parts which the reference model does not have."""
    pytest.importorskip("torch")
    from kvx.exporter.graphs import write_graphs
    from kvx.exporter.options import ExportOptions
    from kvx.exporter.progress import Progress
    from kvx.models.config import ModelConfig
    from kvx.models.transformer import Transformer
    from kvx.runtime.bundle.framing import Framing, SpecialIds
    from kvx.runtime.bundle.signature import StepFeatures

    folder, framing = tmp_path_factory.mktemp("parts"), Framing.plain(*2 * (SpecialIds(pad=0, bos=1, eos=2),))
    for norm, activation in (("layer", "gelu"), ("layer", "gelu_tanh"), ("rms", "silu"), ("rms", "quick_gelu")):
        parts = {**TINY, "norm": norm, "activation": activation, "gated": norm == "rms"}
        if norm == "rms":
            parts |= {"positions": "relative", "relative_distance": 5}
        model = Transformer(ModelConfig(**parts, source_vocab_size=17, target_vocab_size=17)).eval()
        model.requires_grad_(requires_grad=False)
        options = ExportOptions(checkpoint=folder / "none", format="torchscript")
        (folder / activation).mkdir()
        write_graphs(folder / activation, options, model, framing, StepFeatures(), Progress())
    return sorted(folder.glob("*/*.ts"))
