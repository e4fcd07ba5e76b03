"""Several rows a sentence, its beams, which share the keys and values of their source.

The rows of a sentence become the query positions of one ai.onnx `Attention` over its source: no source is copied, and
each is read once a step.

Letters: B rows, G sentences with B / G rows each, side by side, S source positions, E model width, H heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.lowerings.standard import OPSET, StandardOperators, attend
from kvx.models.layers import Attention, KeyValue
from kvx.models.operators import blend, positions_below, weigh


class StandardBeamOperators(StandardOperators):
    """The `standard` lowering where sentences have several rows."""

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E]; cross [G, H, S, D], source_lengths [G] → [B, E], and cross."""
        heads = attend(_by_sentence(attention.query(x), cross, source_lengths), cross, source_lengths)
        return _merge(attention, heads, x), cross

    def weighed_cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token, x [B, E]; cross [G, H, S, D], source_lengths [G] → [B, E], and the mean of its weights [B, S]."""
        query = _by_sentence(attention.query(x), cross, source_lengths)
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        weights = weigh(query, cross.key, visible)
        by_row = torch.cat([torch.tensor([-1]), _size(cross.key, axis=2)])
        mean = _reshape(weights.mean(dim=1), by_row, (x.shape[0], cross.key.shape[2]))
        return _merge(attention, blend(weights, cross.value), x), mean


class OrtBeamOperators(StandardBeamOperators, OrtOperators):
    """The `ort` lowering where sentences have several rows: only the attention to the source is not the step's."""


def _by_sentence(query: Tensor, cross: KeyValue, source_lengths: Tensor) -> Tensor:
    """query [B, H·D], cross [G, H, S, D], source_lengths [G] → [G, H, B / G, D].

    The shape comes from the lengths, for all layers at once; torch itself would ask for G to divide B.
    """
    sentences, heads, _, width = cross.key.shape
    shape = torch.cat([_size(source_lengths, axis=0), torch.tensor([-1, heads, width])])
    return _reshape(query, shape, (sentences, query.shape[0] // sentences, heads, width)).transpose(1, 2)


def _merge(attention: Attention, heads: Tensor, x: Tensor) -> Tensor:
    """heads [G, H, B / G, D], x [B, E] → like x, through the output projection."""
    shape = (x.shape[0], attention.width)
    merged: Tensor = attention.output(_reshape(heads.transpose(1, 2), torch.tensor([-1, attention.width]), shape))
    return merged


def _size(x: Tensor, *, axis: int) -> Tensor:
    """The size of an axis, as the graph sees it: int64 [1]."""
    size: Tensor = torch.onnx.ops.symbolic(
        "Shape", (x,), {"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,), version=OPSET
    )
    return size


def _reshape(x: Tensor, shape: Tensor, seen: Sequence[int | torch.SymInt]) -> Tensor:
    """x in the `shape` that the graph computes, `seen` by torch."""
    reshaped: Tensor = torch.onnx.ops.symbolic("Reshape", (x, shape), dtype=x.dtype, shape=seen, version=OPSET)
    return reshaped
