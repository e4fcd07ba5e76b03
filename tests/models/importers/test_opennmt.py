"""Folders of Eole and files of OpenNMT-py, made of the weights of an M2M100 model, which computes the same with the
positions that these have. Where eole is installed, its own model is compared too.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvx import Translator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from kvx.exporter.export import export  # noqa: E402
from kvx.exporter.options import ExportOptions, Format  # noqa: E402
from kvx.models.importers import load_checkpoint  # noqa: E402
from kvx.models.layers import inclusive_positions, interleaved_positions  # noqa: E402
from kvx.runtime.bundle.folder import Bundle  # noqa: E402
from kvx.runtime.errors import CheckpointError, TokenizerError  # noqa: E402
from kvx.runtime.text.sources import load_tokenizer  # noqa: E402
from kvx.tests.families import train_sentencepiece  # noqa: E402

WORDS = ["<unk>", "<blank>", "<s>", "</s>", *"abcdefghijklmn"]
WIDTH, POSITIONS = 24, 30
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
PROJECTIONS = {"q_proj": "linear_query", "k_proj": "linear_keys", "v_proj": "linear_values", "out_proj": "final_linear"}
OF_EOLE = {
    "layers": {"encoder": "transformer_layers", "decoder": "transformer_layers"},
    "fc1": "mlp.gate_up_proj",
    "fc2": "mlp.down_proj",
    "encoder": {"self_attn_layer_norm": "input_layernorm", "final_layer_norm": "post_attention_layernorm"},
    "decoder": {
        "self_attn_layer_norm": "input_layernorm",
        "encoder_attn_layer_norm": "precontext_layernorm",
        "final_layer_norm": "post_attention_layernorm",
    },
}
OF_OPENNMT = {
    "layers": {"encoder": "transformer", "decoder": "transformer_layers"},
    "fc1": "feed_forward.w_1",
    "fc2": "feed_forward.w_2",
    "encoder": {"self_attn_layer_norm": "layer_norm", "final_layer_norm": "feed_forward.layer_norm"},
    "decoder": {
        "self_attn_layer_norm": "layer_norm_1",
        "encoder_attn_layer_norm": "layer_norm_2",
        "final_layer_norm": "feed_forward.layer_norm",
    },
}
TABLES = {"SinusoidalInterleaved": interleaved_positions, "SinusoidalConcat": inclusive_positions}


def original(kind: str = "SinusoidalInterleaved", epsilon: float = 1e-5) -> Any:  # noqa: ANN401
    """Pre-norm with random weights, and their table of positions, which M2M100 reads from its third row on."""
    torch.manual_seed(2)
    config = transformers.M2M100Config(
        vocab_size=len(WORDS),
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=30,
        decoder_ffn_dim=30,
        max_position_embeddings=POSITIONS,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = epsilon
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.weights[2:] = TABLES[kind](POSITIONS, WIDTH)
    return model


def renamed(model: Any, naming: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """The tensors of the layers and norms by their names."""
    found = {}
    for name, tensor in model.model.state_dict().items():
        if layer := LAYER.fullmatch(name):
            side, number, part, kind = layer.groups()
            attention, _, projection = part.partition(".")
            if projection:
                theirs = f"{'self_attn' if attention == 'self_attn' else 'context_attn'}.{PROJECTIONS[projection]}"
            else:
                theirs = naming[part] if part in ("fc1", "fc2") else naming[side][part]
            found[f"{side}.{naming['layers'][side]}.{number}.{theirs}.{kind}"] = tensor.clone()
        elif name.split(".")[1] == "layer_norm":
            found[name] = tensor.clone()
    return found


def eole_folder(folder: Path, model: Any, kind: str = "SinusoidalInterleaved", **changes: Any) -> Path:  # noqa: ANN401
    folder.mkdir()
    tensors = renamed(model, OF_EOLE)
    table = model.model.shared.weight.detach()
    for side in ("src", "tgt"):
        tensors[f"{side}_emb.embeddings.weight"] = table.clone()
        tensors[f"{side}_emb.pe.pe"] = TABLES[kind](POSITIONS, WIDTH)[:, None].clone()
    for layer in range(2):
        tensors[f"decoder.transformer_layers.{layer}.layer_scalar"] = torch.ones(1)
    tensors |= {"generator.weight": table.clone(), "generator.bias": torch.randn(len(WORDS)) * 0.1}
    save_file(tensors, folder / "model.00.safetensors")
    stack = {
        "layers": 2,
        "heads": 4,
        "hidden_size": WIDTH,
        "transformer_ff": 30,
        "add_qkvbias": True,
        "add_ffnbias": True,
    }
    config = {
        "model": {
            "architecture": "transformer",
            "embeddings": {"position_encoding_type": kind, "src_word_vec_size": WIDTH, "tgt_word_vec_size": WIDTH},
            "encoder": {"encoder_type": "transformer", **stack, **changes},
            "decoder": {"decoder_type": "transformer", **stack, **changes},
        }
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabularies = {"src": WORDS, "tgt": WORDS, "decoder_start_token": "<s>", "specials": {}}
    (folder / "vocab.json").write_text(json.dumps(vocabularies))
    return folder


def opennmt_file(folder: Path, model: Any, **changes: Any) -> Path:  # noqa: ANN401
    folder.mkdir()
    table = model.model.shared.weight.detach()
    tensors = renamed(model, OF_OPENNMT)
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embeddings.make_embedding.emb_luts.0.weight"] = table.clone()
        tensors[f"{side}.embeddings.make_embedding.pe.pe"] = interleaved_positions(POSITIONS, WIDTH)[:, None].clone()
    options = {
        "encoder_type": "transformer",
        "decoder_type": "transformer",
        "heads": 4,
        "position_encoding": True,
        "position_encoding_type": "SinusoidalInterleaved",
        "max_relative_positions": 0,
        "pos_ffn_activation_fn": "relu",
        "layer_norm": "standard",
        "norm_eps": 1e-6,
        **changes,
    }
    content = {
        "model": tensors,
        "generator": {"0.weight": table.clone(), "0.bias": torch.zeros(len(WORDS))},
        "vocab": {"src": WORDS, "tgt": WORDS, "decoder_start_token": "<s>"},
        "opt": argparse.Namespace(**options),
        "optim": None,
    }
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def assert_same_logits(path: Path, model: Any, bias: Any) -> None:  # noqa: ANN401
    checkpoint = load_checkpoint(path)
    chance = torch.Generator().manual_seed(1)
    for length in (1, 6, 12):
        source = torch.randint(4, len(WORDS), (1, length), generator=chance)
        target = torch.cat([torch.tensor([[2]]), torch.randint(4, len(WORDS), (1, 7), generator=chance)], dim=1)
        with torch.inference_mode():
            expected = model(input_ids=source, decoder_input_ids=target).logits + bias
            got = checkpoint.model(source, torch.tensor([length]), target)
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", TABLES)
def test_logits_of_eole_are_those_of_the_same_weights(kind: str, tmp_path: Path) -> None:
    model = original(kind)
    folder = eole_folder(tmp_path / "eole", model, kind)
    from safetensors.torch import load_file

    assert_same_logits(folder, model, load_file(folder / "model.00.safetensors")["generator.bias"])
    assert load_checkpoint(folder).family == "eole"


def test_logits_of_opennmt_are_those_of_the_same_weights(tmp_path: Path) -> None:
    model = original(epsilon=1e-6)
    path = opennmt_file(tmp_path / "opennmt", model)
    assert_same_logits(path, model, 0.0)
    assert load_checkpoint(path).family == "opennmt-py"


@pytest.mark.parametrize(
    "changes",
    [
        {"add_qkvbias": True, "add_ffnbias": True},
        {"layer_norm": "rms", "mlp_activation_fn": "gated-silu", "norm_eps": 1e-6},
        {"mlp_activation_fn": "gelu", "head_dim": 10, "position_encoding_type": "Learned", "n_positions": POSITIONS},
        {"share_decoder_embeddings": True, "share_embeddings": True, "position_encoding_type": "SinusoidalConcat"},
    ],
    ids=["biases", "gated", "learnt", "shared"],
)
def test_logits_are_those_of_eole_itself(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Where it is installed, which asks for an older torch: pip install --no-deps eole==0.6.0, and what it imports."""
    pytest.importorskip("eole")
    from eole.config.models import build_model_config
    from eole.inputters.inputter import dict_to_vocabs
    from eole.models.model import get_model_class

    of_positions = ("position_encoding_type", "n_positions")
    positions: dict[str, Any] = {name: changes[name] for name in of_positions if name in changes}
    shared = {name: changes[name] for name in changes if name.startswith("share_")}
    stack = {"layers": 2, "heads": 4, "hidden_size": WIDTH, "transformer_ff": 30}
    stack |= {name: value for name, value in changes.items() if name not in shared}
    config: dict[str, Any] = {
        "architecture": "transformer",
        **shared,
        "embeddings": {"word_vec_size": WIDTH, "src_word_vec_size": WIDTH, "tgt_word_vec_size": WIDTH, **positions},
        "encoder": {"encoder_type": "transformer", **stack},
        "decoder": {"decoder_type": "transformer", **stack},
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<blank>", "unk_token": "<unk>"}
    vocabularies = {"src": WORDS, "tgt": WORDS, "decoder_start_token": "<s>", "specials": special}
    made = build_model_config(config)
    model = get_model_class(made).build(made, dict_to_vocabs(vocabularies), None).eval()
    torch.manual_seed(8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "eole"
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.00.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": json.loads(made.model_dump_json())}))
    (folder / "vocab.json").write_text(json.dumps(vocabularies))
    source, target = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[2, 4, 9, 7]])
    unmasked = [torch.zeros(1, 1, length, dtype=torch.bool) for length in (5, 4)]
    with torch.inference_mode():
        encoded = model.encoder(model.src_emb(source), pad_mask=unmasked[0])
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        masks = {"src_pad_mask": unmasked[0], "tgt_pad_mask": unmasked[1]}
        decoded = model.decoder(model.tgt_emb(target), enc_out=encoded, **masks)[0]
        expected = model.generator(decoded)[..., : len(WORDS)]
        got = load_checkpoint(folder).model(source, torch.tensor([5]), target)[..., : len(WORDS)]
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def torchtext(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Classes by the names that files of OpenNMT-py 2 have, which are pickled with them."""
    made: dict[str, Any] = {}
    for name in ("torchtext.data.field.Field", "torchtext.vocab.Vocab", "onmt.inputters.text_dataset.TextMultiField"):
        module, _, short = name.rpartition(".")
        for one in (module.rsplit(".", number)[0] for number in range(module.count(".") + 1)):
            monkeypatch.setitem(sys.modules, one, types.ModuleType(one))
        made[short] = type(short, (), {"__module__": module})
        setattr(sys.modules[module], short, made[short])
    for name in ("onmt.inputters.text_dataset._feature_tokenize", "torchtext.vocab._default_unk_index"):
        module, _, short = name.rpartition(".")
        exec(f"def {short}(*values): return 0", vars(sys.modules[module]))
        made[short] = getattr(sys.modules[module], short)
        made[short].__module__ = module
    return made


@pytest.mark.parametrize("version", [1, 2])
def test_vocabularies_before_version_3_are_read_and_nothing_of_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    model = original(epsilon=1e-6)
    path = opennmt_file(tmp_path / "opennmt", model)
    content = torch.load(path, weights_only=False)
    with monkeypatch.context() as patched:
        classes = torchtext(patched)

        def vocabulary() -> Any:  # noqa: ANN401
            held = classes["Vocab"]()
            held.itos, held.freqs, held.stoi = (
                WORDS,
                Counter(WORDS),
                defaultdict(classes["_default_unk_index"], dict.fromkeys(WORDS, 1)),
            )
            return held

        def field() -> Any:  # noqa: ANN401
            inner, outer = classes["Field"](), classes["TextMultiField"]()
            inner.vocab, inner.tokenize = vocabulary(), functools.partial(classes["_feature_tokenize"], layer=0)
            outer.fields = [("src", inner)]
            return outer

        sides = ("src", "tgt")
        content["vocab"] = (
            [(side, vocabulary()) for side in sides] if version == 1 else {side: field() for side in sides}
        )
        torch.save(content, path)
    assert_same_logits(path, model, 0.0)


@pytest.mark.parametrize("written", ["torchscript", pytest.param("onnx", marks=pytest.mark.proof)])
def test_a_source_has_nothing_around_it(tmp_path: Path, written: Format) -> None:
    folder = eole_folder(tmp_path / "eole", original())
    export(ExportOptions(checkpoint=folder, output=tmp_path / "bundle", format=written))
    translator = Translator.load(tmp_path / "bundle", backend=written, threads=1)
    framing = translator.manifest.framing
    assert (framing.prefix, framing.suffix, framing.start, framing.eos, framing.pad) == ((), (), 2, 3, 1)
    assert load_tokenizer(Bundle.open(tmp_path / "bundle"), "source").encode("a z b") == [4, 0, 5]
    [found] = translator.translate(["a b c"], max_new_tokens=5)
    assert found.ids


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_norm": "gemma-rms"}, "layer_norm = 'gemma-rms'"),
        ({"heads_kv": 2}, "heads_kv = 2"),
        ({"relative_positions_buckets": 32}, "relative_positions_buckets = 32"),
        ({"mlp_activation_fn": "quick_gelu"}, "the activation 'quick_gelu'"),
        ({"heads": 5}, "5 heads"),
    ],
)
def test_other_models_of_eole_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(eole_folder(tmp_path / "eole", original(), **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_relative_positions": 20}, "max_relative_positions = 20"),
        ({"position_encoding": False}, "position_encoding_type = None"),
        ({"self_attn_type": "average"}, "self_attn_type = 'average'"),
        ({"copy_attn": True}, "copy_attn = True"),
    ],
)
def test_other_models_of_opennmt_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(opennmt_file(tmp_path / "opennmt", original(), **changes))


def test_vocabularies_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    folder = eole_folder(tmp_path / "eole", original())
    (folder / "vocab.json").write_text(json.dumps({"src": [*WORDS, "more"], "tgt": WORDS}))
    with pytest.raises(TokenizerError, match=r"src vocabulary .* has 19 pieces"):
        load_checkpoint(folder)
    (folder / "vocab.json").write_text(json.dumps({"src": WORDS, "tgt": WORDS, "decoder_start_token": "<go>"}))
    with pytest.raises(TokenizerError, match="has no '<go>'"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transforms": ["prefix", "sentencepiece"]}, "the transform prefix"),
        ({"model": {"encoder": "transformer"}}, "has encoder = 'transformer'"),
        ({"transforms_configs": ["x"]}, "transforms_configs"),
    ],
)
def test_a_configuration_of_other_kinds_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = eole_folder(tmp_path / "eole", original())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_each_side_is_cut_by_its_own_model(tmp_path: Path) -> None:
    folder = eole_folder(tmp_path / "eole", original())
    models = {side: folder / f"{side}.spm.model" for side in ("src", "tgt")}
    pieces = {
        side: train_sentencepiece(models[side], [text] * 50, {}, vocab_size=14)[3:17]
        for side, text in (("src", "ab ba abba"), ("tgt", "cd dc cddc"))
    }
    padded = {side: [*WORDS[:4], *own, *(f"x{one}" for one in range(14 - len(own)))] for side, own in pieces.items()}
    (folder / "vocab.json").write_text(json.dumps(padded))
    config = json.loads((folder / "config.json").read_text())
    named = {f"{side}_subword_model": f"/training/{path.name}" for side, path in models.items()}
    config["transforms_configs"] = {"sentencepiece": named}
    (folder / "config.json").write_text(json.dumps(config))
    text = load_checkpoint(folder).text
    assert text is not None
    assert text.source.files["model"] == models["src"]
    assert text.target.files["model"] == models["tgt"]


def test_pieces_need_what_cuts_texts_into_them(tmp_path: Path) -> None:
    folder = eole_folder(tmp_path / "eole", original())
    joined = [*WORDS[:-1], "￭n"]
    (folder / "vocab.json").write_text(json.dumps({"src": joined, "tgt": joined}))
    with pytest.raises(TokenizerError, match="no model that cuts texts"):
        load_checkpoint(folder)
