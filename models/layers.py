"""The parts of a Transformer: what holds weights. What happens between them is in `operators` and `transformer`.

Letters: B rows, Q query and K key positions, E model width, H heads, D head width. H·D may differ from E.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvx.models.config import ModelConfig

RMS_OPSET = 24  # of ai.onnx, which has RMSNormalization since 23


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, both [B, H, positions, D]."""

    key: Tensor
    value: Tensor


def interleaved_positions(positions: int, d_model: int) -> Tensor:
    """[positions, E]: sine on even, cosine on odd channels, 10000^(−2i/E) (Vaswani et al. 2017, §3.5)."""
    angles = _angles(positions, 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(positions, -1)[:, :d_model].float()


def halved_positions(positions: int, d_model: int) -> Tensor:
    """[positions, E]: the sines of all frequencies, then their cosines, as Hugging Face's Marian and Pegasus have them.

    https://github.com/huggingface/transformers/blob/main/src/transformers/models/marian/modeling_marian.py
    """
    channels = torch.arange(d_model, dtype=torch.float64)
    angles = _angles(positions, 10000.0 ** (-2 * (channels // 2) / d_model))
    return torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).float()


def inclusive_positions(positions: int, d_model: int) -> Tensor:
    """[positions, E]: sines, then cosines, of frequencies from 1 to 1/10000, both included, as fairseq has them; an odd
    last channel is 0. In float32 throughout, as there.

    https://github.com/facebookresearch/fairseq/blob/main/fairseq/modules/sinusoidal_positional_embedding.py
    """
    half = d_model // 2
    frequencies = torch.exp(torch.arange(half).float() * (-math.log(10000) / max(1, half - 1)))
    angles = torch.arange(positions).float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, d_model % 2))


def _angles(positions: int, frequencies: Tensor) -> Tensor:
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequencies


SINUSOIDS: dict[str, Callable[[int, int], Tensor]] = {
    "interleaved": interleaved_positions,
    "halves": halved_positions,
    "halves_inclusive": inclusive_positions,
}


class Norm(nn.Module):
    """A norm of the last axis: `forward` is what it means, `operator` what becomes one operator of ONNX."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def operator(self, x: Tensor) -> Tensor:
        """x [..., E] → [..., E] in the type of x."""
        raise NotImplementedError


class ReferenceNorm(Norm):
    """γ·(x − mean)/(std + ε) + β with the unbiased standard deviation, ε outside the root."""

    FOLDED_EPSILON = 1e-12

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__(d_model, epsilon)
        self.beta = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] → [..., E]."""
        centred = x - x.mean(dim=-1, keepdim=True)
        return self.gamma * centred / (x.std(dim=-1, keepdim=True) + self.epsilon) + self.beta

    def operator(self, x: Tensor) -> Tensor:
        """As LayerNormalization, which divides by the biased deviation √(Σ/E): γ·√((E−1)/E) makes up for it. ε is left
        out, which the proof measures.
        """
        width = x.shape[-1]
        scale = (self.gamma * ((width - 1) / width) ** 0.5).to(x.dtype)
        return nn.functional.layer_norm(x, (width,), scale, self.beta.to(x.dtype), self.FOLDED_EPSILON)


class LayerNorm(Norm):
    """γ·(x − mean)/√(variance + ε) + β (Ba et al. 2016)."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__(d_model, epsilon)
        self.beta = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] → [..., E]."""
        return nn.functional.layer_norm(
            x, self.gamma.shape, self.gamma.to(x.dtype), self.beta.to(x.dtype), self.epsilon
        )

    def operator(self, x: Tensor) -> Tensor:
        """It is one."""
        return self.forward(x)


class RMSNorm(Norm):
    """γ·x/√(mean of squares + ε) (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] → [..., E]."""
        return nn.functional.rms_norm(x, self.gamma.shape, self.gamma.to(x.dtype), self.epsilon)

    def operator(self, x: Tensor) -> Tensor:
        """As RMSNormalization."""
        result: Tensor = torch.onnx.ops.symbolic(
            "RMSNormalization",
            (x, self.gamma.to(x.dtype)),
            {"epsilon": self.epsilon},
            dtype=x.dtype,
            shape=x.shape,
            version=RMS_OPSET,
        )
        return result


NORMS: dict[str, type[Norm]] = {"reference": ReferenceNorm, "layer": LayerNorm, "rms": RMSNorm}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
}


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


class RelativeBias(nn.Module):
    """A number for each head and distance, which is added to the scores of attention (Raffel et al. 2020, §2.1). From
    `farthest` on all distances are alike; where a query sees no later keys, those have no numbers of their own.
    """

    def __init__(self, farthest: int, heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.farthest = farthest
        self.latest = farthest if both_ways else 0  # how far a key may come after its query
        self.weight = nn.Parameter(torch.zeros(self.latest + 1 + farthest, heads))

    def forward(self, positions: Tensor, keys: int) -> Tensor:
        """The positions of queries [B, Q], and how many keys there are → [B, H, Q, K]."""
        distances = positions[..., None] - torch.arange(keys, device=positions.device)
        rows = distances.clamp(-self.latest, self.farthest) + self.latest
        return nn.functional.embedding(rows, self.weight).permute(0, 3, 1, 2)


class Embedding(nn.Module):
    """Token embeddings, perhaps times √E, plus a table of positions where these are not relative.

    `residual` is the type of what it gives.
    """

    positions: Tensor | None
    residual: torch.dtype = torch.float32

    def __init__(self, vocab_size: int, positions: int, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.d_model)
        self.register_buffer("positions", _position_table(config.positions, positions, config.d_model))
        self.scale = config.d_model**0.5 if config.scaled_embedding else 1.0

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids and positions of one shape [...] (or broadcast) → [..., E]."""
        embedded: Tensor = self.tokens(input_ids)
        if self.scale != 1.0:
            embedded = embedded * self.scale
        if embedded.dtype != self.residual:
            embedded = embedded.to(self.residual)
        if self.positions is None:
            return embedded
        return embedded + nn.functional.embedding(positions, self.positions)


def _position_table(kind: str, positions: int, d_model: int) -> Tensor | None:
    """[positions, E], or None where positions are relative."""
    if kind == "relative":
        return None
    made = SINUSOIDS.get(kind)
    return torch.zeros(positions, d_model) if made is None else made(positions, d_model)


class Attention(nn.Module):
    """The four projections of multi-head attention; what happens between them is an operator."""

    def __init__(self, d_model: int, heads: int, head_width: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.width = heads * head_width
        self.query = Linear(d_model, self.width, bias=bias)
        self.key = Linear(d_model, self.width, bias=bias)
        self.value = Linear(d_model, self.width, bias=bias)
        self.output = Linear(self.width, d_model, bias=bias)

    def split(self, x: Tensor) -> Tensor:
        """[B, positions, H·D] → [B, H, positions, D]."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

    def split_token(self, x: Tensor) -> Tensor:
        """[B, H·D] → [B, H, 1, D]: with one position there is nothing to transpose."""
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
    """The position-wise part: down(f(up(x))), or down(f(up(x))·gate(x)) where it is gated (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff, bias=bias)
        self.gate = Linear(d_model, d_ff, bias=bias) if gated else None
        self.down = Linear(d_ff, d_model, bias=bias)
        self._activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        active = self._activate(self.up(x))
        if self.gate is not None:
            active = active * self.gate(x)
        result: Tensor = self.down(active)
        return result
