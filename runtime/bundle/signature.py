"""The contract of the graphs: the one place that knows tensor names, types and axes.

Letters: B rows of the batch, G sentences that share them, S source positions, T capacity of a row's cache, H heads,
D head width, L decoder layers, Q query tokens, E model width, V target vocabulary, C of it on a shortlist. An axis is
a letter where its size may differ from run to run, else its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

Axis = str | int

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int8": 1, "bool": 1}  # numpy has no bfloat16
STEP_BYTES = 4  # of the step behind a key or value in codes
CACHE_BITS = (None, 8)
PAST = "past_key_values"
PRESENT = "present"
PAST_FINISHED = "past_finished"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and axes of one graph input or output."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The axes with their letters replaced by `sizes`."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor at these sizes."""
        return math.prod(self.shape(sizes)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Signature:
    """What one graph takes and gives, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def presents(self) -> dict[str, str]:
        """The outputs that stay in place, each with the name of the input that it becomes for the next step."""
        names = [spec.name for spec in self.outputs]
        looped = any(spec.name == PAST_FINISHED for spec in self.inputs)
        fed_back = {"next_ids": "input_ids"} if looped else {}
        return fed_back | {name: _becomes(name) for name in names if name.startswith(PRESENT)}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a model that its graphs show, L, H, D and V, those of the decoder, and the `element` type of its
    keys and values. `projection` is the width of the rows that a shortlist picks from: E, or E + 1 where they end in a
    bias.
    """

    layers: int
    heads: int
    head_width: int
    vocab_size: int
    projection: int = 0
    element: str = "float32"

    @classmethod
    def of_model(cls, model: Mapping[str, Any], element: str = "float32") -> Self:
        """The dimensions of a model configuration, as the manifest holds it."""
        return cls(
            layers=model["decoder_layers"],
            heads=model["decoder_heads"],
            head_width=model["decoder_head_width"],
            vocab_size=model["target_vocab_size"],
            projection=model["d_model"] + model.get("head_bias", False),
            element=element,
        )


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What a decoder step may have beyond the contract's core, declared in the manifest.

    `query_tokens`: it takes Q tokens of each row at once, input_ids [B, Q], at the positions from past_lengths on, and
    gives logits [B, Q, V]. T must hold past_lengths + Q; a row with fewer than Q tokens is padded by length again.
    `source_presents`: the cross keys and values are outputs too, present.{i}.encoder.key/.value [B, H, S, D]. They are
    the very inputs, which an operator with one kind of cache gives back, and must be bound in place. `shared_sources`:
    source_lengths [G] and the cross keys and values [G, H, S, D] are there once for each sentence, whose B / G rows,
    its beams, stand side by side. `attention`: the step also gives the cross-attention weights of this layer, counted
    from 0, as the mean of its heads: float32 [B, S], zero beyond each source's length. `shortlist`: it takes rows of
    the output projection, float32 projection [C, E], and gives logits [B, C] of them; of a model whose head has biases
    they are [C, E + 1] and end in them. `looped`: it feeds itself. Instead of logits it gives next_ids [B], to be bound
    onto input_ids, and beside past_lengths takes limits [B], past_finished [B] and past_ids [B, T]. A row that is not
    finished writes its next token into present_ids at past_lengths, advances present_lengths by one and is finished
    with eos or when that reaches its limit; a finished one gives the pad id and advances nothing. T must be above every
    limit. Where `forced`, the number of tokens that are not chosen, is above 0, it also takes forced_ids [B, forced],
    which come first. `cache_bits`: in the graph with kvx's own operators the self keys and values are codes of this
    many bits, int8 [B, H, T, D + 4], each D codes and then, as the bytes of a float32, the step that they count.
    """

    query_tokens: bool = False
    source_presents: bool = False
    shared_sources: bool = False
    attention: int | None = None
    shortlist: bool = False
    looped: bool = False
    forced: int = 0
    cache_bits: int | None = None

    @property
    def step(self) -> StepFeatures:
        """Those of the graph that every bundle has."""
        return replace(self, cache_bits=None)

    @property
    def own(self) -> StepFeatures:
        """Those of the graph with kvx's own operators, for one row a sentence or several."""
        return replace(self.beams, cache_bits=self.cache_bits)

    @property
    def beams(self) -> StepFeatures:
        """Those of the graph for several rows a sentence, beside a step with these."""
        return StepFeatures(shared_sources=True, attention=self.attention)

    @property
    def shortlisted(self) -> StepFeatures:
        """Those of the graph for a part of the vocabulary, for one row a sentence or several."""
        return replace(self.beams, shortlist=True)

    @property
    def loop(self) -> StepFeatures:
        """Those of the graph that feeds itself."""
        return StepFeatures(looped=True, forced=self.forced)


CHUNK_FEATURES = StepFeatures(query_tokens=True)


def key_value_names(prefix: str, layer: int, side: str) -> tuple[str, str]:
    """The names of a layer's keys and values; `side` is "decoder" (self) or "encoder" (cross)."""
    return f"{prefix}.{layer}.{side}.key", f"{prefix}.{layer}.{side}.value"


def encoder_signature(dimensions: Dimensions) -> Signature:
    """input_ids [B, S], source_lengths [B] → present.{i}.encoder.key/.value [B, H, S, D]."""
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", ("B", "S")), TensorSpec("source_lengths", "int64", ("B",))),
        outputs=_keys_values(dimensions, PRESENT, "encoder", "S"),
    )


def step_signature(dimensions: Dimensions, features: StepFeatures) -> Signature:
    """One token per row and the caches → logits [B, V] and the self-attention caches with one position written."""
    tokens: tuple[Axis, ...] = ("B", "Q") if features.query_tokens else ("B",)
    sources = "G" if features.shared_sources else "B"
    vocabulary: Axis = "C" if features.shortlist else dimensions.vocab_size
    logits = () if features.looped else (TensorSpec("logits", "float32", (*tokens, vocabulary)),)
    next_ids = (TensorSpec("next_ids", "int64", tokens),) if features.looped else ()
    attention = (TensorSpec("attention", "float32", ("B", "S")),) if features.attention is not None else ()
    return Signature(
        inputs=(
            TensorSpec("input_ids", "int64", tokens),
            TensorSpec("past_lengths", "int64", ("B",)),
            TensorSpec("source_lengths", "int64", (sources,)),
            *((TensorSpec("limits", "int64", ("B",)), *_loop_state("past")) if features.looped else ()),
            *(
                (TensorSpec("forced_ids", "int64", ("B", features.forced)),)
                if features.looped and features.forced
                else ()
            ),
            *((TensorSpec("projection", "float32", ("C", dimensions.projection)),) if features.shortlist else ()),
            *_own_keys_values(dimensions, PAST, features.cache_bits),
            *_keys_values(dimensions, PAST, "encoder", "S", sources),
        ),
        outputs=(
            *logits,
            *next_ids,
            *((TensorSpec("present_lengths", "int64", ("B",)), *_loop_state("present")) if features.looped else ()),
            *attention,
            *_own_keys_values(dimensions, PRESENT, features.cache_bits),
            *(_keys_values(dimensions, PRESENT, "encoder", "S", sources) if features.source_presents else ()),
        ),
    )


def _loop_state(prefix: str) -> tuple[TensorSpec, ...]:
    return TensorSpec(f"{prefix}_finished", "bool", ("B",)), TensorSpec(f"{prefix}_ids", "int64", ("B", "T"))


def _becomes(output: str) -> str:
    """The input that an output of this name becomes: present.… past_key_values.…, and present_… past_…."""
    past = PAST if output.startswith(f"{PRESENT}.") else "past"
    return past + output.removeprefix(PRESENT)


def cache_specs(
    dimensions: Dimensions, *, shared_sources: bool = False, cache_bits: int | None = None
) -> tuple[TensorSpec, ...]:
    """The buffers that a decode keeps from step to step."""
    step = step_signature(dimensions, StepFeatures(shared_sources=shared_sources, cache_bits=cache_bits))
    return tuple(spec for spec in step.inputs if spec.name.startswith(PAST))


def _own_keys_values(dimensions: Dimensions, prefix: str, bits: int | None) -> tuple[TensorSpec, ...]:
    """Those of self-attention, in codes where they have `bits`."""
    coded = dimensions
    if bits is not None:
        coded = replace(dimensions, element="int8", head_width=dimensions.head_width + STEP_BYTES)
    return _keys_values(coded, prefix, "decoder", "T")


def _keys_values(
    dimensions: Dimensions, prefix: str, side: str, positions: str, rows: str = "B"
) -> tuple[TensorSpec, ...]:
    axes = (rows, dimensions.heads, positions, dimensions.head_width)
    return tuple(
        TensorSpec(name, dimensions.element, axes)
        for layer in range(dimensions.layers)
        for name in key_value_names(prefix, layer, side)
    )
