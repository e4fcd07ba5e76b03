"""Marian, M2M100 and NLLB, BART, mBART and Pegasus, as Hugging Face transformers writes them.

What differs between these families is in FAMILIES; the facts are those of the modeling files of transformers 5
(https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/models).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvx.models.config import Block, ModelConfig, Positions
from kvx.models.importers.huggingface_config import CONFIG_FILE, read_activation, read_sizes
from kvx.models.importers.huggingface_tables import HEAD, SHARED, TABLES, read_tables, rows
from kvx.models.importers.naming import NORM_PARAMETERS, SIDES, Named, layer_patterns, named
from kvx.models.layers import SINUSOIDS

EPSILON = 1e-5  # of torch.nn.LayerNorm
POSITIONS_SIZE, MOST_POSITIONS = "max_position_embeddings", 1024  # and its default
HEAD_BIAS = "final_logits_bias"


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

ATTENTIONS = {"self_attention": "self_attn", "cross_attention": "encoder_attn"}
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
NORMS = {
    "self_attention_norm": "self_attn_layer_norm",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward_norm": "final_layer_norm",
}
FEED_FORWARD = {"up": "fc1", "down": "fc2"}

POSITIONS = re.compile(r"(encoder|decoder)\.embed_positions\.weights?")
WITHOUT_MEANING = r"(encoder|decoder)\.(version|embed_positions\._float_tensor)"
APART = re.compile(
    "|".join((*map(re.escape, (SHARED, HEAD, HEAD_BIAS, *TABLES.values())), POSITIONS.pattern, WITHOUT_MEANING))
)


def _patterns() -> Iterator[tuple[str, str]]:
    """Our names and theirs."""
    for side, table in SIDES.items():
        yield from layer_patterns(
            side,
            f"{side}.layers.{{}}",
            attentions=ATTENTIONS,
            projections=PROJECTIONS,
            feed_forward=FEED_FORWARD,
            norms=NORMS,
        )
        for parameter, their_parameter in NORM_PARAMETERS.items():
            yield f"{side}_norm.{parameter}", f"{side}.layer_norm.{their_parameter}"
            yield f"{table}_embedding_norm.{parameter}", f"{side}.layernorm_embedding.{their_parameter}"
        yield f"{table}_embedding.tokens.weight", TABLES[side]
        yield f"{table}_embedding.positions", f"{side}.embed_positions.weight"
    yield "head.weight", HEAD
    yield "head.bias", HEAD_BIAS


PATTERNS = dict(_patterns())


def convert(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ModelConfig, Named]:
    """The configuration that the tensors of a file and config.json make together, and the tensors by our names. Raises
    CheckpointError.
    """
    family, settings = FAMILIES[config["model_type"]], path.parent / CONFIG_FILE
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    sizes = read_sizes(settings, {POSITIONS_SIZE: MOST_POSITIONS, **config}, _size_names())
    tables, positions = read_tables(path, tensors, config), _positions(tensors, sizes, family)
    bias = tensors.get(HEAD_BIAS)
    head_bias = bias is not None and bool(bias.any())
    parts: dict[str, object] = {
        "source_positions": rows(positions.get("source_embedding.positions")),
        "target_positions": rows(positions.get("target_embedding.positions")),
        **{name: size for name, size in sizes.items() if name != POSITIONS_SIZE},
        **tables.parts,
        "block": family.block,
        "final_norm": family.final_norm,
        "norm": "layer",
        "norm_epsilon": EPSILON,
        "positions": family.positions,
        "scaled_embedding": bool(config.get("scale_embedding", family.scaled)),
        "embedding_norm": family.embedding_norm,
        "attention_bias": True,
        "activation": read_activation(
            settings, "activation_function", config.get("activation_function", family.activation)
        ),
        "head_bias": head_bias,
    }
    made = ModelConfig.from_dict(parts)
    found = named(made, tensors, PATTERNS, APART)
    found.state.update(positions | tables.state)
    if head_bias:
        assert bias is not None
        found.state["head.bias"] = bias.flatten()
    prefixed = {
        ours: theirs if theirs in (HEAD, HEAD_BIAS) else f"model.{theirs}" for ours, theirs in found.names.items()
    }
    return made, found._replace(names=prefixed)


def _size_names() -> dict[str, str]:
    """Our names of the sizes, and theirs."""
    names = {"d_model": "d_model", POSITIONS_SIZE: POSITIONS_SIZE}
    for side in SIDES:
        names |= {f"{side}_layers": f"{side}_layers", f"{side}_heads": f"{side}_attention_heads"}
        names[f"{side}_d_ff"] = f"{side}_ffn_dim"
    return names


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
