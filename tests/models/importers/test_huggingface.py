"""Models in Hugging Face folders against the original library, and folders that cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from kvx.models.importers.huggingface import CONVERTERS  # noqa: E402
from kvx.models.importers.huggingface_generation import Generation  # noqa: E402
from kvx.runtime.bundle.framing import Framing, LanguageIds  # noqa: E402
from kvx.runtime.errors import CheckpointError, KvxError, TokenizerError  # noqa: E402
from kvx.tests.families import KINDS, Made, make, sentences  # noqa: E402

CLOSE = 1e-5  # of the largest logit
FRAMING = Framing(prefix=(), suffix=(2,), start=2, eos=2, pad=1)


def logits(checkpoint: Checkpoint, made: Made, text: str, target: str | None, given: list[int]) -> Any:  # noqa: ANN401
    source = made.source_ids(text, target)
    fed = torch.tensor([[*made.start_ids(target), *given]])
    with torch.inference_mode():
        return checkpoint.model(torch.tensor([source]), torch.tensor([len(source)]), fed)[0]


def assert_same_logits(checkpoint: Checkpoint, made: Made) -> None:
    chance = torch.Generator().manual_seed(7)
    vocabulary, pad = checkpoint.model.config.target_vocab_size, made.model.config.pad_token_id
    for text in sentences(5, 3):
        for target in made.languages:
            drawn = torch.randint(0, vocabulary, (9,), generator=chance).tolist()
            given = [one if one != pad else pad + 1 if pad == 0 else pad - 1 for one in drawn]
            expected = made.logits(text, target, given)
            difference = (logits(checkpoint, made, text, target, given) - expected).abs().max()
            assert difference <= CLOSE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_original(name: str, seed: int, tied: bool, tmp_path: Path) -> None:
    made = make(name, tmp_path / "model", seed, tied=tied, steps=0)
    checkpoint = load_checkpoint(made.folder)
    assert_same_logits(checkpoint, made)
    config = checkpoint.model.config
    assert config.tied_head is tied
    assert (checkpoint.model.head.weight is checkpoint.model.target_embedding.tokens.weight) is tied
    assert checkpoint.family == FAMILY_OF[name]
    save_checkpoint(checkpoint, tmp_path / "own.pt")
    again = load_checkpoint(tmp_path / "own.pt")
    assert again.model.config == config
    assert_same_logits(again, made)


FAMILY_OF = {
    **dict.fromkeys(("marian", "marian-apart", "marian-languages"), "marian"),
    **dict.fromkeys(("m2m100", "nllb"), "m2m_100"),
    **dict.fromkeys(("mbart50", "mbart25"), "mbart"),
    "bart": "bart",
    "pegasus": "pegasus",
    **dict.fromkeys(("t5", "flan"), "t5"),
    "mt5": "mt5",
    "umt5": "umt5",
}


@pytest.mark.parametrize("name", KINDS)
def test_what_stands_around_a_text_is_what_the_original_has_there(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path / "model", 0, steps=0)
    text = load_checkpoint(made.folder).text
    assert text is not None
    for target in made.languages:
        ids = LanguageIds(
            text.languages.source.get(made.source_language or ""), text.languages.target.get(target or "")
        )
        assert text.framing.start_ids(ids) == tuple(made.start_ids(target))
        source = made.source_ids("eins zwei", target)
        framed = text.framing.source_ids((), ids)
        before = len(text.framing.prefix)
        assert source[:before] == list(framed[:before])
        assert source[len(source) - len(text.framing.suffix) :] == list(framed[before:])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("marian", tmp_path_factory.mktemp("made") / "model", 0, steps=0)


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "folder"))


def change(path: Path, **values: object) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(written | values), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_read_as_float32(made: Made, folder: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    halved = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(halved, path)
    model = load_checkpoint(folder).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.weight, halved["model.shared.weight"].float())


def in_shards(folder: Path, ending: str) -> None:
    """The weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    base, names = ("model", ".safetensors") if ending == "safetensors" else ("pytorch_model", ".bin"), sorted(tensors)
    listed: dict[str, str] = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"{base[0]}-{number:05}-of-00002{base[1]}"
        part = {name: tensors[name].clone() for name in some}
        if ending == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        listed |= dict.fromkeys(some, file)
    (folder / f"{base[0]}{base[1]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(made: Made, folder: Path, ending: str) -> None:
    in_shards(folder, ending)
    assert_same_logits(load_checkpoint(folder), made)


def test_pytorch_model_bin_is_read_with_its_aliases_and_tables_of_positions(made: Made, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(made.model.state_dict(), folder / "pytorch_model.bin")
    assert_same_logits(load_checkpoint(folder), made)


def test_links_into_a_cache_are_followed(made: Made, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(path for path in folder.iterdir() if path.is_file()):
        blob = path.rename(tmp_path / f"blob-{number}")
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    assert_same_logits(load_checkpoint(tmp_path / "snapshot"), made)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]"), "holds a list"),
    "another family": (lambda folder: change(folder / "config.json", model_type="whisper"), "type 'whisper'"),
    "experts": (lambda folder: change(folder / "config.json", model_type="nllb-moe"), "mixtures of experts"),
    "no family": (lambda folder: change(folder / "config.json", model_type=None), "type None"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "damaged"),
    "other sizes": (
        lambda folder: change(folder / "config.json", d_model=40, encoder_attention_heads=4),
        "wrong tensor",
    ),
    "more layers": (lambda folder: change(folder / "config.json", decoder_layers=3), "missing model.decoder.layers.1"),
    "a size of text": (lambda folder: change(folder / "config.json", d_model="36"), "d_model = '36'"),
    "an activation": (lambda folder: change(folder / "config.json", activation_function="mish"), "'mish'"),
    "no tokenizer": (lambda folder: (folder / "source.spm").unlink(), "source.spm"),
    "no vocabulary": (lambda folder: (folder / "vocab.json").write_text("{}"), "vocab.json"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_that_cannot_be_read_is_refused(folder: Path, name: str) -> None:
    spoil, words = REFUSALS[name]
    spoil(folder)
    with pytest.raises(KvxError) as caught:
        load_checkpoint(folder)
    assert isinstance(caught.value, CheckpointError | TokenizerError)
    assert words in str(caught.value)


def test_all_families_are_named_where_one_is_not_read(folder: Path) -> None:
    change(folder / "config.json", model_type="t6")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert all(name in caught.value.expected for name in CONVERTERS)


def test_a_missing_shard_is_named(folder: Path) -> None:
    in_shards(folder, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, not there"):
        load_checkpoint(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    in_shards(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed, "../model.safetensors")}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_checkpoint(folder)


def test_pickled_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.shared.weight": torch.ones(2), "x": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="carries code"):
        load_checkpoint(folder)


@pytest.mark.parametrize("extra", ["model.encoder.layers.0.gate.weight", "adapter.weight"])
def test_a_tensor_that_nothing_is_known_of_is_named(folder: Path, extra: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors | {extra: torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"unexpected {extra.removeprefix('model.')}"):
        load_checkpoint(folder)


class TestGeneration:
    """What a checkpoint's settings become."""

    def defaults(self, **settings: object) -> dict[str, object]:
        found, self.notes = Generation(settings, "generation_config.json").defaults(FRAMING, 100, 60)
        return {name: default.value for name, default in found.items()}

    def test_nothing_set_sets_nothing(self) -> None:
        assert self.defaults(num_beams=1, no_repeat_ngram_size=0, min_length=0, do_sample=False, length_penalty=2) == {}
        assert self.notes == ()

    def test_a_summariser(self) -> None:
        found = self.defaults(
            num_beams=4,
            length_penalty=2.0,
            early_stopping=True,
            no_repeat_ngram_size=3,
            min_length=56,
            forced_eos_token_id=2,
        )
        assert found == {
            "beam_size": 4,
            "length_penalty": 2.0,
            "early_stopping": True,
            "beam_rules": "transformers",
            "no_repeated_ngrams": 3,
            "min_new_tokens": 56,
            "end_at_limit": True,
        }

    def test_never_to_stop_early_is_kvxs_own_rule(self) -> None:
        found = self.defaults(num_beams=2, early_stopping="never")
        assert found == {"beam_size": 2, "length_penalty": 1.0, "early_stopping": False}

    def test_tokens_and_texts_that_never_come(self) -> None:
        found = self.defaults(suppress_tokens=[3, 4], bad_words_ids=[[1], [5, 6]])
        assert found == {"suppress": [3, 4], "banned": [[5, 6]]}

    def test_what_cannot_be_is_left_out(self) -> None:
        assert self.defaults(suppress_tokens=[2, 3, 400], bad_words_ids=[[5, 2], [6, 999]]) == {"suppress": [3]}
        assert self.defaults(num_beams=1000) == {}
        assert self.defaults(min_length=500) == {"min_new_tokens": 60}
        assert self.defaults(num_beams=2, length_penalty=float("nan"))["length_penalty"] == 1.0

    def test_what_has_no_equal_is_said(self) -> None:
        found = self.defaults(do_sample=True, repetition_penalty=1.2, num_beam_groups=2, forced_eos_token_id=7)
        assert found == {}
        assert [note.split(" of ")[0] for note in self.notes] == [
            "left out do_sample = True",
            "left out repetition_penalty = 1.2",
            "left out num_beam_groups = 2",
            "left out forced_eos_token_id = 7",
        ]

    @pytest.mark.parametrize(
        ("settings", "limit", "note"),
        [
            ({"max_length": 100}, 98, None),
            ({"max_length": 100, "max_new_tokens": 50}, 49, None),
            ({"max_length": 5000}, 199, "for which there are no positions"),
            ({}, 199, "has none of its own"),
        ],
    )
    def test_the_limit_counts_what_is_chosen(self, settings: dict[str, int], limit: int, note: str | None) -> None:
        found, notes = Generation(settings, "generation_config.json").limit(199, forced=1)
        assert found == limit
        assert len(notes) == (note is not None)
        assert (note or "") in "".join(notes)
