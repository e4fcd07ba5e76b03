"""The graphs of the contract as torch modules: flat tensors in, flat tensors out, in the signature's order.

Letters: B rows, G sentences that share them, S source positions, T capacity of a row's cache, H heads, D head width,
E model width, L decoder layers, V target vocabulary, C of it on a shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvx.models.layers import KeyValue
from kvx.models.operators import EAGER, Operators
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.signature import Dimensions, Signature, StepFeatures, encoder_signature, step_signature


class EncoderGraph(nn.Module):
    """input_ids [B, S], source_lengths [B] → key, value of every decoder layer's cross-attention [B, H, S, D]."""

    def __init__(self, model: Transformer, ops: Operators = EAGER) -> None:
        super().__init__()
        self.model = model
        self.ops = ops
        self.signature = encoder_signature(Dimensions.of_model(model.config.to_dict(), model.element))

    def forward(self, input_ids: Tensor, source_lengths: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B, S], source_lengths [B] → 2·L tensors [B, H, S, D]."""
        return flatten(self.model.encode(input_ids, source_lengths, self.ops))


class StepGraph(nn.Module):
    """One token per row, or Q: ids [B] or [B, Q], lengths [B], self caches [B, H, T, D], cross caches [B, H, S, D]
    → logits [B, V] or [B, Q, V], caches. With `shared_sources` source lengths are [G], cross caches [G, H, S, D].
    """

    def __init__(self, model: Transformer, ops: Operators = EAGER, features: StepFeatures | None = None) -> None:
        super().__init__()
        self.model = model
        self.ops = ops
        self.features = features or StepFeatures()
        self.signature = step_signature(Dimensions.of_model(model.config.to_dict(), model.element), self.features)

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, source_lengths: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Ids and lengths [B], then key and value per layer: L self [B, H, T, D], L cross [B, H, S, D]
        → logits [B, V], attention [B, S] where declared, 2·L self caches [B, H, T, D].
        """
        return self._step(input_ids, past_lengths, source_lengths, caches)

    def _step(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        source_lengths: Tensor,
        caches: Sequence[Tensor],
        projection: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        past, cross = caches_of(caches)
        lengths, layer = (past_lengths, source_lengths), self.features.attention
        stepped = self.model.step(
            input_ids, *lengths, past, cross, self.ops, attention_layer=layer, projection=projection
        )
        attention = (stepped.attention,) if stepped.attention is not None else ()
        sources = flatten(stepped.sources) if self.features.source_presents else ()
        return (stepped.logits, *attention, *flatten(stepped.presents), *sources)


class ShortlistGraph(StepGraph):
    """One token per row and the rows of the output projection that count → logits [B, C] of these, caches."""

    def forward(  # type: ignore[override]  # the signature has one input more
        self, input_ids: Tensor, past_lengths: Tensor, source_lengths: Tensor, projection: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Ids and lengths, projection [C, E], then key and value per layer as for a step → logits [B, C], caches."""
        return self._step(input_ids, past_lengths, source_lengths, caches, projection)


def example_inputs(signature: Signature) -> tuple[Tensor, ...]:
    """Inputs for tracing. Every free axis has a size of its own above 1, which a tracer would take for a constant."""
    sizes = {"B": 6, "G": 2, "Q": 3, "S": 5, "T": 7, "C": 11}  # three rows a sentence where they share it
    types = {spec.dtype: getattr(torch, spec.dtype) for spec in signature.inputs}  # the contract's names are torch's
    return tuple(torch.ones(spec.shape(sizes), dtype=types[spec.dtype]) for spec in signature.inputs)


def flatten(pairs: Sequence[KeyValue]) -> tuple[Tensor, ...]:
    """Keys and values per layer → key, value, key, value, …"""
    return tuple(tensor for pair in pairs for tensor in pair)


def caches_of(caches: Sequence[Tensor]) -> tuple[list[KeyValue], list[KeyValue]]:
    """The caches in the signature's order → keys and values per layer, of self- and of cross-attention."""
    half = len(caches) // 2
    return _pair(caches[:half]), _pair(caches[half:])


def _pair(tensors: Sequence[Tensor]) -> list[KeyValue]:
    return [KeyValue(key, value) for key, value in zip(tensors[::2], tensors[1::2], strict=True)]
