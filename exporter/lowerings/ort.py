"""The `ort` lowering: ONNX Runtime's own operators (com.microsoft) where they beat those of ai.onnx on a CPU.

Held against `standard`: the decoder's queries, keys and values come from one product; `GroupQueryAttention` writes the
cache and reads it in one operator, and reads the source with no new keys at all. The encoder is the same, since there
nothing was faster (docs/performance.md): not one product for several projections, whose parts have to be copied out,
nor the fused `Attention`, nor `SkipLayerNormalization`
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

Letters: B rows, S source positions, T target positions or cache capacity, E model width, H heads, D head width,
Q query tokens, C tokens of a shortlist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvx.exporter.lowerings.standard import OPSET, StandardOperators
from kvx.models.layers import Attention, KeyValue, Linear
from kvx.models.transformer import Transformer

GROUPED_WIDTH = 8  # GroupQueryAttention takes heads of multiples of it


class OrtOperators(StandardOperators, nn.Module):
    """A module, because the projections of a model that run as one are weights of its own."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self._grouped = model.config.decoder_head_width % GROUPED_WIDTH == 0
        attentions = [layer.self_attention for layer in model.decoder]
        self._packed = {attention: _pack(attention.query, attention.key, attention.value) for attention in attentions}
        self.queries_keys_values = nn.ModuleList(self._packed.values())

    def project(self, attention: Attention, x: Tensor) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E] → queries, keys and values from one product, [B, H, Q, D]."""
        split = attention.split if x.ndim == 3 else attention.split_token
        query, key, value = (split(part) for part in self._packed[attention](x).chunk(3, dim=-1))
        return query, KeyValue(key, value)

    def cached_attention(
        self, attention: Attention, x: Tensor, past: KeyValue, past_lengths: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; past [B, H, T, D], a bias of scores [B, H, Q, T] → like x, and
        present [B, H, T, D].

        Several tokens take the standard way, as the operator has them for one row only, and odd head widths too.
        """
        if x.ndim == 3 or not self._grouped:
            return super().cached_attention(attention, x, past, past_lengths, bias)
        packed = self._packed[attention](x)[:, None]
        attended, present = _grouped_attention((packed, None, None), attention.heads, past, past_lengths, bias)
        return attention.output(attended.flatten(1)), present

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; cross [B, H, S, D], source_lengths [B] → like x, and cross.

        Several tokens take the standard way: the operator would hide the end of the source from the first of them.
        """
        if x.ndim == 3 or not self._grouped:
            return super().cross_attention(attention, x, cross, source_lengths)
        query = attention.query(x)[:, None]
        nothing = query.new_zeros(source_lengths.shape[0], 0, query.shape[-1])
        attended, present = _grouped_attention((query, nothing, nothing), attention.heads, cross, source_lengths - 1)
        return attention.output(attended.flatten(1)), present

    def shortlist_logits(self, x: Tensor, projection: Tensor) -> Tensor:
        """One token, x [B, E], and rows of the output projection [C, E] → logits [B, C].

        With weights that are an input, ONNX Runtime adds up a single row in another order than several, unless the
        product is also scaled: then a sentence gets the same logits alone and among others. A half is exact.
        """
        shape = (x.shape[0], projection.shape[0])
        attributes: dict[str, Any] = {"alpha": 0.5, "transB": 1}
        half: Tensor = torch.onnx.ops.symbolic(
            "Gemm", (x, projection), attributes, dtype=x.dtype, shape=shape, version=OPSET
        )
        return half + half


def _pack(*parts: Linear) -> Linear:
    """Projections of the same input → one that gives all their outputs, one after the other."""
    biased = parts[0].bias is not None
    packed = Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=biased)
    packed.largest_input = parts[0].largest_input
    packed.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
    if biased:
        packed.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
    return packed


def _grouped_attention(
    new: tuple[Tensor, Tensor | None, Tensor | None],
    heads: int,
    past: KeyValue,
    last: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, KeyValue]:
    """Queries, keys and values of one token [B, 1, H·D] each, or packed in the first [B, 1, 3·H·D]; past [B, H, T, D];
    the last position that each row then has, last [B]; a bias of scores [B, H, 1, T] → attended [B, 1, H·D], present
    [B, H, T, D].
    """
    query = new[0]
    width = heads * past.key.shape[3]
    capacity = torch.scalar_tensor(past.key.shape[2], dtype=torch.int32)
    biased = () if bias is None else (None, None, None, bias)
    attended, *present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*new, *past, last.to(torch.int32), capacity, *biased),
        {"num_heads": heads, "kv_num_heads": heads},
        dtypes=[query.dtype] * 3,
        shapes=[(*query.shape[:2], width), past.key.shape, past.value.shape],
        version=1,
    )
    return attended, KeyValue(*present)
