"""Models of one's own, by a file that names their parts and tensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from kvx import Translator

torch = pytest.importorskip("torch")

from kvx.exporter.export import export  # noqa: E402
from kvx.exporter.options import ExportOptions, Format  # noqa: E402
from kvx.models.importers import Checkpoint, detect, load_checkpoint  # noqa: E402
from kvx.models.importers.detect import draft_of  # noqa: E402
from kvx.runtime.errors import CheckpointError, TokenizerError  # noqa: E402

LAYOUT = Path(__file__).parents[3] / "docs" / "layouts" / "nn_transformer.toml"
WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvw"]
LAYERS = 2


class Tutorial(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is imported if it is there
    """The modules of PyTorch's tutorial on translation with nn.Transformer, by the names that they have there."""

    def __init__(self, *, width: int = 24, positions: int = 40, **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.transformer = torch.nn.Transformer(
            width, 8, LAYERS, LAYERS + 1, dim_feedforward=30, dropout=0.0, **options
        )
        self.generator = torch.nn.Linear(width, len(WORDS))
        self.src_tok_emb, self.tgt_tok_emb, self.positional_encoding = (torch.nn.Module() for _ in range(3))
        self.src_tok_emb.embedding = torch.nn.Embedding(len(WORDS), width)
        self.tgt_tok_emb.embedding = torch.nn.Embedding(len(WORDS), width)
        angles = torch.arange(positions)[:, None] * torch.exp(-torch.arange(0, width, 2) * math.log(10000) / width)
        table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        self.positional_encoding.register_buffer("pos_embedding", table[:, None])
        self.scale = width**0.5
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, source: Any, target: Any) -> Any:  # noqa: ANN401
        """source [S] and target [T] of one sentence → logits [T, V]."""
        table = self.positional_encoding.pos_embedding[:, 0]
        given = self.src_tok_emb.embedding(source) * self.scale + table[: len(source)]
        said = self.tgt_tok_emb.embedding(target) * self.scale + table[: len(target)]
        axis = 0 if self.transformer.batch_first else 1
        mask = torch.nn.Transformer.generate_square_subsequent_mask(len(target))
        return self.generator(
            self.transformer(given.unsqueeze(axis), said.unsqueeze(axis), tgt_mask=mask).squeeze(axis)
        )


def saved(folder: Path, **options: Any) -> Tutorial:  # noqa: ANN401
    torch.manual_seed(3)
    model = Tutorial(**options)
    model.eval()
    torch.save(model.state_dict(), folder / "model.pt")
    for side in ("source", "target"):
        (folder / f"vocabulary.{side}").write_text("\n".join(WORDS) + "\n")
    return model


def layout(folder: Path, *changes: tuple[str, str]) -> Path:
    text = LAYOUT.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "layout.toml").write_text(text, encoding="utf-8")
    return folder / "layout.toml"


def assert_same_logits(checkpoint: Checkpoint, model: Tutorial) -> None:
    chance = torch.Generator().manual_seed(5)
    for length in (1, 4, 9):
        source, target = (torch.randint(0, len(WORDS), (length,), generator=chance) for _ in range(2))
        with torch.inference_mode():
            expected = model(source, target)
            got = checkpoint.model(source[None], torch.tensor([length]), target[None])[0]
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_modules_of_the_tutorial_are_read(
    tmp_path: Path, norm_first: bool, activation: str, batch_first: bool
) -> None:
    model = saved(tmp_path, norm_first=norm_first, activation=activation, batch_first=batch_first)
    block = ('block = "post"', f'block = "{"pre" if norm_first else "post"}"')
    path = layout(tmp_path, block, ('activation = "relu"', f'activation = "{activation}"'))
    assert_same_logits(load_checkpoint(tmp_path / "model.pt", layout=path), model)


@pytest.mark.parametrize("written", ["torchscript", pytest.param("onnx", marks=pytest.mark.proof)])
def test_they_are_exported_with_their_words(tmp_path: Path, written: Format) -> None:
    model = saved(tmp_path)
    options = ExportOptions(
        checkpoint=tmp_path / "model.pt", output=tmp_path / "bundle", layout=layout(tmp_path), format=written
    )
    manifest = export(options)
    assert manifest.parity is not None
    assert manifest.parity["passed"]
    [found] = Translator.load(tmp_path / "bundle", backend=written).translate(["a b unheard c"], max_new_tokens=8)
    source = torch.tensor([WORDS.index(word) for word in ("<bos>", "a", "b", "<unk>", "c", "<eos>")])
    ids = [WORDS.index("<bos>")]
    with torch.inference_mode():
        while len(ids) < 9 and ids[-1] != WORDS.index("<eos>"):
            ids.append(int(model(source, torch.tensor(ids))[-1].argmax()))
    assert list(found.ids) == ids[1:]
    assert found.text == " ".join(WORDS[one] for one in ids[1:] if one > 3)


def test_a_draft_finds_the_parts_of_the_tutorial(tmp_path: Path) -> None:
    model = saved(tmp_path)
    text, notes = draft_of(tmp_path / "model.pt")
    (tmp_path / "drafted.toml").write_text(re.sub(r"heads = \d+", "heads = 8", text), encoding="utf-8")
    assert_same_logits(load_checkpoint(tmp_path / "model.pt", layout=tmp_path / "drafted.toml"), model)
    assert "heads" in notes[-1]


def test_a_draft_knows_other_names_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    shapes = {
        "encoder.tok_embedding.weight": (9, 8),
        "encoder.pos_embedding.weight": (5, 8),
        "encoder.layers.0.self_attention.fc_q.weight": (8, 8),
        "encoder.layers.0.self_attn_layer_norm.weight": (8,),
        "decoder.layers.1.encoder_attention.fc_o.bias": (8,),
        "decoder.layers.1.enc_attn_layer_norm.bias": (8,),
        "decoder.layers.0.positionwise_feedforward.fc_2.weight": (8, 16),
        "decoder.fc_out.weight": (9, 8),
        "decoder.mystery": (3, 3),
    }
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.pt")
    text, notes = draft_of(tmp_path / "model.pt")
    for line in (
        '"source_embedding.tokens.weight" = "encoder.tok_embedding.weight"',
        '"source_embedding.positions" = "encoder.pos_embedding.weight"',
        '"encoder_layers.{}.self_attention.query.weight" = "encoder.layers.{}.self_attention.fc_q.weight"',
        '"encoder_layers.{}.self_attention_norm.gamma" = "encoder.layers.{}.self_attn_layer_norm.weight"',
        '"decoder_layers.{}.cross_attention.output.bias" = "decoder.layers.{}.encoder_attention.fc_o.bias"',
        '"decoder_layers.{}.cross_attention_norm.beta" = "decoder.layers.{}.enc_attn_layer_norm.bias"',
        '"decoder_layers.{}.feed_forward.down.weight" = "decoder.layers.{}.positionwise_feedforward.fc_2.weight"',
        '"head.weight" = "decoder.fc_out.weight"',
        '    "decoder.mystery",  # [3, 3]',
    ):
        assert line in text.splitlines(), line
    assert any("decoder.mystery" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"generator.bias"', '"generator.offset"'), "1 patterns that fit no tensor: generator.offset"),
        (('"head.bias" = "generator.bias"', ""), "1 tensors that fit no pattern: generator.bias"),
        (("[model]", "[models]"), "has models at its top"),
        (("heads = 8", "heads = 7"), "7 heads in the encoder that do not divide d_model 24"),
        (("heads = 8", "head_count = 8"), "has no heads in"),
        (('activation = "relu"', ""), "has no activation in"),
        (('activation = "relu"', 'activation = "relu"\nfoo = 1'), "unknown fields \\['foo'\\]"),
        (('bias, part 2 of 3"', 'bias, part 1 of 3"'), "does not take every part"),
        (('"encoder_norm.gamma" = "transformer.encoder.norm', '"encoder_norm.gamma" = "x.{}.norm'), "once in both"),
        (("norm_epsilon = 1e-5", f"norm_epsilon = 1{'0' * 400}"), "norm_epsilon"),
        (("[text]\nsource", "[ignored]\ntensors = 5\n[text]\nsource"), "values that are no text"),
        (("heads = 8", "heads = "), "is no TOML"),
        (('bias, part 1 of 3"', 'bias, part 4 of 3"'), "refers to"),
        (('end = "<eos>"', ""), "has no end in \\[text\\]"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "model.pt", layout=layout(tmp_path, change))


def test_all_that_does_not_fit_is_counted_and_ten_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path)
    more = {f"extra.{one}": torch.zeros(1) for one in range(12)}
    torch.save({**model.state_dict(), **more}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"12 tensors that fit no pattern: extra\.0, .*extra\.9, …"):
        load_checkpoint(tmp_path / "model.pt", layout=layout(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"), [("\n".join(WORDS[:-1]), "26 lines"), ("\n".join([*WORDS[:-1], "a"]), "come twice")]
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, content: str, said: str) -> None:
    saved(tmp_path)
    (tmp_path / "vocabulary.target").write_text(content)
    with pytest.raises(TokenizerError, match=said):
        load_checkpoint(tmp_path / "model.pt", layout=layout(tmp_path))


def test_without_a_layout_an_unknown_model_is_described(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensors of a model that kvx does not know: .*\[\d+, 24\].*layout"):
        load_checkpoint(tmp_path / "model.pt")


def test_an_importer_of_another_package_may_take_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    path = layout(tmp_path)

    class Entry:
        """As importlib.metadata gives it."""

        @staticmethod
        def load() -> Any:  # noqa: ANN401
            """The importer."""
            return lambda found: load_checkpoint(found, layout=path) if found.suffix == ".pt" else None

    monkeypatch.setattr(detect, "entry_points", lambda group: [Entry] if group == "kvx.importers" else [])
    assert_same_logits(load_checkpoint(tmp_path / "model.pt"), model)
