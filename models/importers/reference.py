"""A bare state dict of the reference model, which tells every size but the heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import (
    Checkpoint,
    StateDict,
    build,
    describe,
    expected_shapes,
    is_plain,
    is_same,
    refuse_tensors,
)
from kvx.models.layers import interleaved_positions
from kvx.runtime.errors import CheckpointError

REFERENCE_TOKEN_LIMIT = 59  # the reference script stops at 60 positions, bos included
REFERENCE_HEAD_WIDTH = 64

# The reference model's names of our modules and parameters.
REFERENCE_NAMES = {
    "source_embedding.tokens": "transformer.src_embedding.embed",
    "target_embedding.tokens": "transformer.tgt_embedding.embed",
    "source_embedding.positions": "transformer.enc_pos.pe",
    "target_embedding.positions": "transformer.dec_pos.pe",
    "encoder_norm": "transformer.encoder.norm",
    "decoder_norm": "transformer.decoder.norm",
    "head": "lm_head",
}
REFERENCE_LAYER_NAMES = {
    "encoder": {
        "self_attention": "attention",
        "feed_forward": "ff",
        "self_attention_norm": "norm1",
        "feed_forward_norm": "norm2",
    },
    "decoder": {
        "self_attention": "masked_attention",
        "cross_attention": "cross_attention",
        "feed_forward": "ff",
        "self_attention_norm": "norm1",
        "cross_attention_norm": "norm2",
        "feed_forward_norm": "norm3",
    },
}
REFERENCE_PARAMETERS = {
    "query": "q",
    "key": "k",
    "value": "v",
    "output": "concat",
    "up": "ff1",
    "down": "ff2",
}

SIZES = {  # of a model, with one of our parameters and its axis that tell each
    "source_vocab_size": ("source_embedding.tokens.weight", 0),
    "target_vocab_size": ("target_embedding.tokens.weight", 0),
    "d_model": ("target_embedding.tokens.weight", 1),
    "encoder_d_ff": ("encoder_layers.0.feed_forward.up.weight", 0),
    "decoder_d_ff": ("decoder_layers.0.feed_forward.up.weight", 0),
    "source_positions": ("source_embedding.positions", -2),
    "target_positions": ("target_embedding.positions", -2),
}


def reference_name(name: str) -> str:
    """The reference model's name of one of our parameters."""
    layer = re.fullmatch(r"(encoder|decoder)_layers\.(\d+)\.(\w+)\.(.+)", name)
    if layer is None:
        part, _, parameter = name.rpartition(".")
        return REFERENCE_NAMES.get(name) or f"{REFERENCE_NAMES[part]}.{parameter}"
    side, index, module, rest = layer.groups()
    parameter, dot, kind = rest.partition(".")
    theirs = REFERENCE_PARAMETERS.get(parameter, parameter) + dot + kind
    return f"transformer.{side}.layers.{index}.{REFERENCE_LAYER_NAMES[side][module]}.{theirs}"


TABLES = {  # of positions, which are sinusoids and need not be saved, with the size that each tells
    reference_name("source_embedding.positions"): "source_positions",
    reference_name("target_embedding.positions"): "target_positions",
}
TIED = ("source_embedding.tokens.weight", "target_embedding.tokens.weight", "head.weight")
POSITIONS = 1024  # of a table that was not saved


def read(content: object, path: Path, heads: int | None) -> Checkpoint | None:
    """The reference model, or None for content without one of its names. Without `heads` their number is assumed.

    Raises CheckpointError for tensors that are not those of the model.
    """
    if (
        not isinstance(content, dict)
        or not _is_state_dict(content)
        or not any(reference_name(name) in content for name, _ in SIZES.values())
    ):
        return None
    state: StateDict = content
    config, notes = _infer_config(state, path, heads)
    state = _completed(state, config)
    names = {ours: reference_name(ours) for ours in expected_shapes(config)}
    ours = {theirs: name for name, theirs in names.items()}
    positions = {names[f"{side}_embedding.positions"] for side in ("source", "target")}
    renamed = {
        ours.get(name, name): tensor[0] if name in positions and tensor.ndim == 3 and len(tensor) == 1 else tensor
        for name, tensor in state.items()
    }
    model = build(config, renamed, path, names)
    return Checkpoint(model, min(REFERENCE_TOKEN_LIMIT, config.target_positions), notes)


def _infer_config(state: StateDict, path: Path, heads: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    telling = {name: reference_name(name) for name, _ in SIZES.values()}
    problems = [f"missing {name}" for name in sorted(set(telling.values()) - state.keys() - TABLES.keys())]
    known = {name: state[name] for name in sorted(set(telling.values())) if name in state}
    problems += [f"{name} of {describe(tensor)}" for name, tensor in known.items() if not is_plain(tensor)]
    problems += [f"{name} with too few axes" for name, tensor in known.items() if tensor.ndim < 2]
    if problems:
        refuse_tensors(path, problems)
    sizes = {field: state[telling[name]].shape[axis] for field, (name, axis) in SIZES.items() if telling[name] in state}
    chosen, notes = _choose_heads(sizes["d_model"], heads)
    unsaved = [name for name in TABLES if name not in state]
    if unsaved:
        sizes |= {TABLES[name]: POSITIONS for name in unsaved}
        notes = (*notes, f"made {' and '.join(unsaved)} of sinusoids for {POSITIONS} positions")
    shared, tied = _tied(state)
    config = ModelConfig(
        **sizes,  # type: ignore[arg-type]  # all of them are sizes
        encoder_heads=chosen,
        decoder_heads=chosen,
        encoder_layers=_count_layers(state, "encoder"),
        decoder_layers=_count_layers(state, "decoder"),
        attention_bias=reference_name("encoder_layers.0.self_attention.query.bias") in state,
        shared_embeddings=shared,
        tied_head=tied,
    )
    return config, notes


def _tied(state: StateDict) -> tuple[bool, bool]:
    """Whether source and target have one table, and whether the head is the target's, as one that is not there is."""
    source, target, head = (state.get(reference_name(name)) for name in TIED)
    return is_same(source, target), head is None or is_same(head, target)


def _completed(state: StateDict, config: ModelConfig) -> StateDict:
    """The state with what was not saved, because it can be made of the rest."""
    made = {name: interleaved_positions(getattr(config, size), config.d_model) for name, size in TABLES.items()}
    if config.tied_head:
        made[reference_name("head.weight")] = state[reference_name("target_embedding.tokens.weight")]
    return {**made, **state}


def _choose_heads(d_model: int, heads: int | None) -> tuple[int, tuple[str, ...]]:
    if heads is not None:
        return heads, ()
    if d_model % REFERENCE_HEAD_WIDTH:
        raise CheckpointError(
            f"The d_model {d_model} is no multiple of {REFERENCE_HEAD_WIDTH}",
            expected="a head count, which the weights cannot tell",
            remedy="Say it with `heads`.",
            option="heads",
        )
    chosen = d_model // REFERENCE_HEAD_WIDTH
    return chosen, (f"took {chosen} heads of {REFERENCE_HEAD_WIDTH} (the weights cannot tell; `heads` overrides)",)


def _count_layers(state: StateDict, side: str) -> int:
    """What is beyond the number of all tensors has gaps below it, which are missing tensors."""
    most = len(state)
    found = (re.match(rf"transformer\.{side}\.layers\.(\d+)\.", name) for name in state)
    numbers = (int(match[1]) if len(match[1]) <= len(str(most)) else most for match in found if match)
    return 1 + min(most, max(numbers, default=0))


def _is_state_dict(content: Mapping[object, object]) -> bool:
    named = all(isinstance(name, str) for name in content)
    return bool(content) and named and all(isinstance(value, Tensor) for value in content.values())
