"""The `standard` lowering: ai.onnx opset 24 only, so that any runtime of that opset runs it.

`TensorScatter` writes the cache, `Attention` with `nonpad_kv_seqlen` reads it and the source, every norm is one
operator (https://onnx.ai/onnx/operators).

Letters: B rows, S source positions, T capacity of a row's cache, E model width, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvx.models.layers import Attention, KeyValue, Norm
from kvx.models.operators import Operators, blend, positions_below, weigh

OPSET = 24
IR_VERSION = 12  # what the ONNX specification pairs with opset 24


class StandardOperators(Operators):
    """What the exporter writes where ONNX has an operator for it."""

    def normalize(self, norm: Norm, x: Tensor) -> Tensor:
        """x [..., E] → [..., E], as one operator."""
        return norm.operator(x)

    def project(self, attention: Attention, x: Tensor) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E] → queries, keys and values, [B, H, Q, D] each."""
        if x.ndim == 3:
            return attention.queries(x), attention.keys_values(x)
        return attention.token_query(x), attention.token_keys_values(x)

    def self_attention(self, attention: Attention, x: Tensor, lengths: Tensor, bias: Tensor | None) -> Tensor:
        """Encoder, whole sentences: x [B, S, E], lengths [B], a bias of scores [1, H, S, S] → [B, S, E]. The operator
        itself splits the heads.
        """
        query, key, value = attention.query(x), attention.key(x), attention.value(x)
        attended = attend(query, KeyValue(key, value), lengths, bias, heads=attention.heads)
        result: Tensor = attention.output(attended)
        return result

    def cached_attention(
        self, attention: Attention, x: Tensor, past: KeyValue, past_lengths: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; past [B, H, T, D], a bias of scores [B, H, Q, T] → like x, and
        present [B, H, T, D].

        With lengths given, the operator's causal mask ends at them: the last of Q tokens sees past_lengths + Q.
        """
        several = x.ndim == 3
        query, new = self.project(attention, x)
        present = KeyValue(_scatter(past.key, new.key, past_lengths), _scatter(past.value, new.value, past_lengths))
        attended = attend(query, present, past_lengths + query.shape[2], bias, causal=several)
        return (attention.merge if several else attention.merge_token)(attended), present

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; cross [B, H, S, D], source_lengths [B] → like x, and cross."""
        query = (attention.queries if x.ndim == 3 else attention.token_query)(x)
        attended = attend(query, cross, source_lengths)
        return (attention.merge if x.ndim == 3 else attention.merge_token)(attended), cross

    def weighed_cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token, x [B, E]; cross [B, H, S, D], source_lengths [B] → [B, E], and the mean of its weights [B, S].

        In single operators: `Attention` could give its weights, but the standard's shape inference takes a free S for 0
        there (onnx 1.23).
        """
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        weights = weigh(attention.token_query(x), cross.key, visible)
        return attention.merge_token(blend(weights, cross.value)), weights.mean(dim=(1, 2))


def attend(
    query: Tensor,
    past: KeyValue,
    lengths: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    heads: int | None = None,
) -> Tensor:
    """query [B, H, Q, D], keys and values [B, H, K, D] of which lengths [B] count, a bias of scores [B or 1, H, Q, K]
    → [B, H, Q, D].

    With `heads` all of them are [B, positions, E].
    """
    named = {"is_causal": int(causal), "q_num_heads": heads, "kv_num_heads": heads}
    result: Tensor = torch.onnx.ops.symbolic(
        "Attention",
        (query, past.key, past.value, bias, None, None, lengths),
        {name: value for name, value in named.items() if value},
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET,
    )
    return result


def _scatter(cache: Tensor, update: Tensor, positions: Tensor) -> Tensor:
    """cache [B, H, T, D], update [B, H, Q, D] → the cache with each row's Q positions written [B, H, T, D]."""
    result: Tensor = torch.onnx.ops.symbolic(
        "TensorScatter",
        (cache, update, positions),
        {"axis": 2, "mode": "linear"},
        dtype=cache.dtype,
        shape=cache.shape,
        version=OPSET,
    )
    return result
