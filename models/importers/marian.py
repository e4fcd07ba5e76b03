"""Marian's own models: model.npz with the configuration in it, vocabularies beside it, decoder.yml.

The facts are those of marian-dev (https://github.com/marian-nmt/marian-dev, src/models/transformer.h), where decoding
begins with an embedding of zeros. Here that is the row of a token behind the vocabulary, which never comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import MOST_UNASKED, Checkpoint, build, refuse_file, refuse_tensors
from kvx.models.importers.naming import SIDES, Named, count_layers, named, size
from kvx.models.importers.subwords import TOKENISED, cutting
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.models.importers.tokenizer_settings import MOST_SETTINGS, MOST_VOCABULARY, read_bounded
from kvx.models.importers.tokenizer_vocabularies import Pieces, by_id, read_sentencepiece
from kvx.models.layers import SINUSOIDS
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.manifest import Default
from kvx.runtime.bundle.vocabulary import MOST_PIECES
from kvx.runtime.errors import TokenizerError

CONFIG = "special:model.yml"
DECODER_FILES = ("decoder.yml", "model.npz.decoder.yml")
EPSILON = 1e-6
POSITIONS = 1024  # of a table that has no end
END, UNKNOWN = "</s>", "<unk>"
MOST_DIGITS = 10
COPY = "Copy the vocabularies that the model was trained with."
MOST_BEAMS, MOST_PENALTY = 64, 50

ACTIVATIONS = {"relu": "relu", "swish": "silu", "gelu": "quick_gelu"}
GELU_NOTE = "took gelu as x·σ(1.702x), which it is up to version 1.12 of Marian"
NEVER = -1e4  # the logit of the token that never comes: no share of any sum
EXPECTED: Mapping[str, tuple[Any, ...]] = {  # what is read, with the values of settings that a file lacks
    "type": ("transformer",),
    "transformer-preprocess": ("", None),  # before 1.12.0 keys and values took no part in norms that stand before
    "transformer-postprocess": ("dan", None),
    "transformer-postprocess-top": ("", None),
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
    notes = text.notes if settings.get("transformer-ffn-activation") != "gelu" else (*text.notes, GELU_NOTE)
    limit = min(MOST_UNASKED, config.target_positions)
    return Checkpoint(model, limit, notes, family="marian-npz", text=text, defaults=_defaults(decoder, config))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zip, zlib and numpy have errors of their own for what is damaged
        refuse_file(path, f"is truncated, damaged or no file of arrays ({str(error)[:120]})", "a model.npz of Marian")
    odd = [name for name, array in found.items() if name != CONFIG and not _is_matrix(array)]
    if odd:
        refuse_tensors(path, [f"{name} of {found[name].dtype} {list(found[name].shape)}" for name in odd])
    return {name: array.astype(np.float32) if name != CONFIG else array for name, array in found.items()}


def _is_matrix(array: NDArray[Any]) -> bool:
    """All of Marian's weights have two axes, biases and norms too."""
    return array.ndim == 2 and 0 not in array.shape and array.dtype.kind == "f"


def _read_settings(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The configuration that stands in the file, which zeros end."""
    if CONFIG not in arrays:
        refuse_file(path, f"has no {CONFIG}", "a model.npz of Marian with its configuration")
    return _yaml(path, arrays[CONFIG].tobytes().rstrip(b"\0"))


def _yaml(path: Path, content: bytes, *, plain: bool = False) -> dict[str, Any]:
    """The names and values of YAML; `plain` ones are all text. Raises CheckpointError."""
    try:
        import yaml
    except ImportError:
        refuse_file(path, "needs the package PyYAML", "the packages that an export needs", "pip install 'kvx[export]'")
    loader = getattr(yaml, "CBaseLoader" if plain else "CSafeLoader", yaml.BaseLoader if plain else yaml.SafeLoader)
    try:
        values = yaml.load(content, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError of dates and numbers
        refuse_file(path, f"holds no YAML ({f'{error} '.splitlines()[0][:120]})", "names and values")
    if not isinstance(values, dict):
        refuse_file(path, f"holds a {type(values).__name__}", "names and values")
    return values


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} = {settings.get(name)!r:.60}"
        for name, known in EXPECTED.items()
        if not any(type(settings.get(name)) is type(one) and settings.get(name) == one for one in known)
    ]
    if str(settings.get("transformer-ffn-activation", "relu")) not in ACTIVATIONS:
        wrong.append(f"transformer-ffn-activation = {settings['transformer-ffn-activation']!r:.40}")
    if wrong:
        refuse_file(
            path,
            f"is of Marian, with {', '.join(wrong)}",
            "a post-norm transformer with self-attention in its decoder (students with SSRU are not read)",
            "This architecture is not supported. docs/models.md has the list.",
        )


def _patterns() -> Iterator[tuple[str, str]]:
    """Our names and theirs, with the layers counted from 0."""
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
                yield f"{ours}.{attention}_norm.{parameter}", f"{theirs}.{name}_Wo_ln_{kind}"
            yield f"{ours}.feed_forward_norm.{parameter}", f"{theirs}.ffn_ffn_ln_{kind}"


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
    first = {side: tensors.get(f"{side}.0.ffn_W1") for side in SIDES}
    parts: dict[str, object] = {
        "source_vocab_size": len(padded),
        "target_vocab_size": len(padded_target),
        "d_model": source.shape[1],
        "source_positions": POSITIONS,
        "target_positions": POSITIONS,
        **{f"{side}_layers": count_layers(tensors, f"{side}.{{}}") for side in SIDES},
        **{f"{side}_heads": settings.get("transformer-heads", 8) for side in SIDES},
        **{f"{side}_d_ff": size(weight, 0) for side, weight in first.items()},
        "block": "post",
        "final_norm": False,
        "norm": "layer",
        "norm_epsilon": EPSILON,
        "positions": "halves_inclusive",
        "attention_bias": True,
        "activation": ACTIVATIONS[settings.get("transformer-ffn-activation", "relu")],
        "head_bias": True,
        "shared_embeddings": padded_target is padded,
        "tied_head": head is None,
    }
    config = ModelConfig.from_dict(parts)
    found = named(config, tensors, dict(_patterns()), APART)
    found.state.update(
        {
            "source_embedding.positions": positions,
            "target_embedding.positions": positions.clone(),
            "source_embedding.tokens.weight": padded,
            "target_embedding.tokens.weight": padded_target,
            "head.weight": padded_target if head is None else _with_zeros(head),
        }
    )
    known = torch.zeros(len(padded_target) - 1) if bias is None else bias.flatten().float()
    found.state["head.bias"] = torch.cat([known, torch.full((1,), NEVER)])
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
    known = isinstance(normalize, int | float) and 0 <= normalize <= MOST_PENALTY  # true is 1
    penalty = float(normalize) if known and normalize is not None else 0.0
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
    return Text(source, target, framing, Languages(), () if source.kind == "vocabulary" else (TOKENISED,))


def _side(folder: Path, side: str, listed: object, rows: int) -> tuple[TokenizerFiles, dict[str, int]]:
    """The tokenizer of a side and its ids, of which the model has `rows` with the token of zeros."""
    path = _vocabulary_file(folder, side, listed)
    pieces = _read_pieces(path)
    missing = [piece for piece in (END, UNKNOWN) if piece not in pieces]
    if missing or len(pieces) != rows - 1:
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces{f' and no {missing[0]}' if missing else ''}",
            expected=f"{rows - 1}, the rows of the model's embedding, {END} and {UNKNOWN} among them",
            remedy="Copy the vocabularies that the model was trained with.",
        )
    own = [path.name] if path.suffix == ".spm" else [f"{side}.spm", f"{side}.bpe"]
    files = cutting(folder, pieces, (END, UNKNOWN), side, listed=own)
    return files, {piece: one for one, piece in enumerate(pieces) if piece is not None}


def _vocabulary_file(folder: Path, side: str, listed: object) -> Path:
    """The file that decoder.yml lists, by its name alone, or else the only one of a usual name."""
    if isinstance(listed, str):
        path = folder / Path(listed).name
        if path.is_file():
            return path
        raise TokenizerError(f"{folder} has no {path.name}", expected="what decoder.yml lists", remedy=COPY)
    short, other = ("src", "trg") if side == "source" else ("trg", "src")
    usual = (
        f"*{short}.vocab.yml",
        f"*vocab.{short}.yml",
        "*vocab.yml",
        f"vocab.{short}.spm",
        "*vocab.spm",
        f"{side}.spm",
    )
    theirs = {path for pattern in (f"*{other}.vocab.yml", f"*vocab.{other}.yml") for path in folder.glob(pattern)}
    for pattern in usual:
        found = sorted(set(folder.glob(pattern)) - theirs)
        if len(found) == 1:
            return found[0]
    raise TokenizerError(
        f"{folder} has no vocabulary of the {side}",
        expected=f"the one that decoder.yml lists, or one of {', '.join(usual)}",
        remedy=COPY,
    )


def _read_pieces(path: Path) -> Pieces:
    """The pieces of a vocabulary by id. Raises CheckpointError and TokenizerError."""
    if path.suffix == ".spm":
        return list(read_sentencepiece(path))
    ids: dict[str, int] = {}
    for piece, one in _yaml(path, read_bounded(path, MOST_VOCABULARY), plain=True).items():
        plain = isinstance(piece, str) and isinstance(one, str) and one.isdecimal() and len(one) < MOST_DIGITS
        if not plain or int(one) >= MOST_PIECES:
            raise TokenizerError(f"{path} has {piece!r:.40}: {one!r:.40}", expected="pieces and their ids", remedy=COPY)
        ids[piece] = int(one)
    if not ids or len(set(ids.values())) < len(ids):
        raise TokenizerError(f"{path} has no pieces, or two with one id", expected="an id for each piece", remedy=COPY)
    return by_id(ids)
