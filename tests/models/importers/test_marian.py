"""Marian's own model.npz against the Hugging Face model of the same weights, with Marian's positions and ε."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvx import Translator

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from kvx.exporter.export import export  # noqa: E402
from kvx.exporter.options import ExportOptions  # noqa: E402
from kvx.models.importers import load_checkpoint  # noqa: E402
from kvx.models.layers import inclusive_positions  # noqa: E402
from kvx.runtime.errors import CheckpointError, TokenizerError  # noqa: E402
from kvx.tests.families import BEAMS, Exported, Made, make, sentences  # noqa: E402

EPSILON = 1e-6
LAYER = re.compile(r"model\.(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
PARTS = {"self_attn": "self", "encoder_attn": "context"}
SETTINGS = {
    "type": "transformer",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-ffn-activation": "swish",
    "transformer-ffn-depth": 2,
    "transformer-decoder-autoreg": "self-attention",
    "transformer-train-position-embeddings": False,
    "tied-embeddings-all": True,
}


def marian_made(folder: Path, name: str = "marian", steps: int = 0) -> Made:
    """A Hugging Face model that computes what Marian does: its table of positions and its ε. Both sides of it have
    equal heads.
    """
    made = make(name, folder, 0, steps=steps, heads=3)
    for module in made.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = EPSILON
    for stack in (made.model.model.encoder, made.model.model.decoder):
        table = stack.embed_positions.weight
        with torch.no_grad():
            table.copy_(inclusive_positions(*table.shape))
    return made


def theirs(part: str, kind: str) -> str:
    """Marian's name of a parameter within a layer."""
    if part in ("fc1", "fc2"):
        return f"ffn_{'W' if kind == 'weight' else 'b'}{part[-1]}"
    ending = "ln_scale" if kind == "weight" else "ln_bias"
    if part == "final_layer_norm":
        return f"ffn_ffn_{ending}"
    if part.endswith("_layer_norm"):
        return f"{PARTS[part.removesuffix('_layer_norm')]}_Wo_{ending}"
    attention, projection = part.split(".")
    letter = projection.removesuffix("_proj")[0]
    return f"{PARTS[attention]}_{'W' if kind == 'weight' else 'b'}{letter}"


def write(made: Made, folder: Path, settings: dict[str, Any] | None = None, *, one_table: bool = True) -> Path:
    """The weights of a model as Marian has them, without the row of pad, and its vocabularies."""
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {}
    for name, tensor in made.model.state_dict().items():
        if layer := LAYER.fullmatch(name):
            value = tensor.numpy()
            matrix = layer[4] == "weight" and not layer[3].endswith("norm")
            key = f"{layer[1]}_l{int(layer[2]) + 1}_{theirs(layer[3], layer[4])}"
            arrays[key] = value.T.copy() if matrix else value[None]
    encoder, decoder = (
        stack.embed_tokens.weight.detach().numpy()[:-1]
        for stack in (made.model.get_encoder(), made.model.get_decoder())
    )
    arrays |= {"Wemb": decoder} if one_table else {"encoder_Wemb": encoder, "decoder_Wemb": decoder}
    arrays["decoder_ff_logit_out_b"] = made.model.final_logits_bias.numpy()[:, :-1]
    text = yaml.safe_dump({**SETTINGS, "transformer-heads": 3, **(settings or {})}).encode() + b"\0\0\0"
    arrays["special:model.yml"] = np.frombuffer(text, np.int8)
    np.savez(folder / "model.npz", **arrays)
    for name in ("source.spm", "target.spm"):
        shutil.copyfile(made.folder / name, folder / name)
    for side, file in (("src", "vocab.json"), ("trg", "target_vocab.json")):
        path = made.folder / file if (made.folder / file).is_file() else made.folder / "vocab.json"
        ids = json.loads(path.read_text(encoding="utf-8"))
        lines = [f"{json.dumps(piece, ensure_ascii=False)}: {one}\n" for piece, one in ids.items() if piece != "<pad>"]
        (folder / f"{side}.vocab.yml").write_text("".join(lines), encoding="utf-8")
    (folder / "decoder.yml").write_text("beam-size: 4\nnormalize: 0.6\nvocabs: [/x/src.vocab.yml, /x/trg.vocab.yml]\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return marian_made(tmp_path_factory.mktemp("made") / "model")


@pytest.mark.parametrize("name", ["marian", "marian-apart"])
def test_logits_are_those_of_the_same_weights_elsewhere(name: str, tmp_path: Path) -> None:
    made = marian_made(tmp_path / "model", name)
    checkpoint = load_checkpoint(write(made, tmp_path / "npz", one_table=name == "marian"))
    assert checkpoint.family == "marian-npz"
    chance = torch.Generator().manual_seed(7)
    pad = made.model.config.pad_token_id
    for text in sentences(5, 3):
        given = torch.randint(0, pad, (9,), generator=chance).tolist()
        source, fed = made.source_ids(text), torch.tensor([[pad, *given]])
        expected = made.logits(text, None, given)
        with torch.inference_mode():
            got = checkpoint.model(torch.tensor([source]), torch.tensor([len(source)]), fed)[0]
        assert (got - expected)[:, :-1].abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert (got[:, -1] < -1e3).all()  # of the token that never comes: no share of any sum


def test_what_stands_around_a_text_and_how_its_owner_searched(made: Made, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write(made, tmp_path / "npz") / "model.npz")
    assert checkpoint.text is not None
    framing, last = checkpoint.text.framing, made.model.config.pad_token_id
    assert (framing.prefix, framing.suffix, framing.start, framing.eos, framing.never) == ((), (0,), last, 0, (last, 1))
    assert {name: default.value for name, default in checkpoint.defaults.items()} == {
        "beam_size": 4,
        "length_penalty": 0.6,
    }


@pytest.mark.proof
def test_ids_are_those_of_the_same_weights_elsewhere(tmp_path: Path) -> None:
    made = marian_made(tmp_path / "model", steps=1600)
    export(ExportOptions(checkpoint=write(made, tmp_path / "npz"), output=tmp_path / "bundle", format="onnx"))
    exported = Exported(made, Translator.load(tmp_path / "bundle", threads=1))
    texts = sentences(64, 77)
    banned = {"bad_words_ids": [[made.model.config.pad_token_id], [1]]}
    for beams, ours in ((1, {"beam_size": 1}), (4, {**BEAMS, "length_penalty": 1.0})):
        expected = [made.generate(text, None, num_beams=beams, **banned) for text in texts]
        assert len({tuple(ids) for ids in expected}) > len(set(texts)) / 2
        for rows in (4, 64):
            assert exported.ids(texts, None, ours, rows=rows) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "amun"}, "type = 'amun'"),
        ({"transformer-decoder-autoreg": "rnn"}, "transformer-decoder-autoreg = 'rnn'"),
        ({"transformer-preprocess": "n"}, "transformer-preprocess = 'n'"),
        ({"transformer-preprocess": ["n"]}, "transformer-preprocess"),
        ({"transformer-heads": 5}, "5 heads"),
        ({"transformer-ffn-activation": "sigmoid"}, "sigmoid"),
        ({"transformer-train-position-embeddings": True}, "transformer-train-position-embeddings = True"),
    ],
)
def test_other_architectures_are_refused_by_name(
    made: Made, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(write(made, tmp_path / "npz", settings))


def test_arrays_that_are_pickled_are_refused(made: Made, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "npz")
    np.savez(folder / "model.npz", Wemb=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="no file of arrays"):
        load_checkpoint(folder)


def test_a_vocabulary_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "npz")
    (folder / "src.vocab.yml").write_text('"</s>": 0\n"<unk>": 1\n')
    with pytest.raises(TokenizerError, match="has 2 pieces"):
        load_checkpoint(folder)
    (folder / "src.vocab.yml").write_text('"</s>": zero\n')
    with pytest.raises(TokenizerError, match="'zero'"):
        load_checkpoint(folder)


def test_a_vocabulary_that_is_not_there_is_named(made: Made, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "npz")
    (folder / "trg.vocab.yml").unlink()
    with pytest.raises(TokenizerError, match=r"has no trg\.vocab\.yml"):
        load_checkpoint(folder)
    (folder / "decoder.yml").unlink()
    (folder / "target.spm").unlink()
    with pytest.raises(TokenizerError, match="no vocabulary of the target"):
        load_checkpoint(folder)


def test_pieces_need_what_cuts_texts_into_them(made: Made, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "npz")
    (folder / "source.spm").unlink()
    with pytest.raises(TokenizerError, match="no model that cuts texts"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 damaged", b"", b"\x93NUMPY\x01\x00 not whole"], ids=["zip", "empty", "array"]
)
def test_a_damaged_file_is_named(made: Made, tmp_path: Path, content: bytes) -> None:
    folder = write(made, tmp_path / "npz")
    (folder / "model.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, damaged or no file of arrays"):
        load_checkpoint(folder)


def test_an_array_too_many_is_named(made: Made, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "npz")
    arrays = dict(np.load(folder / "model.npz"))
    np.savez(folder / "model.npz", **arrays, Wtype=np.zeros((2, 2), np.float32))
    with pytest.raises(CheckpointError, match="unexpected Wtype"):
        load_checkpoint(folder)
