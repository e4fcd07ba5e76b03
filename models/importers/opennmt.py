"""Folders of Eole, and files of its ancestor OpenNMT-py: transformers for translation.

The facts are those of eole 0.6 (https://github.com/eole-nlp/eole, eole/models, eole/modules) and OpenNMT-py 3.5
(https://github.com/OpenNMT/OpenNMT-py, onmt/modules).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import MOST_UNASKED, Checkpoint, Settings, build, describe, is_same, refuse_file
from kvx.models.importers.folder import read_tensors
from kvx.models.importers.naming import NORM_PARAMETERS, SIDES, count_layers, layer_patterns, named, size
from kvx.models.importers.subwords import TOKENISED, cutting
from kvx.models.importers.text import Text
from kvx.models.importers.tokenizer_settings import MOST_VOCABULARY, has, read_object
from kvx.models.layers import SINUSOIDS
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.errors import TokenizerError

CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE = "config.json", "vocab.json", "model.00.safetensors"
POSITIONS = 5000  # of its sinusoids
EOLE_EPSILON, OPENNMT_EPSILON = 1e-5, 1e-6
SPECIAL = {
    "unk_token": "<unk>",
    "pad_token": "<blank>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}  # unless it says others
CHANGING = ("prefix", "suffix", "uppercase", "normalize")  # transforms that put into a text what kvx does not

ACTIVATIONS = {  # with whether they are gated
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu-tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu", True),
    "gated-gelu-tanh": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
}
TABLES = {"SinusoidalInterleaved": "interleaved", "SinusoidalConcat": "halves_inclusive", "Learned": "learned"}
NORMS = {"standard": "layer", "standardFP32": "layer", "rms": "rms"}

PROJECTIONS = {"query": "linear_query", "key": "linear_keys", "value": "linear_values", "output": "final_linear"}
ATTENTIONS = {"self_attention": "self_attn", "cross_attention": "context_attn"}
SCALAR = re.compile(r"decoder\.transformer_layers\.\d+\.layer_scalar")
APART = re.compile(
    r".*\.pe(\.pe|\.weight)|decoder\.transformer_layers\.\d+\.mask"
    r"|generator\.(weight|bias)|(src|tgt)_emb\.embeddings\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How a format names what is in the layers of a side, and its tables."""

    layers: Mapping[str, str]
    norms: Mapping[str, Mapping[str, str]]
    feed_forward: Mapping[str, str]
    tables: Mapping[str, str]
    positions: Mapping[str, tuple[str, ...]]


EOLE = Naming(
    layers={side: f"{side}.transformer_layers.{{}}" for side in SIDES},
    norms={
        "encoder": {"self_attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
        "decoder": {
            "self_attention_norm": "input_layernorm",
            "cross_attention_norm": "precontext_layernorm",
            "feed_forward_norm": "post_attention_layernorm",
        },
    },
    feed_forward={"up": "mlp.gate_up_proj", "down": "mlp.down_proj", "gate": "mlp.up_proj"},
    tables={"encoder": "src_emb.embeddings.weight", "decoder": "tgt_emb.embeddings.weight"},
    positions={
        "encoder": ("src_emb.pe.pe", "src_emb.pe.weight"),
        "decoder": ("tgt_emb.pe.pe", "tgt_emb.pe.weight"),
    },
)
OPENNMT = Naming(
    layers={"encoder": "encoder.transformer.{}", "decoder": "decoder.transformer_layers.{}"},
    norms={
        "encoder": {"self_attention_norm": "layer_norm", "feed_forward_norm": "feed_forward.layer_norm"},
        "decoder": {
            "self_attention_norm": "layer_norm_1",
            "cross_attention_norm": "layer_norm_2",
            "feed_forward_norm": "feed_forward.layer_norm",
        },
    },
    feed_forward={"up": "feed_forward.w_1", "down": "feed_forward.w_2", "gate": "feed_forward.w_3"},
    tables={side: f"{side}.embeddings.make_embedding.emb_luts.0.weight" for side in SIDES},
    positions={side: (f"{side}.embeddings.make_embedding.pe.pe",) for side in SIDES},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a configuration says of a model, by the names of Eole."""

    path: Path
    heads: Mapping[str, Any]
    positions: str | None
    activation: str
    norm: str
    epsilon: float
    refused: tuple[str, ...] = ()
    vocabularies: Mapping[str, Any] = field(default_factory=dict)
    subwords: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of files, by side


def reads(folder: Path) -> bool:
    """Whether a folder is Eole's."""
    return has(folder, WEIGHTS_FILE) and has(folder, VOCABULARY_FILE) and has(folder, CONFIG_FILE)


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder of Eole. Raises CheckpointError and TokenizerError."""
    config = read_object(folder / CONFIG_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    said = _said_by_eole(folder / CONFIG_FILE, config, read_object(folder / VOCABULARY_FILE, MOST_VOCABULARY))
    return _read(
        folder / WEIGHTS_FILE,
        {name: one for name, one in tensors.items() if not _is_one(name, one)},
        said,
        EOLE,
        "eole",
    )


def read(content: object, path: Path) -> Checkpoint | None:
    """The model of a file of OpenNMT-py, or None for other content. Raises CheckpointError and TokenizerError."""
    if not isinstance(content, Mapping) or not isinstance(content.get("opt"), Settings) or "vocab" not in content:
        return None
    tensors, generator = (content.get(name) or {} for name in ("model", "generator"))
    if not all(isinstance(held, Mapping) and all(map(_is_named, held.items())) for held in (tensors, generator)):
        refuse_file(path, f"holds {describe(content)}", "tensors by name under model and generator")
    tensors = {**tensors, **{f"generator.{name.removeprefix('0.')}": one for name, one in generator.items()}}
    said = _said_by_opennmt(path, vars(content["opt"]), content["vocab"])
    renamed = {_without_old_names(name): one for name, one in tensors.items()}
    return _read(path, renamed, said, OPENNMT, "opennmt-py")


def _is_named(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _said_by_eole(path: Path, config: Mapping[str, Any], vocabularies: Mapping[str, Any]) -> Said:
    model = _section(path, config, "model")
    sides = {side: {**model, **_section(path, model, side)} for side in SIDES}
    embeddings = _section(path, model, "embeddings")
    transforms = _section(path, config, "transforms_configs")
    kind = embeddings.get("position_encoding_type", "SinusoidalInterleaved")
    same = ("mlp_activation_fn", "layer_norm", "norm_eps")
    refused = [
        f"{name} = {sides['encoder'].get(name)} and {sides['decoder'].get(name)}"
        for name in same
        if sides["encoder"].get(name) != sides["decoder"].get(name)
    ]
    refused += [
        f"{side}_type = {sides[side].get(f'{side}_type')}"
        for side in SIDES
        if sides[side].get(f"{side}_type", "transformer") != "transformer"
    ]
    for name, harmless in (
        ("heads_kv", (None,)),
        ("sliding_window", (0, None)),
        ("relative_positions_buckets", (0, None)),
        ("parallel_residual", (False, None)),
        ("ffn_layernorm", (False, None)),
        ("query_norm", (False, None)),
        ("key_norm", (False, None)),
        ("value_norm", (False, None)),
        ("q_gating", (False, None)),
        ("attn_scaling", (None,)),
        ("num_experts", (0, None)),
        ("encoder_layer_style", ("standard", None)),
    ):
        refused += [f"{name} = {side.get(name)!r:.40}" for side in sides.values() if side.get(name) not in harmless][:1]
    refused += [f"the transform {name}" for name in config.get("transforms") or () if name in CHANGING]
    if embeddings.get("normalize") or embeddings.get("position_shift") or embeddings.get("embedding_layer_norm"):
        refused.append("normalize, position_shift or embedding_layer_norm")
    return Said(
        path=path,
        heads={side: values.get("heads", 8) for side, values in sides.items()},
        positions=str(kind),
        activation=str(sides["encoder"].get("mlp_activation_fn", "relu")),
        norm=str(sides["encoder"].get("layer_norm", "standard")),
        epsilon=sides["encoder"].get("norm_eps", EOLE_EPSILON),
        refused=tuple(refused),
        vocabularies=vocabularies,
        subwords=_subword_files(transforms.values()),
    )


def _said_by_opennmt(path: Path, opt: Mapping[str, Any], vocabularies: object) -> Said:
    listed = dict(vocabularies) if isinstance(vocabularies, Mapping) else dict(_pairs(vocabularies))
    listed |= {side: _listed(listed.get(side)) for side in ("src", "tgt")}
    relative = opt.get("max_relative_positions") or 0
    refused = [f"max_relative_positions = {relative}"] if relative else []
    for name, harmless in (
        ("encoder_type", ("transformer", None)),
        ("decoder_type", ("transformer", None)),
        ("self_attn_type", ("scaled-dot", "scaled-dot-flash", None)),
        ("copy_attn", (False, None)),
        ("parallel_residual", (False, None)),
        ("num_kv", (0, None)),
        ("multiquery", (False, None)),
    ):
        if opt.get(name) not in harmless:
            refused.append(f"{name} = {opt[name]!r:.40}")
    kind = opt.get("position_encoding_type", "SinusoidalInterleaved") if opt.get("position_encoding") else None
    return Said(
        path=path,
        heads={side: opt.get("heads", 8) for side in SIDES},
        positions=kind,
        activation=str(opt.get("pos_ffn_activation_fn", "relu")),
        norm=str(opt.get("layer_norm", "standard")),
        epsilon=opt.get("norm_eps", OPENNMT_EPSILON),
        refused=tuple(refused),
        vocabularies=listed,
        subwords=_subword_files([opt]),
    )


def _pairs(vocabularies: object) -> Iterator[tuple[str, object]]:
    """Those of version 1 are a list of names and vocabularies."""
    for pair in vocabularies if isinstance(vocabularies, list) else ():
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str):
            yield pair


def _listed(vocabulary: object) -> object:
    """The pieces by id: a list, or what the objects of torchtext hold before version 3."""
    if not isinstance(vocabulary, Settings):
        return vocabulary
    held = vars(vocabulary)
    if isinstance(held.get("fields"), list) and held["fields"]:
        first = held["fields"][0]
        return _listed(first[1]) if isinstance(first, tuple) and len(first) == 2 else None
    return _listed(held["vocab"]) if "vocab" in held else held.get("itos")


def _section(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The values under a name, none where it is missing. Raises CheckpointError."""
    section = values.get(name) or {}
    if not isinstance(section, dict):
        refuse_file(path, f"has {name} = {section!r:.40}", "names and values")
    return section


def _subword_files(sections: Iterable[object]) -> dict[str, tuple[str, ...]]:
    """The names of the files that settings say texts are cut with, by side."""
    found: dict[str, list[str]] = {"src": [], "tgt": []}
    for settings in sections:
        held = settings if isinstance(settings, Mapping) else {}
        for side in found:
            value = held.get(f"{side}_subword_model")
            found[side] += [Path(value).name] if isinstance(value, str) else []
    return {side: tuple(names) for side, names in found.items()}


def _without_old_names(name: str) -> str:
    """Parameters of norms were called otherwise before."""
    return re.sub(r"\.b_2$", ".bias", re.sub(r"\.a_2$", ".weight", name))


def _is_one(name: str, tensor: Tensor) -> bool:
    """A factor that changes nothing."""
    return bool(SCALAR.fullmatch(name)) and bool((tensor == 1).all())


def _patterns(naming: Naming) -> Iterator[tuple[str, str]]:
    """Our names and theirs."""
    for side, table in SIDES.items():
        yield from layer_patterns(
            side,
            naming.layers[side],
            attentions=ATTENTIONS,
            projections=PROJECTIONS,
            feed_forward=naming.feed_forward,
            norms=naming.norms[side],
        )
        for parameter, kind in NORM_PARAMETERS.items():
            yield f"{side}_norm.{parameter}", f"{side}.layer_norm.{kind}"
        yield f"{table}_embedding.tokens.weight", naming.tables[side]
    yield "head.weight", "generator.weight"
    yield "head.bias", "generator.bias"


def _read(path: Path, tensors: Mapping[str, Tensor], said: Said, naming: Naming, family: str) -> Checkpoint:
    _check(said)
    config, state, names = _convert(tensors, said, naming)
    model = build(config, state, path, names)
    text = _read_text(path.parent, said, config)
    return Checkpoint(model, min(MOST_UNASKED, config.target_positions), text.notes, family=family, text=text)


def _check(said: Said) -> None:
    wrong = list(said.refused)
    if said.positions not in TABLES:
        wrong.append(f"position_encoding_type = {said.positions!r}")
    if said.activation not in ACTIVATIONS:
        wrong.append(f"the activation {said.activation!r:.40}")
    if said.norm not in NORMS:
        wrong.append(f"layer_norm = {said.norm!r:.40}")
    if wrong:
        refuse_file(
            said.path,
            f"describes a model with {', '.join(wrong)}",
            "a transformer encoder and decoder with tables of positions",
            "This architecture is not supported. docs/models.md has the list.",
        )


def _convert(
    tensors: Mapping[str, Tensor], said: Said, naming: Naming
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, str]]:
    """The configuration that tensors and settings make together, the tensors by our names, and theirs."""
    source, target = (tensors.get(naming.tables[side]) for side in SIDES)
    target = source if target is None or is_same(source, target) else target
    head = tensors.get("generator.weight")
    tied = head is None or is_same(head, target)
    activation, gated = ACTIVATIONS[said.activation]
    width = size(source, 1)
    positions = {side: _positions(tensors, naming.positions[side], str(said.positions), width) for side in SIDES}
    sizes: dict[str, object] = {}
    for side, table in SIDES.items():
        first = naming.layers[side].format(0)
        sizes[f"{side}_layers"] = count_layers(tensors, naming.layers[side])
        heads = said.heads[side]
        queries = size(tensors.get(f"{first}.self_attn.linear_query.weight"), 0)
        sizes[f"{side}_heads"] = heads
        sizes[f"{side}_head_width"] = (
            queries // heads if type(heads) is int and heads > 0 and not queries % heads else 0
        )
        sizes[f"{side}_d_ff"] = size(tensors.get(f"{first}.{naming.feed_forward['up']}.weight"), 0)
        sizes[f"{table}_positions"] = size(positions[side], 0)
    biased = any("linear_query.bias" in name or "final_linear.bias" in name for name in tensors)
    parts: dict[str, object] = {
        "source_vocab_size": size(source, 0),
        "target_vocab_size": size(target, 0),
        "d_model": width,
        **sizes,
        "block": "pre",
        "final_norm": True,
        "norm": NORMS[said.norm],
        "norm_epsilon": said.epsilon,
        "positions": TABLES[str(said.positions)],
        "scaled_embedding": said.positions != "Learned",
        "attention_bias": biased,
        "activation": activation,
        "gated": gated,
        "feed_forward_bias": any(f"{naming.feed_forward['up']}.bias" in name for name in tensors),
        "head_bias": "generator.bias" in tensors,
        "shared_embeddings": source is target,
        "tied_head": tied,
    }
    config = ModelConfig.from_dict(parts)
    found = named(config, tensors, dict(_patterns(naming)), APART)
    state = found.state
    for side, saved in positions.items():
        if saved is not None:
            state[f"{SIDES[side]}_embedding.positions"] = saved
    if source is not None and target is not None:
        state["target_embedding.tokens.weight"] = target
        state["head.weight"] = target if tied or head is None else head
    if biased:
        _fill_biases(state, config)
    return config, state, found.names


def _fill_biases(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Zeros for the projections of attention that have no bias where others have one."""
    for side, number in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for attention in ("self_attention", "cross_attention") if side == "decoder" else ("self_attention",):
            for layer in range(number):
                for part in PROJECTIONS:
                    name = f"{side}_layers.{layer}.{attention}.{part}"
                    if f"{name}.weight" in state:
                        state.setdefault(f"{name}.bias", torch.zeros(state[f"{name}.weight"].shape[0]))


def _positions(tensors: Mapping[str, Tensor], names: tuple[str, ...], kind: str, width: int) -> Tensor | None:
    """The table of a side as it was saved, [positions, E], or sinusoids."""
    saved = next((tensors[name] for name in names if isinstance(tensors.get(name), Tensor)), None)
    if saved is not None:
        return saved.squeeze(1) if saved.ndim == 3 else saved
    return SINUSOIDS[TABLES[kind]](POSITIONS, width) if TABLES[kind] in SINUSOIDS else None


def _read_text(folder: Path, said: Said, config: ModelConfig) -> Text:
    """Vocabularies that list pieces by id. A source has nothing around it."""
    special = _special(said.vocabularies.get("specials"))
    rows = {"src": config.source_vocab_size, "tgt": config.target_vocab_size}
    pieces = {side: _pieces(said, side, size, special["unk_token"]) for side, size in rows.items()}
    order = [special[name] for name in ("pad_token", "bos_token", "eos_token", "unk_token")]
    sides = [cutting(folder, held, order, side, listed=said.subwords.get(side, ())) for side, held in pieces.items()]
    start, end = said.vocabularies.get("decoder_start_token", special["bos_token"]), special["eos_token"]
    ids = {piece: one for one, piece in enumerate(pieces["tgt"])}
    missing = [piece for piece in (start, end) if piece not in ids]
    if missing:
        raise TokenizerError(
            f"The target vocabulary of {said.path} has no {missing[0]!r:.40}",
            expected="the tokens that a target begins and ends with",
            remedy="Use the folder as it was saved.",
        )
    pad = ids.get(special["pad_token"], ids[end])
    framing = Framing(prefix=(), suffix=(), start=ids[start], eos=ids[end], pad=pad if pad < rows["src"] else 0)
    return Text(sides[0], sides[1], framing, Languages(), () if sides[0].kind == "vocabulary" else (TOKENISED,))


def _special(named: object) -> dict[str, str]:
    """The special pieces by what they are for, which a vocabulary may spell otherwise."""
    given = named if isinstance(named, Mapping) else {}
    return {name: value if isinstance(value := given.get(name), str) else usual for name, usual in SPECIAL.items()}


def _pieces(said: Said, side: str, rows: int, unknown: str) -> list[str | None]:
    pieces = said.vocabularies.get(side)
    if not isinstance(pieces, list) or len(pieces) > rows or unknown not in pieces:
        got = f"{len(pieces)} pieces" if isinstance(pieces, list) else "none"
        raise TokenizerError(
            f"The {side} vocabulary of {said.path} has {got}",
            expected=f"at most {rows}, the rows of the model's embedding, {unknown} among them",
            remedy="Use the vocabulary that the model was trained with.",
        )
    return [*pieces]
