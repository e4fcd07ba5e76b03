"""The parts of a Transformer: what holds weights. What happens between them is in `operators` and `transformer`.

Letters: B rows, Q query and K key positions, E model width, H heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, both [B, H, positions, D]."""

    key: Tensor
    value: Tensor


def sinusoidal_positions(positions: int, d_model: int) -> Tensor:
    """[positions, E]: sine on even, cosine on odd channels, 10000^(−2i/E) (Vaswani et al. 2017, §3.5)."""
    channels = torch.arange(0, d_model, 2, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * 10000.0 ** (-channels / d_model)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(positions, -1)[:, :d_model].float()


class LayerNorm(nn.Module):
    """γ·(x − mean)/(std + ε) + β with the unbiased standard deviation, ε outside the root."""

    eps = 1e-6

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))


class Linear(nn.Linear):
    """A projection of the last axis. All others are one to it, so that every graph has the weights in the same form.

    `largest_input`: the largest magnitude that its input had in calibration, where there was one.
    """

    largest_input: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out], in the type of the weights."""
        if input.dtype != self.weight.dtype:  # else a trace would keep the conversion
            input = input.to(self.weight.dtype)
        if input.ndim == 2:
            return super().forward(input)
        return super().forward(input.flatten(0, -2)).reshape(*input.shape[:-1], self.out_features)


class Embedding(nn.Module):
    """Token embeddings times √E plus a table of positions."""

    def __init__(self, vocab_size: int, positions: int, d_model: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.register_buffer("positions", sinusoidal_positions(positions, d_model))
        self.positions: Tensor
        self.scale = d_model**0.5

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids and positions of one shape [...] (or broadcast) → [..., E]."""
        embedded: Tensor = self.tokens(input_ids) * self.scale
        return embedded + nn.functional.embedding(positions, self.positions)


class Attention(nn.Module):
    """The four projections of multi-head attention; what happens between them is an operator."""

    def __init__(self, d_model: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(d_model, d_model, bias=bias)
        self.key = Linear(d_model, d_model, bias=bias)
        self.value = Linear(d_model, d_model, bias=bias)
        self.output = Linear(d_model, d_model, bias=bias)

    def split(self, x: Tensor) -> Tensor:
        """[B, positions, E] → [B, H, positions, D]."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

    def split_token(self, x: Tensor) -> Tensor:
        """[B, E] → [B, H, 1, D]: with one position there is nothing to transpose."""
        heads: Tensor = x.unflatten(-1, (self.heads, 1, -1))  # type: ignore[no-untyped-call]
        return heads

    def queries(self, x: Tensor) -> Tensor:
        """[B, Q, E] → [B, H, Q, D]."""
        return self.split(self.query(x))

    def token_query(self, x: Tensor) -> Tensor:
        """[B, E] → [B, H, 1, D]."""
        return self.split_token(self.query(x))

    def keys_values(self, x: Tensor) -> KeyValue:
        """[B, K, E] → keys and values, both [B, H, K, D]."""
        return KeyValue(self.split(self.key(x)), self.split(self.value(x)))

    def token_keys_values(self, x: Tensor) -> KeyValue:
        """[B, E] → keys and values, both [B, H, 1, D]."""
        return KeyValue(self.split_token(self.key(x)), self.split_token(self.value(x)))

    def merge(self, heads: Tensor) -> Tensor:
        """[B, H, Q, D] → [B, Q, E], through the output projection."""
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged

    def merge_token(self, heads: Tensor) -> Tensor:
        """[B, H, 1, D] → [B, E], through the output projection."""
        merged: Tensor = self.output(heads.flatten(1))
        return merged


class FeedForward(nn.Module):
    """The position-wise part: down(relu(up(x)))."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        result: Tensor = self.down(self.up(x).relu())
        return result
