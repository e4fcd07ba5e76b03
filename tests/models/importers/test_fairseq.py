"""Checkpoints in fairseq's form against Hugging Face models that compute the same (BART, M2M100 and FSMT), and where
fairseq is installed, which needs a compiler, against its own models (scripts/test_oracles.sh).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from kvx import Translator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("subword_nmt")

from kvx.exporter.export import export  # noqa: E402
from kvx.exporter.options import ExportOptions, Format  # noqa: E402
from kvx.models.importers import languages as known  # noqa: E402
from kvx.models.importers import load_checkpoint  # noqa: E402
from kvx.runtime.errors import CheckpointError, TokenizerError  # noqa: E402
from kvx.runtime.text.tokenizers.protocol import Tokenizer  # noqa: E402
from kvx.tests.families import BEAMS, Exported, make, opened, sentences, train_sentencepiece  # noqa: E402

WRITTEN = pytest.mark.parametrize("written", ["torchscript", pytest.param("onnx", marks=pytest.mark.proof)])
WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]
SIZE = 4 + len(WORDS)
SIZES = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 30,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 30,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
SETTINGS = {
    "task": "translation",
    "source_lang": "de",
    "target_lang": "en",
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "max_source_positions": 30,
    "max_target_positions": 30,
}


def original(kind: str) -> Any:  # noqa: ANN401
    """A model with random weights, norms and biases too."""
    torch.manual_seed(4)
    common = {**SIZES, "vocab_size": SIZE, "scale_embedding": True}
    if kind == "pre":
        config = transformers.M2M100Config(**common, activation_function="relu")
        model = transformers.M2M100ForConditionalGeneration(config)
    elif kind == "learnt":
        config = transformers.BartConfig(**common, activation_function="gelu")
        model = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.FSMTConfig(
            **common,
            langs=["de", "en"],
            src_vocab_size=SIZE,
            tgt_vocab_size=SIZE + 2,
            tie_word_embeddings=False,
            activation_function="relu",
        )
        model = transformers.FSMTForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if model.config.model_type == "fsmt":
        for stack in (model.model.encoder, model.model.decoder):
            stack.embed_positions.make_weight(32, SIZES["d_model"], 1)
    return model.eval()


def tensors_of(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """A model's tensors by fairseq's names."""
    found: dict[str, Any] = OrderedDict()
    for name, tensor in model.state_dict().items():
        theirs = name.removeprefix("model.")
        if theirs in ("shared.weight", "lm_head.weight", "final_logits_bias"):
            continue
        if "embed_positions" in theirs and model.config.model_type != "bart":
            theirs = theirs.rpartition(".")[0] + "._float_tensor"
        found[theirs] = tensor.clone()
    found["encoder.version"] = torch.tensor([3.0])
    return found


def write(folder: Path, model: Any, *, cfg: bool = False, **settings: Any) -> Path:  # noqa: ANN401
    """A checkpoint with its dictionaries, of `args` or of `cfg`."""
    folder.mkdir(exist_ok=True)
    values = {**SETTINGS, **settings}
    content: dict[str, Any] = {"model": tensors_of(model), "args": None, "cfg": None, "last_optimizer_state": None}
    if cfg:
        content["cfg"] = {"task": {"_name": "translation", **values}, "model": argparse.Namespace(**values)}
    else:
        content["args"] = argparse.Namespace(arch="transformer", **values)
    torch.save(content, folder / "checkpoint_best.pt")
    for language, size in (("de", SIZE), ("en", _rows(model))):
        more = [f"madeupword{one:04}" for one in range(size - SIZE)]
        (folder / f"dict.{language}.txt").write_text("".join(f"{word} 7\n" for word in [*WORDS, *more]))
    return folder


def _rows(model: Any) -> int:  # noqa: ANN401
    return int(model.get_decoder().embed_tokens.weight.shape[0])


KINDS: dict[str, dict[str, Any]] = {
    "post": {},
    "apart": {},
    "pre": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "learnt": {
        "encoder_learned_pos": True,
        "decoder_learned_pos": True,
        "layernorm_embedding": True,
        "activation_fn": "gelu",
    },
}


def assert_same_logits(path: Path, model: Any) -> None:  # noqa: ANN401
    checkpoint = load_checkpoint(path)
    assert checkpoint.family == "fairseq"
    chance = torch.Generator().manual_seed(1)
    for length in (1, 5, 12):
        source = torch.randint(4, SIZE, (1, length), generator=chance)
        target = torch.cat([torch.tensor([[2]]), torch.randint(4, SIZE, (1, 7), generator=chance)], dim=1)
        with torch.inference_mode():
            expected = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
            got = checkpoint.model(source, torch.tensor([length]), target)
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("cfg", [False, True], ids=["args", "cfg"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_same_weights_elsewhere(kind: str, cfg: bool, tmp_path: Path) -> None:
    model = original(kind)
    assert_same_logits(write(tmp_path / "fairseq", model, cfg=cfg, **KINDS[kind]), model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_normalize_before": True, "decoder_normalize_before": True, "share_all_embeddings": True},
        {**KINDS["learnt"], "share_decoder_input_output_embed": True},
        {"no_scale_embedding": True, "activation_fn": "gelu_accurate", "no_token_positional_embeddings": True},
    ],
    ids=["post", "pre", "learnt", "others"],
)
def test_logits_are_those_of_fairseq_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("fairseq")
    from fairseq.data import Dictionary
    from fairseq.models.transformer.transformer_legacy import TransformerModel

    words = Dictionary()
    for word in WORDS:
        words.add_symbol(word, n=7)
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_embed_dim": 30, "decoder_ffn_embed_dim": 40}
    sizes |= {"encoder_embed_dim": 24, "decoder_embed_dim": 24}
    told = argparse.Namespace(arch="transformer", **SETTINGS, **sizes, **options)
    torch.manual_seed(6)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
    model = TransformerModel.build_model(told, task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save({"model": model.state_dict(), "args": told}, tmp_path / "checkpoint_best.pt")
    for language in ("de", "en"):
        words.save(str(tmp_path / f"dict.{language}.txt"))
    source, target = torch.tensor([[5, 6, 7, 4, 9, 2]]), torch.tensor([[2, 4, 9, 7, 5]])
    with torch.inference_mode():
        expected = model(source, torch.tensor([6]), target)[0]
        got = load_checkpoint(tmp_path).model(source, torch.tensor([6]), target)
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_names_of_old_files_are_read(tmp_path: Path) -> None:
    model = original("pre")
    folder = write(tmp_path / "fairseq", model, **KINDS["pre"])
    content = torch.load(folder / "checkpoint_best.pt", weights_only=False)
    old: dict[str, Any] = {}
    for name, tensor in content["model"].items():
        packed = re.fullmatch(r"(.*_attn)\.q_proj\.(weight|bias)", name)
        if packed:
            parts = [content["model"][f"{packed[1]}.{letter}_proj.{packed[2]}"] for letter in "qkv"]
            old[f"{packed[1]}.in_proj_{packed[2]}"] = torch.cat(parts)
        elif norm := re.fullmatch(r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.(\w+)", name):
            old[f"{norm[1]}.layer_norms.1.{norm[2]}"] = tensor
        elif not re.fullmatch(r".*_attn\.[kv]_proj\.\w+", name):
            old[name] = tensor
    torch.save({**content, "model": old}, folder / "checkpoint_best.pt")
    assert_same_logits(folder / "checkpoint_best.pt", model)


@WRITTEN
def test_words_are_translated(tmp_path: Path, written: Format) -> None:
    model = original("post")
    export(ExportOptions(checkpoint=write(tmp_path / "de-en", model), output=tmp_path / "bundle", format=written))
    translator = Translator.load(tmp_path / "bundle", backend=written, threads=1)
    [found] = translator.translate(["zwei  drei neunzig"], max_new_tokens=6)
    source, ids = torch.tensor([[5, 6, 3, 2]]), [2]
    with torch.inference_mode():
        while len(ids) < 7 and (len(ids) == 1 or ids[-1] != 2):
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[1] = -torch.inf  # pad, which its generator never gives either
            ids.append(int(logits.argmax()))
    assert list(found.ids) == ids[1:]


@pytest.mark.proof
def test_ids_are_those_of_a_trained_model_of_many_languages(tmp_path: Path) -> None:
    """M2M100 of the families, with its weights, pieces and languages as fairseq has them."""
    made = make("m2m100", tmp_path / "model", 0)
    folder, config = tmp_path / "fairseq", made.model.config
    folder.mkdir()
    told = {f"{side}_attention_heads": getattr(config, f"{side}_attention_heads") for side in ("encoder", "decoder")}
    told |= {f"max_{side}_positions": config.max_position_embeddings for side in ("source", "target")}
    told |= {"langs": known.M2M100, "encoder_langtok": "src", "decoder_langtok": True, **KINDS["pre"]}
    settings = argparse.Namespace(arch="transformer_wmt_en_de_big", task="translation_multi_simple_epoch", **told)
    torch.save({"model": tensors_of(made.model), "args": settings}, folder / "checkpoint_best.pt")
    shutil.copyfile(made.folder / "sentencepiece.bpe.model", folder / "sentencepiece.bpe.model")
    ids = json.loads((made.folder / "vocab.json").read_text(encoding="utf-8"))
    lines = [f"{piece} 1\n" for piece in sorted(ids, key=lambda piece: ids[piece])[4:]]
    (folder / f"dict.{known.M2M100[0]}.txt").write_text("".join(lines), encoding="utf-8")
    export(ExportOptions(checkpoint=folder, output=tmp_path / "bundle", format="onnx"))
    exported = Exported(made, Translator.load(tmp_path / "bundle", threads=1))
    texts, banned = sentences(64, 77), {"bad_words_ids": [[1]], "max_length": 24}
    for target in made.languages:
        for beams, ours in ((1, {"beam_size": 1}), (4, {**BEAMS, "length_penalty": 1.0})):
            expected = [made.generate(text, target, num_beams=beams, **banned) for text in texts]
            assert len({tuple(one) for one in expected}) > len(set(texts)) / 2
            for rows in (4, 64) if beams > 1 else (1, 3, 64):
                assert exported.ids(texts, target, {**ours, "max_new_tokens": 23}, rows=rows) == expected, rows


def source_tokenizer(path: Path, folder: Path) -> Tokenizer:
    text = load_checkpoint(path).text
    assert text is not None
    return opened(text.source, folder)


@pytest.mark.parametrize("counted", [False, True], ids=["subword-nmt", "fastBPE"])
def test_words_are_cut_by_byte_pair_encoding(tmp_path: Path, counted: bool) -> None:
    model = original("pre")
    folder = write(tmp_path / "fairseq", model, **KINDS["pre"], bpe="fastbpe" if counted else "subword_nmt")
    pieces = ["ei@@", "ns", "dr@@", "ei", "z@@", "w@@", "a@@", "b"]
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    merges = ["e i", "n s</w>", "d r", "e i</w>"]
    content = "".join(f"{merge} 9\n" for merge in merges) if counted else "#version: 0.2\n" + "\n".join(merges) + "\n"
    (folder / "bpecodes").write_text(content)
    source = source_tokenizer(folder, tmp_path / "opened")
    assert source.pieces(source.encode("eins drei")) == ("ei@@", "ns", "dr@@", "ei")
    assert source.surfaces("eins drei") == ("▁ei", "ns", "▁dr", "ei")
    assert source.decode(source.encode("eins drei")) == "eins drei"
    assert source.encode("</s>") == [source.unknown_id] * len(source.encode("</s>"))


def test_sentencepiece_is_read_by_the_ids_of_the_dictionary(tmp_path: Path) -> None:
    model = original("pre")
    folder = write(tmp_path / "fairseq", model, **KINDS["pre"])
    pieces = train_sentencepiece(folder / "sentencepiece.bpe.model", ["eins sein"] * 50, {}, vocab_size=SIZE - 1)
    own = pieces[3:]
    for language in ("de", "en"):
        dictionary = [*own[::-1], *(f"madeupword{one}" for one in range(len(WORDS) - len(own)))]
        (folder / f"dict.{language}.txt").write_text("".join(f"{piece} 1\n" for piece in dictionary), encoding="utf-8")
    source = source_tokenizer(folder, tmp_path / "opened")
    assert source.pieces([4]) == (own[-1],)
    assert source.decode(source.encode("eins sein")) == "eins sein"


def many_languages(folder: Path, **settings: Any) -> Path:  # noqa: ANN401
    """A dictionary of all but five words, to which three languages are appended, and two rows without a piece."""
    folder = write(folder, original("pre"), **KINDS["pre"], task="translation_multi_simple_epoch", **settings)
    (folder / "dict.de.txt").unlink()
    (folder / "dict.fr.txt").write_text("".join(f"{word} 1\n" for word in WORDS[:3]))
    return folder


@WRITTEN
def test_languages_stand_before_the_source_and_first_in_the_target(tmp_path: Path, written: Format) -> None:
    told = {"langs": ["fr", "de", "nl"], "encoder_langtok": "src", "decoder_langtok": True}
    folder = many_languages(tmp_path / "many", **told, fixed_dictionary="/training/dict.fr.txt")
    export(ExportOptions(checkpoint=folder, output=tmp_path / "bundle", format=written))
    translator = Translator.load(tmp_path / "bundle", backend=written, threads=1)
    assert translator.manifest.languages.target == {"fr": 7, "de": 8, "nl": 9}
    [found] = translator.translate(["zwei eins"], source_language="de", target_language="nl", max_new_tokens=5)
    source, ids = torch.tensor([[8, 5, 4, 2]]), [2, 9]
    model = original("pre")
    with torch.inference_mode():
        while len(ids) == 2 or (len(ids) < 7 and ids[-1] != 2):
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            logits[1] = -torch.inf
            ids.append(int(logits.argmax()))
    assert list(found.ids) == ids[2:]


@pytest.mark.parametrize(
    ("told", "prefix", "forced"),
    [
        ({"encoder_langtok": "tgt"}, ("target_language",), ()),
        ({"decoder_langtok": True}, (), ("target_language",)),
        ({"encoder_langtok": "src", "lang_tok_style": "mbart"}, ("source_language",), ()),
    ],
)
def test_the_settings_say_where_languages_stand(
    tmp_path: Path, told: dict[str, Any], prefix: tuple[str, ...], forced: tuple[str, ...]
) -> None:
    text = load_checkpoint(many_languages(tmp_path / "many", **told, lang_pairs="fr-nl,nl-de")).text
    assert text is not None
    assert (text.framing.prefix, text.framing.forced) == (prefix, forced)
    assert dict(text.languages.source or text.languages.target) == {"de": 7, "fr": 8, "nl": 9}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"langs": None}, "does not list its languages"),
        ({"langs": "fr,de", "encoder_langtok": "both"}, "encoder_langtok = 'both'"),
        ({"langs": "xx"}, "has no dict.xx.txt"),
    ],
)
def test_languages_that_cannot_be_placed_are_refused(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(many_languages(tmp_path / "many", **told))


def test_a_piece_that_is_overwritten_has_the_later_id(tmp_path: Path) -> None:
    folder = write(tmp_path / "fairseq", original("pre"), **KINDS["pre"])
    lines = ["eins 1", "<s> 4 #fairseq:overwrite", *(f"w{one} 1" for one in range(6))]
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_text("\n".join(lines))
    source = source_tokenizer(folder, tmp_path / "opened")
    assert source.encode("eins w0") == [4, 6]
    assert source.piece_id("<s>") == 5


def test_a_training_state_of_another_model_is_not_taken_for_one(tmp_path: Path) -> None:
    content = {"model": {"a.weight": torch.ones(2, 2)}, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"a model that kvx does not know: a.weight"):
        load_checkpoint(tmp_path / "model.pt")


def test_an_object_with_code_is_refused_by_its_class(tmp_path: Path) -> None:
    folder = write(tmp_path / "fairseq", original("pre"), **KINDS["pre"])
    content = torch.load(folder / "checkpoint_best.pt", weights_only=False)
    torch.save({**content, "extra_state": re.compile("x")}, folder / "checkpoint_best.pt")
    with pytest.raises(CheckpointError, match=r"carries code \(re\._compile\)"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arch": "lightconv"}, "arch = lightconv"),
        ({"arch": "transformer_lm"}, "arch = transformer_lm"),
        ({"adaptive_softmax_cutoff": "100,200"}, "adaptive_softmax_cutoff"),
        ({"encoder_normalize_before": True, "decoder_normalize_before": False}, "decoder_normalize_before = False"),
        ({"encoder_attention_heads": None}, "encoder_attention_heads = None"),
        ({"task": "multilingual_translation"}, "multilingual_translation"),
        ({"source_lang": None}, "source_lang"),
        ({"activation_fn": "linear"}, "activation_fn 'linear'"),
        ({"activation_fn": ["relu"]}, "activation_fn"),
        ({"arch": "transformer_unidirectional_iwslt_de_en"}, "arch = transformer_unidirectional"),
        ({"encoder_learned_pos": True, "decoder_learned_pos": True}, "missing encoder.embed_positions.weight"),
        ({"max_source_positions": "1024"}, "max_source_positions = '1024'"),
        ({"max_source_positions": 10**13}, "max_source_positions = 10000000000000"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = write(tmp_path / "fairseq", original("post"))
    content = torch.load(folder / "checkpoint_best.pt", weights_only=False)
    for name, value in settings.items():
        setattr(content["args"], name, value)
    torch.save(content, folder / "checkpoint_best.pt")
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("eins 1\n", "has 5 pieces"),
        ("".join(f"{word} 1\n" for word in [*WORDS[:-1], "eins"]), "come twice"),
        ("".join(f"{word}@@ 1\n" for word in WORDS), "no model that cuts texts"),
    ],
)
def test_a_dictionary_that_is_not_the_models_is_refused(tmp_path: Path, content: str, said: str) -> None:
    folder = write(tmp_path / "fairseq", original("pre"), **KINDS["pre"])
    (folder / "dict.de.txt").write_text(content)
    with pytest.raises(TokenizerError, match=said):
        load_checkpoint(folder)
