"""Several rows a sentence, its beams, which share the keys and values of their source.

The rows of a sentence become the query positions of one ai.onnx `Attention` over its source: no source is copied, and
each is read once a step.

Letters: B rows, G sentences with B / G rows each, side by side, S source positions, E model width, H heads, D head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvx.exporter.ort import OrtOperators
from kvx.exporter.standard import OPSET, StandardOperators, attend
from kvx.models.operators import KeyValue
from kvx.models.transformer import Attention


class StandardBeamOperators(StandardOperators):
    """The `standard` lowering where sentences have several rows."""

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E]; cross [G, H, S, D], source_lengths [G] → [B, E], and cross."""
        query = _by_sentence(attention.query(x), cross.key, source_lengths)
        attended: Tensor = attention.output(_by_row(attend(query, cross, source_lengths), x))
        return attended, cross


class OrtBeamOperators(StandardBeamOperators, OrtOperators):
    """The `ort` lowering where sentences have several rows: only the cross-attention differs from the step's."""


def _by_sentence(query: Tensor, key: Tensor, source_lengths: Tensor) -> Tensor:
    """query [B, E], key [G, H, S, D], source_lengths [G] → [G, H, B / G, D].

    The shape comes from the lengths, for all layers at once; torch itself would ask for G to divide B.
    """
    sentences, heads, _, width = key.shape
    rows = query.shape[0] // sentences
    count = torch.onnx.ops.symbolic("Shape", (source_lengths,), dtype=torch.int64, shape=(1,), version=OPSET)
    split = _reshape(query, torch.cat([count, torch.tensor([-1, heads, width])]), (sentences, rows, heads, width))
    return split.transpose(1, 2)


def _by_row(heads: Tensor, x: Tensor) -> Tensor:
    """heads [G, H, B / G, D], x [B, E] → like x."""
    return _reshape(heads.transpose(1, 2), torch.tensor([-1, x.shape[1]]), tuple(x.shape))


def _reshape(x: Tensor, shape: Tensor, seen: tuple[int | torch.SymInt, ...]) -> Tensor:
    """x in the `shape` that the graph computes, `seen` by torch."""
    reshaped: Tensor = torch.onnx.ops.symbolic("Reshape", (x, shape), dtype=x.dtype, shape=seen, version=OPSET)
    return reshaped
