"""Marian's own models: model.npz with the configuration in it, vocabularies beside it, decoder.yml.

The facts are those of marian-dev (https://github.com/marian-nmt/marian-dev, src/models/transformer.h), where decoding
begins with an embedding of zeros. Here that is the row of a token behind the vocabulary, which never comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import Checkpoint, build, refuse_tensors
from kvx.models.importers.naming import Named, named
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.models.importers.tokenizer_settings import MOST_SETTINGS, MOST_VOCABULARY, TokenizerSettings, read_bounded
from kvx.models.importers.tokenizer_vocabularies import Pieces, by_id, make_side, read_sentencepiece
from kvx.models.layers import SINUSOIDS
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.manifest import Default
from kvx.runtime.bundle.vocabulary import MOST_PIECES, Vocabulary
from kvx.runtime.errors import CheckpointError, TokenizerError

CONFIG = "special:model.yml"
DECODER_FILES = ("decoder.yml", "model.npz.decoder.yml")
EPSILON = 1e-6
POSITIONS = 1024  # of a table that has no end
MOST_NEW_TOKENS = 256
END, UNKNOWN = "</s>", "<unk>"
MOST_BEAMS = 64

ACTIVATIONS = {"relu": "relu", "swish": "silu", "gelu": "quick_gelu"}  # its gelu is x·σ(1.702x)
BLOCKS = {("", "dan"): "post", ("n", "da"): "pre"}  # by what stands before a part and after it, d being dropout
EXPECTED: Mapping[str, tuple[Any, ...]] = {  # what is read, with the values of settings that a file lacks
    "type": ("transformer",),
    "transformer-decoder-autoreg": ("self-attention", None),
    "transformer-ffn-depth": (2, None),
    "transformer-decoder-ffn-depth": (0, 2, None),
    "transformer-tied-layers": ([], None),
    "transformer-postprocess-emb": ("d", "", None),
    "transformer-no-projection": (False, None),
    "transformer-train-position-embeddings": (False, None),
    "transformer-depth-scaling": (False, True, None),  # of the first weights alone
    "layer-normalization": (False, None),
    "input-types": ([], None),
    "lemma-dim-emb": (0, None),
    "right-left": (False, None),
}

SIDES = {"encoder": "source", "decoder": "target"}
ATTENTIONS = {"self_attention": "self", "cross_attention": "context"}
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "output": "o"}
FEED_FORWARD = {"up": "1", "down": "2"}
NORM_PARAMETERS = {"gamma": "scale", "beta": "bias"}
LAYER = re.compile(r"(encoder|decoder)_l(\d+)_(.+)")
TABLES = ("Wemb", "encoder_Wemb", "decoder_Wemb")
HEADS = {"decoder_ff_logit_out_W": True, "decoder_ff_logit_out_Wt": False}  # whether they are turned over
HEAD_BIAS = "decoder_ff_logit_out_b"
APART = re.compile("|".join((*TABLES, *HEADS, HEAD_BIAS, re.escape(CONFIG))))


def read(path: Path) -> Checkpoint:
    """The model in a file with its vocabularies. Raises CheckpointError and TokenizerError."""
    arrays = _read_arrays(path)
    settings = _read_settings(path, arrays)
    _check_settings(path, settings)
    config, found = _convert(path, arrays, settings)
    model = build(config, found.state, path, found.names)
    decoder = _read_decoder(path.parent)
    text = _read_text(path.parent, decoder, config)
    limit = min(MOST_NEW_TOKENS, config.target_positions)
    return Checkpoint(model, limit, text.notes, family="marian-npz", text=text, defaults=_defaults(decoder, config))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, AttributeError, KeyError) as error:
        _refuse(path, f"is truncated, damaged or no file of arrays ({str(error)[:120]})", "a model.npz of Marian")


def _read_settings(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The configuration that stands in the file, which zeros end."""
    if CONFIG not in arrays:
        _refuse(path, f"has no {CONFIG}", "a model.npz of Marian with its configuration")
    return _yaml(path, arrays[CONFIG].tobytes().rstrip(b"\0"))


def _yaml(path: Path, content: bytes, *, plain: bool = False) -> dict[str, Any]:
    """The names and values of YAML; `plain` ones are all text. Raises CheckpointError."""
    try:
        import yaml
    except ImportError:
        _refuse(path, "needs the package PyYAML", "the packages that an export needs", "pip install 'kvx[export]'")
    loader = getattr(yaml, "CBaseLoader" if plain else "CSafeLoader", yaml.BaseLoader if plain else yaml.SafeLoader)
    try:
        values = yaml.load(content, loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        _refuse(path, f"holds no YAML ({str(error).splitlines()[0][:120]})", "names and values")
    if not isinstance(values, dict):
        _refuse(path, f"holds a {type(values).__name__}", "names and values")
    return values


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} = {settings.get(name)!r:.60}" for name, known in EXPECTED.items() if settings.get(name) not in known
    ]
    around = settings.get("transformer-preprocess", ""), settings.get("transformer-postprocess", "dan")
    if around not in BLOCKS:
        wrong.append(f"transformer-preprocess = {around[0]!r}, transformer-postprocess = {around[1]!r}")
    if settings.get("transformer-postprocess-top", "") not in ("", "n"):
        wrong.append(f"transformer-postprocess-top = {settings['transformer-postprocess-top']!r}")
    if settings.get("transformer-ffn-activation", "relu") not in ACTIVATIONS:
        wrong.append(f"transformer-ffn-activation = {settings['transformer-ffn-activation']!r:.40}")
    if wrong:
        _refuse(
            path,
            f"is of Marian, with {', '.join(wrong)}",
            "a transformer with self-attention in its decoder (students with SSRU are not read)",
            "This architecture is not supported. docs/models.md has the list.",
        )


def _patterns(*, before: bool) -> Iterator[tuple[str, str]]:
    """Our names and theirs, with the layers counted from 0."""
    ending = "_pre" if before else ""
    for side in SIDES:
        ours, theirs = f"{side}_layers.{{}}", f"{side}.{{}}"
        for attention, name in ATTENTIONS.items():
            for part, letter in PROJECTIONS.items():
                yield f"{ours}.{attention}.{part}.weight", f"{theirs}.{name}_W{letter}"
                yield f"{ours}.{attention}.{part}.bias", f"{theirs}.{name}_b{letter}"
        for part, number in FEED_FORWARD.items():
            yield f"{ours}.feed_forward.{part}.weight", f"{theirs}.ffn_W{number}"
            yield f"{ours}.feed_forward.{part}.bias", f"{theirs}.ffn_b{number}"
        for parameter, kind in NORM_PARAMETERS.items():
            for attention, name in ATTENTIONS.items():
                yield f"{ours}.{attention}_norm.{parameter}", f"{theirs}.{name}_Wo_ln_{kind}{ending}"
            yield f"{ours}.feed_forward_norm.{parameter}", f"{theirs}.ffn_ffn_ln_{kind}{ending}"
            yield f"{side}_norm.{parameter}", f"{side}_top_ln_{kind}"


def _convert(path: Path, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> tuple[ModelConfig, Named]:
    """The configuration that arrays and settings make together, and the tensors by our names."""
    tensors = {_renamed(name): _tensor(name, array) for name, array in arrays.items() if name != CONFIG}
    source, target = (tensors.get(f"{side}_Wemb", tensors.get("Wemb")) for side in SIDES)
    if source is None or target is None:
        refuse_tensors(path, ["missing Wemb, or encoder_Wemb and decoder_Wemb"])
    head = next(
        (tensors[name].T if turned else tensors[name] for name, turned in HEADS.items() if name in tensors), None
    )
    bias = tensors.get(HEAD_BIAS)
    positions = SINUSOIDS["halves_inclusive"](POSITIONS, source.shape[1])
    padded = _with_zeros(source)
    padded_target = padded if target is source else _with_zeros(target)
    block = BLOCKS[settings.get("transformer-preprocess", ""), settings.get("transformer-postprocess", "dan")]
    layers = {side: sum(name.startswith(f"{side}.") and name.endswith(".ffn_W1") for name in tensors) for side in SIDES}
    first = {side: tensors.get(f"{side}.0.ffn_W1") for side in SIDES}
    parts: dict[str, object] = {
        "source_vocab_size": len(padded),
        "target_vocab_size": len(padded_target),
        "d_model": source.shape[1],
        "source_positions": POSITIONS,
        "target_positions": POSITIONS,
        **{f"{side}_layers": max(1, number) for side, number in layers.items()},
        **{f"{side}_heads": settings.get("transformer-heads", 8) for side in SIDES},
        **{f"{side}_d_ff": len(weight) if weight is not None else 1 for side, weight in first.items()},
        "block": block,
        "final_norm": settings.get("transformer-postprocess-top", "") == "n",
        "norm": "layer",
        "norm_epsilon": EPSILON,
        "positions": "halves_inclusive",
        "attention_bias": True,
        "activation": ACTIVATIONS[settings.get("transformer-ffn-activation", "relu")],
        "head_bias": bias is not None,
        "shared_embeddings": padded_target is padded,
        "tied_head": head is None,
    }
    config = ModelConfig.from_dict(parts)
    found = named(config, tensors, dict(_patterns(before=block == "pre")), APART)
    found.state.update(
        {
            "source_embedding.positions": positions,
            "target_embedding.positions": positions.clone(),
            "source_embedding.tokens.weight": padded,
            "target_embedding.tokens.weight": padded_target,
            "head.weight": padded_target if head is None else _with_zeros(head),
        }
    )
    if bias is not None:
        found.state["head.bias"] = torch.cat([bias.flatten(), bias.new_zeros(1)])
    return config, found


def _renamed(name: str) -> str:
    """A layer's arrays with its number from 0; others as they are."""
    layer = LAYER.fullmatch(name)
    return f"{layer[1]}.{int(layer[2]) - 1}.{layer[3]}" if layer else name


def _tensor(name: str, array: NDArray[Any]) -> Tensor:
    """Weights of layers turned over, since they stand on the right of their input there; biases and norms flat."""
    tensor = torch.from_numpy(array)
    layer = LAYER.fullmatch(name)
    if layer and re.search(r"_W\w$", name):
        return tensor.T.contiguous()
    return tensor.flatten() if layer or "_ln_" in name else tensor


def _with_zeros(table: Tensor) -> Tensor:
    """A table [V, E] with a row of zeros after it."""
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _read_decoder(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in DECODER_FILES if (folder / name).is_file()), None)
    return {} if path is None else _yaml(path, read_bounded(path, MOST_SETTINGS))


def _defaults(decoder: Mapping[str, Any], config: ModelConfig) -> dict[str, Default]:
    """How decoder.yml searches: beams, and the exponent of the length that scores are divided by."""
    beams, normalize = decoder.get("beam-size"), decoder.get("normalize")
    if type(beams) is not int or not 1 < beams <= min(MOST_BEAMS, config.target_vocab_size - 2):
        return {}
    penalty = float(normalize) if isinstance(normalize, int | float) else 0.0  # true is 1
    return {"beam_size": Default(beams, DECODER_FILES[0]), "length_penalty": Default(penalty, DECODER_FILES[0])}


def _read_text(folder: Path, decoder: Mapping[str, Any], config: ModelConfig) -> Text:
    """The vocabularies that decoder.yml names, or those in the folder."""
    sizes = {"source": config.source_vocab_size, "target": config.target_vocab_size}
    named_there = decoder.get("vocabs")
    listed = named_there if isinstance(named_there, list) and len(named_there) == 2 else [None, None]
    sides = [_side(folder, side, name, sizes[side]) for side, name in zip(sizes, listed, strict=True)]
    (source, source_ids), (target, target_ids) = sides
    end = target_ids[END]
    never = (sizes["target"] - 1, *(() if decoder.get("allow-unk") else (target_ids[UNKNOWN],)))
    framing = Framing(
        prefix=(), suffix=(source_ids[END],), start=sizes["target"] - 1, eos=end, pad=source_ids[END], never=never
    )
    return Text(source, target, framing, Languages(), ())


def _side(folder: Path, side: str, listed: object, size: int) -> tuple[TokenizerFiles, dict[str, int]]:
    """The tokenizer of a side and its ids, `size` with the token of zeros."""
    vocabulary = _vocabulary_file(folder, side, listed)
    spm = vocabulary if vocabulary.suffix == ".spm" else folder / f"{side}.spm"
    if vocabulary.suffix == ".spm":
        pieces: Pieces = list(read_sentencepiece(vocabulary))
        ids = {piece: one for one, piece in enumerate(pieces) if piece is not None}
    else:
        ids = _read_ids(vocabulary)
        pieces = by_id(ids)
    missing = [piece for piece in (END, UNKNOWN) if piece not in ids]
    if missing or len(pieces) != size - 1:
        raise TokenizerError(
            f"{vocabulary} has {len(pieces)} pieces{f' and no {missing[0]}' if missing else ''}",
            expected=f"{size - 1}, the rows of the model's embedding, {END} and {UNKNOWN} among them",
            remedy="Copy the vocabularies that the model was trained with.",
        )
    if spm.is_file():
        settings = TokenizerSettings(folder)
        side_files = make_side(spm, pieces, special=(END, UNKNOWN), unknown=UNKNOWN, size=size, settings=settings)
        return side_files.files, ids
    held = Vocabulary(tuple(pieces), frozenset({ids[END], ids[UNKNOWN]}), ids[UNKNOWN])
    return TokenizerFiles("words", {"vocabulary": held.to_bytes()}), ids


def _vocabulary_file(folder: Path, side: str, listed: object) -> Path:
    """The file that decoder.yml lists, by its name alone, or the only ones that are usual."""
    short = "src" if side == "source" else "trg"
    usual = (
        f"*{short}.vocab.yml",
        f"*vocab.{short}.yml",
        "*vocab.yml",
        f"vocab.{short}.spm",
        f"{side}.spm",
        "vocab.spm",
        "*.spm",
    )
    if isinstance(listed, str) and (folder / Path(listed).name).is_file():
        return folder / Path(listed).name
    for pattern in usual:
        if len(found := sorted(folder.glob(pattern))) == 1:
            return found[0]
    raise TokenizerError(
        f"{folder} has no vocabulary of the {side}",
        expected=f"the one that decoder.yml lists, or one of {', '.join(usual)}",
        remedy="Copy the vocabularies beside the model.",
    )


def _read_ids(path: Path) -> dict[str, int]:
    """A vocabulary of pieces and their ids. Raises CheckpointError and TokenizerError."""
    ids = {}
    for piece, one in _yaml(path, read_bounded(path, MOST_VOCABULARY), plain=True).items():
        if not isinstance(piece, str) or not isinstance(one, str) or not one.isdecimal() or int(one) >= MOST_PIECES:
            raise TokenizerError(
                f"{path} has {piece!r:.40}: {one!r:.40}", expected="pieces and their ids", remedy="Copy it again."
            )
        ids[piece] = int(one)
    return ids


def _refuse(path: Path, got: str, expected: str, remedy: str = "Copy the whole folder again.") -> NoReturn:
    raise CheckpointError(f"{path} {got}", expected=expected, remedy=remedy)
