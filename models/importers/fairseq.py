"""Checkpoints of fairseq's translation task: `transformer` and its architectures, with the dictionaries beside them.

The facts are those of fairseq's sources (https://github.com/facebookresearch/fairseq, fairseq/models/transformer).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvx.models.config import LARGEST_SIZE, ModelConfig
from kvx.models.importers import huggingface_bart
from kvx.models.importers.checkpoint import Checkpoint, Settings, build, is_plain, is_same, refuse_tensors
from kvx.models.importers.fairseq_text import read_text
from kvx.models.importers.naming import SIDES, Named, count_layers, named, size
from kvx.models.layers import SINUSOIDS
from kvx.runtime.errors import CheckpointError

EPSILON = 1e-5  # of torch.nn.LayerNorm
MOST_POSITIONS = 1024  # unless a file says otherwise
MOST_KEPT_POSITIONS = 2**16  # of a table of sinusoids
OFFSET = 2  # of the first position: they are counted from the id of pad on
MOST_NEW_TOKENS = 200  # max_len_b of its generator

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "swish": "silu",
}
ARCHITECTURES = re.compile(
    r"transformer(_tiny|_iwslt_de_en|(_vaswani)?_wmt_en_(de|fr)(_big)?(_t2t)?(_align)?|_align|_\d+x(_v0)?)?"
)
UNSUPPORTED = {  # settings that change the model, with the values that do not
    "adaptive_softmax_cutoff": (None,),
    "adaptive_input": (False, None),
    "no_cross_attention": (False, None),
    "cross_self_attention": (False, None),
    "encoder_layers_to_keep": (None,),
    "decoder_layers_to_keep": (None,),
    "base_layers": (0, None),
    "char_inputs": (False, None),
    "decoder_recurrent_stacking": (None, 1),
    "encoder_recurrent_stacking": (None, 1),
}

OLD_NORMS = {  # by the numbers that they had before
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
TABLES = {side: f"{side}.embed_tokens.weight" for side in SIDES}
HEADS = ("decoder.output_projection.weight", "decoder.embed_out")
PATTERNS = {**huggingface_bart.PATTERNS, "head.weight": HEADS[0]}  # of layers as there, which came from here
PACKED = re.compile(r"(.*_attn)\.in_proj_(weight|bias)")
OLD_NORM = re.compile(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)")
APART = re.compile(
    r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|weights?)|embed_tokens\.weight)"
    r"|decoder\.(output_projection\.weight|embed_out)"
)


def read(content: object, path: Path) -> Checkpoint | None:
    """The model of a checkpoint with its dictionaries, or None for other content. Raises CheckpointError and
    TokenizerError.
    """
    if not isinstance(content, Mapping) or "model" not in content or not {"args", "cfg"} & content.keys():
        return None
    settings = _settings(content)
    tensors = content["model"]
    if settings is None or not isinstance(tensors, Mapping) or not (TABLES["encoder"] in tensors or "arch" in settings):
        return None
    if not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in tensors.items()):
        refuse_tensors(path, ["names or values that are none"])
    _check_settings(path, settings)
    config, found = _convert(path, _renewed(tensors), settings)
    model = build(config, found.state, path, found.names)
    text = read_text(path.parent, settings, config.source_vocab_size, config.target_vocab_size)
    limit = min(MOST_NEW_TOKENS, config.target_positions - len(text.framing.forced))
    return Checkpoint(model, limit, text.notes, family="fairseq", text=text)


def _settings(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of task and model by name, of `args` up to version 0.10 or of `cfg` from then on."""
    args, cfg = content.get("args"), content.get("cfg")
    if isinstance(args, Settings):
        return dict(vars(args))
    if not isinstance(cfg, Mapping):
        return None
    found: dict[str, Any] = {}
    for name, kind in (("bpe", "bpe"), ("tokenizer", "tokenizer")):
        held = cfg.get(name)
        found[kind] = held.get("_name") if isinstance(held, Mapping) else getattr(held, "_name", None)
    for name, kind in (("task", "task"), ("model", "arch")):
        held = cfg.get(name)
        values = vars(held) if isinstance(held, Settings) else dict(held) if isinstance(held, Mapping) else {}
        found |= values | ({kind: values["_name"]} if values.get("_name") else {})
    return found


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is another model, or is not supported."""
    arch = str(settings.get("arch") or "transformer")
    problems = [] if ARCHITECTURES.fullmatch(arch) else [f"arch = {arch:.60}"]
    problems += [
        f"{name} = {settings[name]!r:.40}"
        for name, harmless in UNSUPPORTED.items()
        if settings.get(name) not in harmless
    ]
    for name in ("normalize_before", "learned_pos", "embed_dim"):
        values = [settings.get(f"{side}_{name}") for side in SIDES]
        if None not in values and values[0] != values[1]:
            problems.append(f"encoder_{name} = {values[0]}, decoder_{name} = {values[1]}")
    if problems:
        raise CheckpointError(
            f"{path} is of fairseq, with {', '.join(problems)}",
            expected="a transformer whose encoder and decoder have the same width, norms and positions",
            remedy="This architecture is not supported. docs/models.md has the list.",
        )


def _renewed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by the names of today: packed projections apart, norms by name."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        packed, norm = PACKED.fullmatch(name), OLD_NORM.fullmatch(name)
        if packed and is_plain(tensor) and tensor.ndim and len(tensor) % 3 == 0:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {f"{packed[1]}.{letter}_proj.{packed[2]}": part for letter, part in parts}
        elif norm and int(norm[3]) < len(OLD_NORMS[norm[2]]):
            found[f"{norm[1]}.{OLD_NORMS[norm[2]][int(norm[3])]}.{norm[4]}"] = tensor
        else:
            found[name] = tensor
    return found


def _convert(path: Path, tensors: dict[str, Any], settings: Mapping[str, Any]) -> tuple[ModelConfig, Named]:
    """The configuration that the tensors of a file and its settings make together, and the tensors by our names."""
    head = next((tensors[name] for name in HEADS if name in tensors), None)
    source, target = (tensors.get(name) for name in TABLES.values())
    missing = [f"missing {name}" for name in TABLES.values() if tensors.get(name) is None]
    if missing:
        refuse_tensors(path, missing)
    shared, tied = is_same(source, target), head is None or is_same(head, target)
    positions = _positions(path, tensors, settings, source)
    before = bool(settings.get("encoder_normalize_before", False))
    activation = settings.get("activation_fn") or "relu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path} has the activation_fn {activation!r:.60}",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            remedy="This activation is not supported.",
        )
    parts: dict[str, object] = {
        **{f"{table}_vocab_size": size(tensors.get(TABLES[side]), 0) for side, table in SIDES.items()},
        "d_model": size(source, 1),
        **{f"{table}_positions": size(positions.get(f"{table}_embedding.positions"), 0) for table in SIDES.values()},
        **{f"{side}_layers": count_layers(tensors, f"{side}.layers.{{}}") for side in SIDES},
        **{f"{side}_heads": _whole(path, settings, f"{side}_attention_heads", None, LARGEST_SIZE) for side in SIDES},
        **{f"{side}_d_ff": size(tensors.get(f"{side}.layers.0.fc1.weight"), 0) for side in SIDES},
        "block": "pre" if before else "post",
        "final_norm": before and not settings.get("no_decoder_final_norm"),
        "norm": "layer",
        "norm_epsilon": EPSILON,
        "positions": "learned" if settings.get("encoder_learned_pos") else "halves_inclusive",
        "scaled_embedding": not settings.get("no_scale_embedding"),
        "embedding_norm": bool(settings.get("layernorm_embedding")),
        "attention_bias": True,
        "activation": ACTIVATIONS[activation],
        "shared_embeddings": shared,
        "tied_head": tied,
    }
    config = ModelConfig.from_dict(parts)
    found = named(config, tensors, PATTERNS, APART)
    own: dict[str, Any] = {"target_embedding.tokens.weight": source if shared else target}
    own["head.weight"] = own["target_embedding.tokens.weight"] if tied else head
    found.state.update(positions | own)
    return config, found


def _positions(
    path: Path,
    tensors: Mapping[str, Any],
    settings: Mapping[str, Any],
    table: Any,  # noqa: ANN401
) -> dict[str, Tensor]:
    """The tables of positions of both sides, cut off before the first position; sinusoids where none is learnt, and
    zeros where there are none.
    """
    found, width = {}, size(table, 1)
    for side, ours in SIDES.items():
        name, learnt = f"{ours}_embedding.positions", tensors.get(f"{side}.embed_positions.weight")
        most = _whole(path, settings, f"max_{ours}_positions", MOST_POSITIONS, MOST_KEPT_POSITIONS)
        if settings.get("no_token_positional_embeddings"):
            found[name] = torch.zeros(most, width)
        elif learnt is not None:
            found[name] = learnt[OFFSET:].clone() if is_plain(learnt) and learnt.ndim == 2 else learnt
        elif not settings.get(f"{side}_learned_pos"):
            found[name] = SINUSOIDS["halves_inclusive"](most + OFFSET, width)[OFFSET:].clone()
    return found


def _whole(path: Path, settings: Mapping[str, Any], name: str, otherwise: int | None, most: int) -> int:
    """A setting that is a whole number. Raises CheckpointError."""
    value = settings.get(name)
    value = otherwise if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{path} has {name} = {value!r:.40} among its settings",
            expected=f"a whole number from 1 to {most}",
            remedy="Use a checkpoint as fairseq-train wrote it.",
        )
    return value
