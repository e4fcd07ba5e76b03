"""The layers of both stacks, and how their parts are put together: pre-norm or post-norm, for whole targets and steps.

Letters: B rows, S source positions, T target positions or cache capacity, Q query tokens, E model width, H heads,
D head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from kvx.models.config import ModelConfig
from kvx.models.layers import NORMS, Attention, FeedForward, KeyValue, Norm
from kvx.models.operators import EAGER, Operators, attend, blend, positions_below, weigh


class Block(Protocol):
    """How a part of a layer, its norm and the residual stream go together."""

    def enter(self, ops: Operators, norm: Norm, x: Tensor) -> Tensor:
        """The residual stream x [..., E] → what the part takes, like x."""
        ...

    def leave(self, ops: Operators, norm: Norm, x: Tensor, part: Tensor) -> Tensor:
        """The residual stream x and what the part gave, both [..., E] → the residual stream after it."""
        ...


class PreNorm:
    """x + f(norm(x))."""

    def enter(self, ops: Operators, norm: Norm, x: Tensor) -> Tensor:
        """The norm of x."""
        return ops.normalize(norm, x)

    def leave(self, ops: Operators, norm: Norm, x: Tensor, part: Tensor) -> Tensor:
        """The sum."""
        return x + part


class PostNorm:
    """norm(x + f(x)), as in Vaswani et al. 2017."""

    def enter(self, ops: Operators, norm: Norm, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def leave(self, ops: Operators, norm: Norm, x: Tensor, part: Tensor) -> Tensor:
        """The norm of the sum."""
        return ops.normalize(norm, x + part)


BLOCKS: dict[str, Block] = {"pre": PreNorm(), "post": PostNorm()}


def make_norm(config: ModelConfig) -> Norm:
    """A norm of the model's kind."""
    return NORMS[config.norm](config.d_model, config.norm_epsilon)


class EncoderLayer(nn.Module):
    """Self-attention over the source, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.encoder_heads, config.encoder_head_width
        self.self_attention = Attention(config.d_model, *heads, bias=config.attention_bias)
        self.feed_forward = _feed_forward(config, config.encoder_d_ff)
        self.self_attention_norm = make_norm(config)
        self.feed_forward_norm = make_norm(config)
        self._block = BLOCKS[config.block]

    def forward(self, x: Tensor, lengths: Tensor, bias: Tensor | None, ops: Operators) -> Tensor:
        """x [B, S, E], lengths [B], a bias of scores [1, H, S, S] → [B, S, E]."""
        block, norm = self._block, self.self_attention_norm
        attended = ops.self_attention(self.self_attention, block.enter(ops, norm, x), lengths, bias)
        x = block.leave(ops, norm, x, attended)
        norm = self.feed_forward_norm
        return block.leave(ops, norm, x, self.feed_forward(block.enter(ops, norm, x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.decoder_heads, config.decoder_head_width
        self.self_attention = Attention(config.d_model, *heads, bias=config.attention_bias)
        self.cross_attention = Attention(config.d_model, *heads, bias=config.attention_bias)
        self.feed_forward = _feed_forward(config, config.decoder_d_ff)
        self.self_attention_norm = make_norm(config)
        self.cross_attention_norm = make_norm(config)
        self.feed_forward_norm = make_norm(config)
        self._block = BLOCKS[config.block]

    def forward(self, x: Tensor, cross: KeyValue, source_lengths: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """All target positions at once: x [B, T, E], cross [B, H, S, D], a bias of scores [1, H, T, T] → [B, T, E],
        cross-attention [B, H, T, S].
        """
        block, norm, own = self._block, self.self_attention_norm, self.self_attention
        entered = block.enter(EAGER, norm, x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        attended = own.merge(attend(own.queries(entered), own.keys_values(entered), causal[None, None], bias))
        x = block.leave(EAGER, norm, x, attended)
        norm = self.cross_attention_norm
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        weights = weigh(self.cross_attention.queries(block.enter(EAGER, norm, x)), cross.key, visible)
        x = block.leave(EAGER, norm, x, self.cross_attention.merge(blend(weights, cross.value)))
        return self._feed(x, EAGER), weights

    def step(
        self,
        x: Tensor,
        past: KeyValue,
        past_lengths: Tensor,
        cross: KeyValue,
        source_lengths: Tensor,
        bias: Tensor | None,
        ops: Operators,
        *,
        weighed: bool = False,
    ) -> tuple[Tensor, KeyValue, KeyValue, Tensor | None]:
        """One target position, x [B, E], or several, [B, Q, E]; past [B, H, T, D], cross [B, H, S, D], a bias of
        scores [B, H, Q, T] → like x, present [B, H, T, D], cross, and, where `weighed`, the cross-attention's weights
        [B, S] for one position.
        """
        block, norm = self._block, self.self_attention_norm
        entered = block.enter(ops, norm, x)
        attended, present = ops.cached_attention(self.self_attention, entered, past, past_lengths, bias)
        x = block.leave(ops, norm, x, attended)
        norm, weights = self.cross_attention_norm, None
        entered = block.enter(ops, norm, x)
        if weighed:
            attended, weights = ops.weighed_cross_attention(self.cross_attention, entered, cross, source_lengths)
        else:
            attended, cross = ops.cross_attention(self.cross_attention, entered, cross, source_lengths)
        return self._feed(block.leave(ops, norm, x, attended), ops), present, cross, weights

    def first_keys_values(self, x: Tensor) -> KeyValue:
        """x [B, E] → the keys and values that it writes, both [B, H, 1, D]."""
        return self.self_attention.token_keys_values(self._block.enter(EAGER, self.self_attention_norm, x))

    def _feed(self, x: Tensor, ops: Operators) -> Tensor:
        norm = self.feed_forward_norm
        return self._block.leave(ops, norm, x, self.feed_forward(self._block.enter(ops, norm, x)))


def _feed_forward(config: ModelConfig, d_ff: int) -> FeedForward:
    kind = {"activation": config.activation, "gated": config.gated, "bias": config.feed_forward_bias}
    return FeedForward(config.d_model, d_ff, **kind)  # type: ignore[arg-type]
