"""Checkpoint files → a Transformer: one reader per format, every tensor accounted for.

Files are read with `weights_only=True`: nothing in them is ever executed.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.transformer import Transformer
from kvx.runtime.errors import CheckpointError

StateDict = dict[str, Tensor]

KVX_FORMAT = "kvx-checkpoint-1"
REFERENCE_TOKEN_LIMIT = 59  # the reference script stops at 60 positions, bos included
REFERENCE_HEAD_WIDTH = 64
NAMED_PROBLEMS = 10

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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready for inference, with what its file says beyond the weights.

    `max_new_tokens` is the default limit of a translation (tokens after bos, eos included); `notes` are sentences
    about what had to be assumed.
    """

    model: Transformer
    max_new_tokens: int
    notes: tuple[str, ...] = ()


def load_checkpoint(path: Path, *, heads: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: kvx's own file, or a bare state dict of the reference model.

    `heads` is the head count of a state dict, which cannot tell; kvx's own file can, and is believed. Raises
    CheckpointError.
    """
    content = _read(path)
    if isinstance(content, dict) and content.get("format") == KVX_FORMAT:
        return _read_kvx(content, path)
    if isinstance(content, dict) and _is_state_dict(content):
        return _read_reference(content, path, heads)
    raise CheckpointError(
        f"{path} holds {_describe(content)}",
        expected="a state dict of the reference model (names to tensors) or a checkpoint written by kvx",
        remedy="Save the model with torch.save(model.state_dict(), file).",
    )


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes kvx's own format: configuration, weights and token limit in one file."""
    content = {
        "format": KVX_FORMAT,
        "config": checkpoint.model.config.to_dict(),
        "max_new_tokens": checkpoint.max_new_tokens,
        "state_dict": checkpoint.model.state_dict(),
    }
    torch.save(content, path)


def _read(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}",
            expected="a checkpoint file",
            remedy="Check the path.",
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what an unpickler makes of a damaged file can be any exception
        code = re.search(r"(?:unsupported|Unsupported)[\w :]* (?:GLOBAL|class) ([\w.]+)", str(error))
        if code and not _ends_with(path, code[1].rpartition(".")[2]):
            raise CheckpointError(
                f"{path} carries code ({code[1]}), refused because loading it could run anything",
                expected="tensors and plain values only",
                remedy="Save model.state_dict() instead of the model or the training state.",
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged or no PyTorch file ({_first_line(error)})",
            expected="a file written by torch.save",
            remedy="Copy or save the checkpoint again.",
        ) from None


def _ends_with(path: Path, name: str) -> bool:
    """Whether the file ends in the middle of this name: then it was cut, and nobody knows what it was."""
    with path.open("rb") as file:
        file.seek(-min(len(name), path.stat().st_size), os.SEEK_END)
        return file.read() == name.encode()


def _is_state_dict(content: Mapping[object, object]) -> bool:
    named = all(isinstance(name, str) for name in content)
    return bool(content) and named and all(isinstance(value, Tensor) for value in content.values())


def _read_kvx(content: Mapping[str, object], path: Path) -> Checkpoint:
    config, state, limit = (content.get(name) for name in ("config", "state_dict", "max_new_tokens"))
    if not isinstance(config, dict) or not isinstance(state, dict) or type(limit) is not int or limit < 1:
        raise CheckpointError(
            f"{path} lacks its configuration, weights or token limit",
            expected="config, state_dict and max_new_tokens",
            remedy="Write the checkpoint again with kvx.",
        )
    return Checkpoint(_build(ModelConfig.from_dict(config), state, path), limit)


def _read_reference(state: StateDict, path: Path, heads: int | None) -> Checkpoint:
    config, notes = _infer_config(state, path, heads)
    names = {ours: reference_name(ours) for ours in _expected_shapes(config)}
    ours = {theirs: name for name, theirs in names.items()}
    positions = {names[f"{side}_embedding.positions"] for side in ("source", "target")}
    renamed = {
        ours.get(name, name): tensor[0] if name in positions and tensor.ndim == 3 and len(tensor) == 1 else tensor
        for name, tensor in state.items()
    }
    model = _build(config, renamed, path, names)
    return Checkpoint(model, min(REFERENCE_TOKEN_LIMIT, config.target_positions), notes)


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


def _infer_config(state: StateDict, path: Path, heads: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    sources = {
        "source_vocab_size": ("source_embedding.tokens.weight", 0),
        "target_vocab_size": ("target_embedding.tokens.weight", 0),
        "d_model": ("target_embedding.tokens.weight", 1),
        "d_ff": ("encoder_layers.0.feed_forward.up.weight", 0),
        "source_positions": ("source_embedding.positions", -2),
        "target_positions": ("target_embedding.positions", -2),
    }
    absent = sorted({reference_name(name) for name, _ in sources.values()} - state.keys())
    flat = [
        name for name in {reference_name(name) for name, _ in sources.values()} - set(absent) if state[name].ndim < 2
    ]
    if absent or flat:
        problems = [f"missing {name}" for name in absent] + [f"{name} with too few axes" for name in flat]
        _refuse_tensors(path, problems)
    sizes = {field: state[reference_name(name)].shape[axis] for field, (name, axis) in sources.items()}
    chosen, notes = _choose_heads(sizes["d_model"], heads)
    config = ModelConfig(
        **sizes,
        heads=chosen,
        encoder_layers=_count_layers(state, "encoder"),
        decoder_layers=_count_layers(state, "decoder"),
        attention_bias=reference_name("encoder_layers.0.self_attention.query.bias") in state,
    )
    return config, notes


def _choose_heads(d_model: int, heads: int | None) -> tuple[int, tuple[str, ...]]:
    if heads is not None:
        return heads, ()
    if d_model % REFERENCE_HEAD_WIDTH:
        raise CheckpointError(
            f"d_model {d_model}, which is no multiple of {REFERENCE_HEAD_WIDTH}",
            expected="a head count, which the weights cannot tell",
            remedy="Say it with --heads.",
        )
    chosen = d_model // REFERENCE_HEAD_WIDTH
    return chosen, (f"took {chosen} heads of {REFERENCE_HEAD_WIDTH} (the weights cannot tell; --heads overrides)",)


def _count_layers(state: StateDict, side: str) -> int:
    found = (re.match(rf"transformer\.{side}\.layers\.(\d+)\.", name) for name in state)
    highest = max((int(match[1]) for match in found if match), default=0)
    return 1 + min(highest, len(state))  # what is beyond has gaps below it, which are missing tensors


def _expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def _build(config: ModelConfig, state: StateDict, path: Path, names: Mapping[str, str] | None = None) -> Transformer:
    """The model with these weights; `names` maps ours to the file's own, for messages."""
    expected = _expected_shapes(config)
    names = names or {}
    problems = [f"missing {names.get(name, name)}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{names.get(name, name)} of {_describe(state[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and not _fits(state[name], shape)
    ]
    fitting = {name: state[name].float() for name, shape in expected.items() if _fits(state.get(name), shape)}
    problems += [
        f"{names.get(name, name)} with values that are not finite"
        for name, tensor in fitting.items()
        if not bool(tensor.isfinite().all())
    ]
    if problems:
        _refuse_tensors(path, problems)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(fitting, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


def _fits(value: object, shape: torch.Size) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.shape == shape and value.is_floating_point()


def _refuse_tensors(path: Path, problems: list[str]) -> None:
    shown = ", ".join(problems[:NAMED_PROBLEMS]) + (", …" if len(problems) > NAMED_PROBLEMS else "")
    raise CheckpointError(
        f"{path} has {len(problems)} wrong tensor{'s' if len(problems) > 1 else ''}: {shown}",
        expected="exactly the tensors of the reference model, in the shapes that its embeddings imply",
        remedy="Check that the file is a state dict of this architecture.",
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided and not value.is_meta else " without plain values"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{kind}"
    if isinstance(value, dict):
        odd_first = sorted(value, key=lambda key: isinstance(key, str))
        return f"a dict with the keys {odd_first[:NAMED_PROBLEMS]}"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    if not isinstance(error, (RuntimeError, OSError, EOFError)):  # torch's own words are advice to run what is in it
        return "no pickle of tensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
