"""The operations of the model that an exporter may replace: attention, the cache write, normalisation.

Letters: B rows, S source positions, T target positions or cache capacity, E model width, H heads, D head width, C
tokens of a shortlist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvx.models.layers import Attention, KeyValue, Norm

MASKED_SCORE = -1e9


def positions_below(lengths: Tensor, positions: int) -> Tensor:
    """lengths [B] → true where a position lies inside its row's length [B, positions]."""
    return torch.arange(positions, device=lengths.device) < lengths[:, None]


def weigh(query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """query [B, H, Q, D], key [B, H, K, D], visible [B, 1, Q or 1, K], a bias of scores [B or 1, H, Q, K] → float32
    weights [B, H, Q, K], 0 where not visible.

    Of scaled dot-product attention (Vaswani et al. 2017, §3.2.1). Masked scores are replaced, not lowered, so that any
    finite number may lie under the mask.
    """
    scores = (query @ key.transpose(-2, -1)).float() / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    weights: Tensor = scores.masked_fill(~visible, MASKED_SCORE).softmax(dim=-1)
    return weights


def attend(query: Tensor, past: KeyValue, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """query [B, H, Q, D], keys and values [B, H, K, D], visible [B, 1, Q or 1, K], a bias of scores [B or 1, H, Q, K]
    → [B, H, Q, D].
    """
    return blend(weigh(query, past.key, visible, bias), past.value)


def blend(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, Q, K], value [B, H, K, D] → [B, H, Q, D] in the type of the values."""
    blended: Tensor = weights.to(value.dtype) @ value
    return blended


class Operators:
    """The eager operators. A lowering overrides those for which its target has a better form."""

    def normalize(self, norm: Norm, x: Tensor) -> Tensor:
        """x [..., E] → [..., E]."""
        normalized: Tensor = norm(x)
        return normalized

    def self_attention(self, attention: Attention, x: Tensor, lengths: Tensor, bias: Tensor | None) -> Tensor:
        """Encoder, whole sentences: x [B, S, E], lengths [B], a bias of scores [1, H, S, S] → [B, S, E]."""
        query, past = attention.queries(x), attention.keys_values(x)
        visible = positions_below(lengths, x.shape[1])[:, None, None]
        return attention.merge(attend(query, past, visible, bias))

    def cached_attention(
        self, attention: Attention, x: Tensor, past: KeyValue, past_lengths: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; past [B, H, T, D], past_lengths [B], a bias of scores
        [B, H, Q, T] → like x, and past with their positions written. Each token sees itself and those before it.

        The write is in place: past and present are the same memory.
        """
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        positions = past_lengths[:, None] + torch.arange(tokens.shape[1], device=x.device)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        for buffer, update in zip(past, attention.keys_values(tokens), strict=True):
            buffer[rows, :, positions] = update.transpose(1, 2)
        visible = torch.arange(past.key.shape[2], device=x.device) <= positions[..., None]
        attended = attend(attention.queries(tokens), past, visible[:, None], bias)
        return attention.merge(attended).reshape(x.shape), past

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; cross [B, H, S, D], source_lengths [B] → like x, and cross as
        it was, which an operator may give as an output of its own.
        """
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        return attention.merge(attend(attention.queries(tokens), cross, visible)).reshape(x.shape), cross

    def weighed_cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token, x [B, E]; cross [B, H, S, D], source_lengths [B] → [B, E], and its weights [B, S]: the mean of the
        heads', whose sum is 1, zero beyond each source's length.
        """
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        weights = weigh(attention.queries(x[:, None]), cross.key, visible)
        return attention.merge(blend(weights, cross.value))[:, 0], weights.mean(dim=1)[:, 0]

    def shortlist_logits(self, x: Tensor, projection: Tensor) -> Tensor:
        """One token, x [B, E], and rows of the output projection [C, E] → logits [B, C]."""
        return torch.nn.functional.linear(x, projection)


EAGER = Operators()
