"""Folders of Hugging Face transformers: Marian, M2M100 and NLLB, BART, mBART, Pegasus.

What differs between these families is in FAMILIES; the facts are those of the modeling files of transformers 5
(https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/models).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvx.models.config import LARGEST_SIZE, Block, ModelConfig, Positions
from kvx.models.importers.checkpoint import Checkpoint, build, expected_shapes, is_same, refuse_tensors
from kvx.models.importers.folder import read_weights
from kvx.models.importers.huggingface_generation import Generation
from kvx.models.importers.huggingface_text import read_text
from kvx.models.importers.tokenizer_settings import has, read_object
from kvx.models.layers import SINUSOIDS
from kvx.runtime.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
EPSILON = 1e-5  # of torch.nn.LayerNorm
REFUSED = {"nllb-moe": "mixtures of experts are not supported"}

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the model class of a family decides. `offset` is the row of the first position in its table. `activation`
    and `scaled` are for configurations that do not say.
    """

    block: Block
    final_norm: bool
    embedding_norm: bool
    positions: Positions
    offset: int
    activation: str
    scaled: bool


FAMILIES = {
    "marian": Family(
        block="post",
        final_norm=False,
        embedding_norm=False,
        positions="halves",
        offset=0,
        activation="gelu",
        scaled=False,
    ),
    "m2m_100": Family(
        block="pre",
        final_norm=True,
        embedding_norm=False,
        positions="halves_inclusive",
        offset=2,
        activation="relu",
        scaled=True,
    ),
    "bart": Family(
        block="post",
        final_norm=False,
        embedding_norm=True,
        positions="learned",
        offset=2,
        activation="gelu",
        scaled=False,
    ),
    "mbart": Family(
        block="pre",
        final_norm=True,
        embedding_norm=True,
        positions="learned",
        offset=2,
        activation="gelu",
        scaled=False,
    ),
    "pegasus": Family(
        block="pre",
        final_norm=True,
        embedding_norm=False,
        positions="halves",
        offset=0,
        activation="gelu",
        scaled=False,
    ),
}

SIDES = {"encoder": "source", "decoder": "target"}
PARTS = {  # of a layer: ours by theirs
    "self_attn": "self_attention",
    "encoder_attn": "cross_attention",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "final_layer_norm": "feed_forward_norm",
    "fc1": "feed_forward.up",
    "fc2": "feed_forward.down",
}
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
NORM_PARAMETERS = {"weight": "gamma", "bias": "beta"}
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(?:(\w+)\.)?(weight|bias)")
STACK_NORM = re.compile(r"(encoder|decoder)\.(layer_norm|layernorm_embedding)\.(weight|bias)")
POSITIONS = re.compile(r"(encoder|decoder)\.embed_positions\.weights?")
WITHOUT_MEANING = re.compile(r"(encoder|decoder)\.(version|embed_positions\._float_tensor)")

OURS = re.compile(rf"(encoder|decoder)_layers\.(\d+)\.({'|'.join(map(re.escape, PARTS.values()))})\.([\w.]+)")

SHARED = "shared.weight"
TABLES = {"encoder": "encoder.embed_tokens.weight", "decoder": "decoder.embed_tokens.weight"}
POSITIONS_SIZE, MOST_POSITIONS = "max_position_embeddings", 1024  # and its default
HEAD, HEAD_BIAS = "lm_head.weight", "final_logits_bias"


ORIGINALS = {  # of what has no layer
    **{f"{side}_embedding.tokens.weight": f"model.{stack}.embed_tokens.weight" for stack, side in SIDES.items()},
    **{f"{side}_embedding.positions": f"model.{stack}.embed_positions.weight" for stack, side in SIDES.items()},
    **{
        f"{part}.{ours}": f"model.{theirs}.{parameter}"
        for stack, side in SIDES.items()
        for part, theirs in (
            (f"{stack}_norm", f"{stack}.layer_norm"),
            (f"{side}_embedding_norm", f"{stack}.layernorm_embedding"),
        )
        for parameter, ours in NORM_PARAMETERS.items()
    },
    "head.weight": HEAD,
    "head.bias": HEAD_BIAS,
}


class Tables(NamedTuple):
    """The tables of tokens of both sides, and the head's own where it is not the target's."""

    source: Tensor
    target: Tensor
    head: Tensor | None


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder, with its tokenizers, framing, languages and defaults. Raises CheckpointError and
    TokenizerError.
    """
    config = _read_config(folder)
    family = config["model_type"]
    settings = read_object(folder / GENERATION_FILE) if has(folder, GENERATION_FILE) else {}
    generation = Generation(settings, GENERATION_FILE) if settings else Generation(config, CONFIG_FILE)
    path, tensors = read_weights(folder)
    state, model_config = _convert(path, _without_prefix(tensors), config, FAMILIES[family])
    model = build(model_config, state, path, {name: _original(name) for name in expected_shapes(model_config)})
    sizes = model_config.source_vocab_size, model_config.target_vocab_size
    text = read_text(folder, config, settings, *sizes)
    most = model_config.target_positions - len(text.framing.forced)
    limit, notes = generation.limit(most, len(text.framing.forced))
    defaults, more = generation.defaults(text.framing, model_config.target_vocab_size, limit)
    return Checkpoint(model, limit, (*text.notes, *notes, *more), family=family, text=text, defaults=defaults)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a family that is read. Raises CheckpointError."""
    path = folder / CONFIG_FILE
    if not has(folder, CONFIG_FILE):
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}",
            expected="a folder that save_pretrained wrote, or a snapshot of a hub",
            remedy="Name the folder with config.json, weights and tokenizer, or the file of a checkpoint.",
        )
    config = read_object(path)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        why = f", and {REFUSED[kind]}" if kind in REFUSED else ""
        raise CheckpointError(
            f"{path} says that the model is of the type {kind!r:.60}{why}",
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="Only these families are read from a folder. docs/models.md has the list.",
        )
    return config


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the name of the part that holds all but the head."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _convert(
    path: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], family: Family
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The tensors by our names, and the configuration that they and config.json make together. What our model has no
    place for keeps its name.
    """
    tables = _tables(path, tensors, config)
    bias = tensors.get(HEAD_BIAS)
    head_bias = bias is not None and bool(bias.any())
    sizes = _sizes(path, config)
    state = {_renamed(name): tensor for name, tensor in tensors.items() if not _is_apart(name)}
    state |= _positions(tensors, sizes, family)
    state |= {
        "source_embedding.tokens.weight": tables.source,
        "target_embedding.tokens.weight": tables.target,
        "head.weight": tables.target if tables.head is None else tables.head,
    }
    if head_bias:
        assert bias is not None
        state["head.bias"] = bias.flatten()
    parts: dict[str, object] = {
        "source_vocab_size": _rows(tables.source),
        "target_vocab_size": _rows(tables.target),
        "source_positions": _rows(state.get("source_embedding.positions")),
        "target_positions": _rows(state.get("target_embedding.positions")),
        **{name: size for name, size in sizes.items() if name != POSITIONS_SIZE},
        "block": family.block,
        "final_norm": family.final_norm,
        "norm": "layer",
        "norm_epsilon": EPSILON,
        "positions": family.positions,
        "scaled_embedding": bool(config.get("scale_embedding", family.scaled)),
        "embedding_norm": family.embedding_norm,
        "attention_bias": True,
        "activation": _activation(path, config, family),
        "head_bias": head_bias,
        "shared_embeddings": tables.source is tables.target,
        "tied_head": tables.head is None,
    }
    return state, ModelConfig.from_dict(parts)


def _sizes(path: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes by our names, and the rows of a table of positions that was not saved."""
    names = {"d_model": "d_model", POSITIONS_SIZE: POSITIONS_SIZE}
    for side in SIDES:
        names |= {f"{side}_layers": f"{side}_layers", f"{side}_heads": f"{side}_attention_heads"}
        names[f"{side}_d_ff"] = f"{side}_ffn_dim"
    values = {POSITIONS_SIZE: MOST_POSITIONS, **config}
    wrong = [f"{theirs} = {values.get(theirs)!r:.40}" for theirs in names.values() if not _is_size(values.get(theirs))]
    if wrong:
        raise CheckpointError(
            f"{path.parent / CONFIG_FILE} has {', '.join(wrong)}",
            expected=f"whole numbers from 1 to {LARGEST_SIZE}",
            remedy="Save the model again with save_pretrained, or correct the sizes.",
        )
    return {ours: values[theirs] for ours, theirs in names.items()}


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def _activation(path: Path, config: Mapping[str, Any], family: Family) -> str:
    name = config.get("activation_function", family.activation)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path.parent / CONFIG_FILE} has the activation_function {name!r:.60}",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            remedy="This activation is not supported.",
        )
    return ACTIVATIONS[name]


def _tables(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tables:
    """The tables of tokens. Those that a file lacks are others of it; those that it has twice are one."""
    shared, head = tensors.get(SHARED), tensors.get(HEAD)
    own = {side: tensors.get(name) for side, name in TABLES.items()}
    apart = config.get("share_encoder_decoder_embeddings", True) is False
    anywhere = shared if shared is not None else head if head is not None and not apart else None
    for side, table in own.items():
        other = own["decoder" if side == "encoder" else "encoder"] if not apart else None
        fallback = anywhere if anywhere is not None else other
        if table is None and fallback is None:
            refuse_tensors(path, [f"missing {TABLES[side]}"])
        own[side] = fallback if table is None else table
    source, target = own["encoder"], own["decoder"]
    assert source is not None
    assert target is not None
    target = source if is_same(source, target) else target
    if head is None and config.get("tie_word_embeddings", True) is False:
        refuse_tensors(path, [f"missing {HEAD}, although config.json says that it is not tied"])
    return Tables(source, target, None if head is None or is_same(head, target) else head)


def _positions(tensors: Mapping[str, Tensor], sizes: Mapping[str, int], family: Family) -> dict[str, Tensor]:
    """The tables of positions of both sides, cut off before the first position; sinusoids where none was saved."""
    found: dict[str, Tensor] = {}
    saved = {match[1]: tensor for name, tensor in tensors.items() if (match := POSITIONS.fullmatch(name))}
    for theirs, ours in SIDES.items():
        if theirs in saved:
            found[f"{ours}_embedding.positions"] = saved[theirs][family.offset :].clone()
        elif family.positions in SINUSOIDS:
            table = SINUSOIDS[family.positions](sizes[POSITIONS_SIZE] + family.offset, sizes["d_model"])
            found[f"{ours}_embedding.positions"] = table[family.offset :].clone()
    return found


def _rows(table: Tensor | None) -> int:
    """What is missing has one, for an error that names it."""
    return len(table) if table is not None and table.ndim else 1


def _is_apart(name: str) -> bool:
    """Whether a tensor is dealt with by itself, or known to mean nothing."""
    alone = name in (SHARED, HEAD, HEAD_BIAS, *TABLES.values())
    return alone or bool(POSITIONS.fullmatch(name)) or bool(WITHOUT_MEANING.fullmatch(name))


def _renamed(name: str) -> str:
    """Our name of a tensor, or the very name where we have none."""
    if stack := STACK_NORM.fullmatch(name):
        side, kind, parameter = stack.groups()
        part = f"{side}_norm" if kind == "layer_norm" else f"{SIDES[side]}_embedding_norm"
        return f"{part}.{NORM_PARAMETERS[parameter]}"
    layer = LAYER.fullmatch(name)
    if layer is None or layer[3] not in PARTS:
        return name
    side, number, part, projection, parameter = layer.groups()
    ours = f"{side}_layers.{number}.{PARTS[part]}"
    if part.endswith("_norm"):
        return f"{ours}.{NORM_PARAMETERS[parameter]}" if projection is None else name
    if projection is None:
        return f"{ours}.{parameter}"
    return f"{ours}.{PROJECTIONS[projection]}.{parameter}" if projection in PROJECTIONS else name


def _original(name: str) -> str:
    """The original's name of one of our tensors, for messages."""
    if name in ORIGINALS:
        return ORIGINALS[name]
    layer = OURS.fullmatch(name)
    if layer is None:
        return name
    side, number, part, parameter = layer.groups()
    theirs = next(theirs for theirs, ours in PARTS.items() if ours == part)
    projection, _, kind = parameter.rpartition(".")
    kind = next((theirs for theirs, ours in NORM_PARAMETERS.items() if ours == kind), kind)
    projections = {ours: f"{theirs}." for theirs, ours in PROJECTIONS.items()}
    return f"model.{side}.layers.{number}.{theirs}.{projections.get(projection, '')}{kind}"
