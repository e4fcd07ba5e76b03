"""T5, T5 v1.1, FLAN-T5, mT5, UMT5 and ByT5, as Hugging Face transformers writes them.

The facts are those of the modeling files of transformers 5
(https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/models/t5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvx.models.config import LARGEST_SIZE, ModelConfig
from kvx.models.importers.checkpoint import is_plain
from kvx.models.importers.huggingface_config import CONFIG_FILE, read_activation, read_sizes
from kvx.models.importers.huggingface_tables import HEAD, SHARED, TABLES, read_tables
from kvx.models.importers.naming import NUMBER, Named, named
from kvx.runtime.errors import CheckpointError

BUCKETS, DISTANCE = "relative_attention_num_buckets", "relative_attention_max_distance"
MOST_DISTANCE = 2**16
DEFAULTS = {BUCKETS: 32, DISTANCE: 128, "layer_norm_epsilon": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the model class of a family decides. `feed_forward` is for configurations that do not say; `scaled`, whether
    hidden states may be scaled before the product with the vocabulary; `by_layer`, whether each layer has relative
    positions of its own.
    """

    feed_forward: str
    scaled: bool
    by_layer: bool


FAMILIES = {
    "t5": Family(feed_forward="relu", scaled=True, by_layer=False),
    "mt5": Family(feed_forward="gated-gelu", scaled=False, by_layer=False),
    "umt5": Family(feed_forward="gated-gelu", scaled=True, by_layer=True),
}

PROJECTIONS = {"query": "q", "key": "k", "value": "v", "output": "o"}
LAYERS = {  # the parts of a block by their number in it
    "encoder": {"self_attention": 0, "feed_forward": 1},
    "decoder": {"self_attention": 0, "cross_attention": 1, "feed_forward": 2},
}
ATTENTIONS = {"self_attention": "SelfAttention", "cross_attention": "EncDecAttention"}
BIAS = "{side}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight"
WITHOUT_MEANING = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # of old files
APART = re.compile("|".join((*map(re.escape, (SHARED, HEAD, *TABLES.values())), WITHOUT_MEANING)))


def _patterns(*, gated: bool) -> Iterator[tuple[str, str]]:
    """Our names and theirs."""
    up = {"up": "wi_0", "gate": "wi_1"} if gated else {"up": "wi"}
    for side, parts in LAYERS.items():
        ours, theirs = f"{side}_layers.{{}}", f"{side}.block.{{}}.layer"
        for part, number in parts.items():
            yield f"{ours}.{part}_norm.gamma", f"{theirs}.{number}.layer_norm.weight"
            if part in ATTENTIONS:
                for name, letter in PROJECTIONS.items():
                    yield f"{ours}.{part}.{name}.weight", f"{theirs}.{number}.{ATTENTIONS[part]}.{letter}.weight"
            else:
                for name, layer in {**up, "down": "wo"}.items():
                    yield f"{ours}.{part}.{name}.weight", f"{theirs}.{number}.DenseReluDense.{layer}.weight"
        yield f"{side}_norm.gamma", f"{side}.final_layer_norm.weight"
        yield f"{side}_biases.{{}}.weight", BIAS.format(side=side)
    yield "source_embedding.tokens.weight", TABLES["encoder"]
    yield "target_embedding.tokens.weight", TABLES["decoder"]
    yield "head.weight", HEAD


def convert(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ModelConfig, Named]:
    """The configuration that the tensors of a file and config.json make together, and the tensors by our names. Raises
    CheckpointError.
    """
    family, settings = FAMILIES[config["model_type"]], path.parent / CONFIG_FILE
    values = {**DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    values.setdefault("num_decoder_layers", values.get("num_layers"))
    sizes = read_sizes(settings, values, _size_names())
    buckets, distance = _buckets(settings, values)
    activation, gated = _feed_forward(settings, values.get("feed_forward_proj", family.feed_forward))
    tables = read_tables(path, tensors, {})  # the file decides what is tied
    scaled = family.scaled and values.get("scale_decoder_outputs", values.get("tie_word_embeddings") is not False)
    parts: dict[str, object] = {
        **sizes,
        **tables.parts,
        "source_positions": LARGEST_SIZE,
        "target_positions": LARGEST_SIZE,
        "block": "pre",
        "final_norm": True,
        "norm": "rms",
        "norm_epsilon": values["layer_norm_epsilon"],
        "positions": "relative",
        "relative_distance": distance,
        "relative_by_layer": family.by_layer,
        "scaled_embedding": False,
        "activation": activation,
        "gated": gated,
        "feed_forward_bias": False,
        "head_scale": sizes["d_model"] ** -0.5 if scaled else 1.0,
    }
    made = ModelConfig.from_dict(parts)
    found = named(made, tensors, dict(_patterns(gated=gated)), APART)
    found.state.update(tables.state)
    _spread_buckets(found.state, buckets, distance)
    _scale_queries(found.state, made)
    return made, found


def _size_names() -> dict[str, str]:
    """Our names of the sizes, and theirs."""
    names = {"d_model": "d_model", "encoder_layers": "num_layers", "decoder_layers": "num_decoder_layers"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}_heads": "num_heads", f"{side}_head_width": "d_kv", f"{side}_d_ff": "d_ff"}
    return names


def _buckets(path: Path, values: Mapping[str, Any]) -> tuple[int, int]:
    """How many buckets of distances there are, and where the last begins at the latest. Raises CheckpointError."""
    sizes = read_sizes(path, values, {BUCKETS: BUCKETS, DISTANCE: DISTANCE})
    buckets, distance = sizes[BUCKETS], sizes[DISTANCE]
    if buckets % 4 or not buckets // 2 < distance <= MOST_DISTANCE:
        raise CheckpointError(
            f"{path} has {buckets} buckets of relative positions up to a distance of {distance}",
            expected=f"a multiple of 4, and a distance beyond half of it, up to {MOST_DISTANCE}",
            remedy=f"Check {BUCKETS} and {DISTANCE}.",
        )
    return buckets, distance


def _feed_forward(path: Path, name: object) -> tuple[str, bool]:
    """The activation, and whether it is gated. "gated-gelu" means the approximation by tanh."""
    kind = str(name)
    gated = kind.startswith("gated-")
    plain = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    return read_activation(path, "feed_forward_proj", plain), gated


def bucket(distances: Tensor, buckets: int, farthest: int) -> Tensor:
    """Distances ≥ 0 → their buckets: each its own in the first half, then by their logarithm, in float32 as there."""
    exact = buckets // 2
    far = distances.clamp(min=exact).float()
    by_logarithm = exact + (torch.log(far / exact) / math.log(farthest / exact) * (buckets - exact)).long()
    return torch.where(distances < exact, distances, by_logarithm.clamp(max=buckets - 1))


def _spread_buckets(state: dict[str, Tensor], buckets: int, farthest: int) -> None:
    """Makes a row for each distance of those for buckets [buckets, H]: in the encoder of keys after the query, then of
    those before it, in the decoder only before it.
    """
    distances = torch.arange(farthest + 1)
    half = buckets // 2
    rows = {
        "encoder": torch.cat([half + bucket(distances[1:].flip(0), half, farthest), bucket(distances, half, farthest)]),
        "decoder": bucket(distances, buckets, farthest),
    }
    for name, tensor in state.items():
        side, _, rest = name.partition("_")
        if rest.startswith("biases.") and is_plain(tensor) and tensor.ndim and len(tensor) == buckets:
            state[name] = tensor[rows[side]]


def _scale_queries(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Undoes the division of scores by √D, which these models do not have."""
    for name, tensor in state.items():
        if name.endswith("attention.query.weight") and NUMBER.search(name) and _is_float(tensor):
            width = config.encoder_head_width if name.startswith("encoder") else config.decoder_head_width
            state[name] = tensor.float() * width**0.5


def _is_float(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.is_floating_point()
