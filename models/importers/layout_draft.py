"""A first layout for a state dict, drafted from the names and shapes of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kvx.models.importers.naming import size

HEAD_WIDTH = 64  # of the guessed number of heads
UNSAVED_POSITIONS = 1024

# What the parts of a layer are called in models that are often seen.
NAMES: Mapping[str, tuple[str, ...]] = {
    "cross_attention": (
        *("multihead_attn", "encoder_attn", "cross_attn", "cross_attention", "encoder_attention", "enc_attn"),
        *("encdec_attn", "enc_dec_attention", "context_attn", "src_attn", "encoder_decoder_attention"),
    ),
    "self_attention": (
        *("self_attn", "self_attention", "attention", "attn", "mha", "masked_attention", "slf_attn", "self_mha"),
    ),
    "query": ("q", "q_proj", "query", "wq", "w_q", "w_qs", "fc_q", "linear_q", "linear_query", "q_linear", "to_q"),
    "key": ("k", "k_proj", "key", "wk", "w_k", "w_ks", "fc_k", "linear_k", "linear_keys", "k_linear", "to_k"),
    "value": ("v", "v_proj", "value", "wv", "w_v", "w_vs", "fc_v", "linear_v", "linear_values", "v_linear", "to_v"),
    "output": (
        *("o", "o_proj", "out_proj", "out", "output", "wo", "w_o", "fc", "fc_o", "linear_out", "final_linear"),
        *("dense", "concat", "to_out"),
    ),
    "packed": ("in_proj", "qkv", "qkv_proj", "c_attn"),
    "up": ("linear1", "fc1", "fc_1", "w_1", "w1", "ff1", "lin1", "wi", "up", "up_proj"),
    "down": ("linear2", "fc2", "fc_2", "w_2", "w2", "ff2", "lin2", "down", "down_proj"),
}
FEED_FORWARD = re.compile(r"ff|feed_?forward|mlp|ffn|pos(itionwise)?_ff\w*")
NORM = re.compile(r"(layer_?)?norm|ln")
SOURCE, TARGET = re.compile(r"src|source|enc(?!oding)"), re.compile(r"tgt|trg|target|dec")
HEADS = re.compile(r"generator|lm_head|head|fc_out|output_projection|proj(ection)?|classifier|out|linear")
ORDER = {
    "encoder": ("self_attention", "feed_forward"),
    "decoder": ("self_attention", "cross_attention", "feed_forward"),
}
PACKED = ("query", "key", "value")


@dataclass(slots=True)
class Draft:
    """Lines for [tensors] by our name, and the names with shapes that nothing is known about."""

    tensors: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, tuple[int, ...]] = field(default_factory=dict)


def draft(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]]:
    """The text of a layout file, and sentences about what the tensors do not tell."""
    found = Draft()
    for name, tensor in tensors.items():
        named = list(_ours(name, tensor))
        for ours, theirs in named:
            found.tensors.setdefault(ours, theirs)
        if not named:
            found.unknown.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1), tuple(tensor.shape))
    table = next((tensors[theirs] for ours, theirs in found.tensors.items() if ours.endswith("tokens.weight")), None)
    width = size(table, 1) if table is not None else HEAD_WIDTH
    learnt = any(ours.endswith(".positions") for ours in found.tensors)
    heads = max(1, width // HEAD_WIDTH)
    positions = [] if learnt else [f"source_positions = {UNSAVED_POSITIONS}", f"target_positions = {UNSAVED_POSITIONS}"]
    lines = [
        "# Drafted from names and shapes. Check every line of [model]: no tensor tells them.",
        "[model]",
        f"heads = {heads}  # guessed: d_model {width} / {HEAD_WIDTH}",
        'block = "post"  # "pre" where norms stand before attention and feed-forward (norm_first=True)',
        'norm = "layer"  # or "rms", "reference"',
        "norm_epsilon = 1e-5",
        f'positions = "{"learned" if learnt else "interleaved"}"  # or "halves", "halves_inclusive" of sinusoids',
        *positions,
        "scaled_embedding = true  # whether tokens are multiplied by √d_model",
        'activation = "relu"  # or "gelu", "gelu_tanh", "quick_gelu", "silu"',
        "",
        "[tensors]  # ours = theirs",
        *(f'"{ours}" = {json.dumps(theirs, ensure_ascii=False)}' for ours, theirs in sorted(found.tensors.items())),
    ]
    if found.unknown:
        lines += [
            "",
            "# Nothing is known about these. Move them up, or leave them here where they mean nothing.",
            "[ignored]",
        ]
        listed = ((json.dumps(name, ensure_ascii=False), list(shape)) for name, shape in found.unknown.items())
        lines += ["tensors = [", *(f"    {name},  # {shape}" for name, shape in listed), "]"]
    notes = ["heads, block, norm, activation and the scale of embeddings are guesses: no tensor tells them"]
    if found.unknown:
        notes.append(f"{len(found.unknown)} names fit no part, such as {next(iter(found.unknown))}")
    return "\n".join(lines) + "\n", tuple(notes)


def _ours(name: str, tensor: Tensor) -> Iterator[tuple[str, str]]:
    """Our names of a tensor with the references to it."""
    layer = re.fullmatch(r"(?P<before>.*?)\.(?P<number>\d+)\.(?P<rest>.+)", name)
    side = _side(layer["before"]) if layer else None
    if layer and side:
        theirs = f"{layer['before']}.{{}}.{layer['rest']}"
        for part, suffix in _part(layer["rest"], side):
            yield f"{side}_layers.{{}}.{part}", theirs + suffix
        return
    yield from _outside(name, tensor)


def _side(text: str) -> str | None:
    """Encoder or decoder, whichever is named last."""
    ends = {
        "encoder": [one.end() for one in SOURCE.finditer(text)],
        "decoder": [one.end() for one in TARGET.finditer(text)],
    }
    known = {side: max(found) for side, found in ends.items() if found}
    return max(known, key=lambda side: known[side]) if known else None


def _part(rest: str, side: str) -> Iterator[tuple[str, str]]:
    """Our names of a tensor within a layer, with what is to be added to its own name."""
    packed = re.fullmatch(r"(.*\.)?(in_proj)_(weight|bias)", rest)
    words = [*(packed[1] or "").lower().split("."), "in_proj", packed[3]] if packed else rest.lower().split(".")
    *modules, parameter = [word for word in words if word]
    parameter = {"gamma": "weight", "a_2": "weight", "beta": "bias", "b_2": "bias"}.get(parameter, parameter)
    if parameter not in ("weight", "bias") or not modules:
        return
    last, before = modules[-1], modules[:-1]
    if NORM.search(last) or any(NORM.fullmatch(word) for word in before):
        norm = _norm(".".join(modules), side)
        if norm:
            yield f"{norm}_norm.{'gamma' if parameter == 'weight' else 'beta'}", ""
        return
    attention = next((part for part in ("cross_attention", "self_attention") if set(before) & set(NAMES[part])), None)
    if attention:
        if last in NAMES["packed"]:
            packed_parts = enumerate(PACKED, 1)
            yield from ((f"{attention}.{part}.{parameter}", f", part {one} of 3") for one, part in packed_parts)
            return
        four = (*PACKED, "output")
        listed = four[int(last)] if last in ("0", "1", "2", "3") else None  # in a ModuleList of all four
        yield from ((f"{attention}.{part}.{parameter}", "") for part in four if last in NAMES[part] or part == listed)
        return
    in_order = {"0": "up"}.get(last, "down") if last.isdecimal() and FEED_FORWARD.search(".".join(before)) else None
    both = ("up", "down")
    yield from ((f"feed_forward.{part}.{parameter}", "") for part in both if last in NAMES[part] or part == in_order)


def _norm(name: str, side: str) -> str | None:
    """Whose norm it is: named after it, or numbered."""
    if re.search(r"enc|cross|src|context", name):
        return "cross_attention" if side == "decoder" else None
    if re.search(r"self|attn|attention|slf", name):
        return "self_attention"
    if re.search(r"final", name) or FEED_FORWARD.search(name):
        return "feed_forward"
    number = re.search(r"(\d)(?!.*\d)", name)
    place = int(number[1]) - ("sublayer" not in name) if number else -1
    return ORDER[side][place] if 0 <= place < len(ORDER[side]) else None


def _outside(name: str, tensor: Tensor) -> Iterator[tuple[str, str]]:
    """Our names of a tensor that is in no layer."""
    lowered, (stem, _, parameter) = name.lower(), name.lower().rpartition(".")
    side = _side(lowered)
    table = {"encoder": "source", "decoder": "target"}.get(side or "")
    if "pos" in lowered and tensor.ndim in (2, 3):
        yield from ((f"{one}_embedding.positions", name) for one in ((table,) if table else ("source", "target")))
    elif NORM.search(stem.rpartition(".")[2]) and side and parameter in ("weight", "bias", "a_2", "b_2"):
        yield f"{side}_norm.{'gamma' if parameter in ('weight', 'a_2') else 'beta'}", name
    elif "emb" in lowered and tensor.ndim == 2:
        yield from ((f"{one}_embedding.tokens.weight", name) for one in ((table,) if table else ("source", "target")))
    elif HEADS.search(stem.rpartition(".")[2] or stem) and parameter in ("weight", "bias"):
        yield f"head.{parameter}", name
