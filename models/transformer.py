"""The reference encoder-decoder Transformer: pre-norm, sinusoidal positions, as plain as it can be.

Where other families differ, one place each: `LayerNorm` and the two `…Layer.forward/step` (post-norm, RMS),
`FeedForward` (activation, gating), `Embedding` (scale, learned positions), `Transformer.head` (tied weights).

Letters: B rows, S source positions, T target positions or cache capacity, E model width, H heads, D head width,
L decoder layers, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kvx.models.config import ModelConfig
from kvx.models.operators import EAGER, KeyValue, Operators, attend, blend, positions_below, weigh


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


class EncoderLayer(nn.Module):
    """Self-attention over the source, then feed-forward, each on a normalised input and added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config.d_model, config.heads, bias=config.attention_bias)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        self.self_attention_norm = LayerNorm(config.d_model)
        self.feed_forward_norm = LayerNorm(config.d_model)

    def forward(self, x: Tensor, lengths: Tensor, ops: Operators) -> Tensor:
        """x [B, S, E], lengths [B] → [B, S, E]."""
        x = x + ops.self_attention(self.self_attention, ops.normalize(self.self_attention_norm, x), lengths)
        fed: Tensor = self.feed_forward(ops.normalize(self.feed_forward_norm, x))
        return x + fed


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config.d_model, config.heads, bias=config.attention_bias)
        self.cross_attention = Attention(config.d_model, config.heads, bias=config.attention_bias)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        self.self_attention_norm = LayerNorm(config.d_model)
        self.cross_attention_norm = LayerNorm(config.d_model)
        self.feed_forward_norm = LayerNorm(config.d_model)

    def forward(self, x: Tensor, cross: KeyValue, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """All target positions at once: x [B, T, E], cross [B, H, S, D] → [B, T, E], cross-attention [B, H, T, S]."""
        normed = EAGER.normalize(self.self_attention_norm, x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        own = self.self_attention
        x = x + own.merge(attend(own.queries(normed), own.keys_values(normed), causal[None, None]))
        normed = EAGER.normalize(self.cross_attention_norm, x)
        visible = positions_below(source_lengths, cross.key.shape[2])[:, None, None]
        weights = weigh(self.cross_attention.queries(normed), cross.key, visible)
        x = x + self.cross_attention.merge(blend(weights, cross.value))
        fed: Tensor = self.feed_forward(EAGER.normalize(self.feed_forward_norm, x))
        return x + fed, weights

    def step(
        self,
        x: Tensor,
        past: KeyValue,
        past_lengths: Tensor,
        cross: KeyValue,
        source_lengths: Tensor,
        ops: Operators,
        *,
        weighed: bool = False,
    ) -> tuple[Tensor, KeyValue, KeyValue, Tensor | None]:
        """One target position, x [B, E], or several, [B, Q, E]; past [B, H, T, D], cross [B, H, S, D] → like x,
        present [B, H, T, D], cross, and, where `weighed`, the cross-attention's weights [B, S] for one position.
        """
        normed = ops.normalize(self.self_attention_norm, x)
        attended, present = ops.cached_attention(self.self_attention, normed, past, past_lengths)
        x = x + attended
        normed, weights = ops.normalize(self.cross_attention_norm, x), None
        if weighed:
            attended, weights = ops.weighed_cross_attention(self.cross_attention, normed, cross, source_lengths)
        else:
            attended, cross = ops.cross_attention(self.cross_attention, normed, cross, source_lengths)
        x = x + attended
        return x + self.feed_forward(ops.normalize(self.feed_forward_norm, x)), present, cross, weights


class Stepped(NamedTuple):
    """What a step gives: logits [B, V] or [B, Q, V]; presents [B, H, T, D] and cross keys and values [B, H, S, D] of
    every layer; attention [B, S], one layer's, where asked for.
    """

    logits: Tensor
    presents: list[KeyValue]
    sources: list[KeyValue]
    attention: Tensor | None


class Transformer(nn.Module):
    """The whole model. Padding is by length: what lies beyond a row's length may be any finite number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.source_embedding = Embedding(config.source_vocab_size, config.source_positions, config.d_model)
        self.target_embedding = Embedding(config.target_vocab_size, config.target_positions, config.d_model)
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_norm = LayerNorm(config.d_model)
        self.decoder_norm = LayerNorm(config.d_model)
        self.head = Linear(config.d_model, config.target_vocab_size, bias=False)

    def forward(self, input_ids: Tensor, source_lengths: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: input_ids [B, S], source_lengths [B], target_ids [B, T] from bos → logits [B, T, V]."""
        cross = self.encode(input_ids, source_lengths)
        logits: Tensor = self.head(self.decode(target_ids, cross, source_lengths))
        return logits

    def encode(self, input_ids: Tensor, source_lengths: Tensor, ops: Operators = EAGER) -> list[KeyValue]:
        """input_ids [B, S], source_lengths [B] → cross-attention keys and values per decoder layer [B, H, S, D]."""
        x = self.source_embedding(input_ids, torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.encoder_layers:
            x = layer(x, source_lengths, ops)
        memory = ops.normalize(self.encoder_norm, x)
        return [layer.cross_attention.keys_values(memory) for layer in self.decoder]

    def decode(self, target_ids: Tensor, cross: Sequence[KeyValue], source_lengths: Tensor) -> Tensor:
        """target_ids [B, T], cross [B, H, S, D] per layer → last hidden states [B, T, E], without a cache."""
        return self.decode_weighed(target_ids, cross, source_lengths)[0]

    def decode_weighed(
        self, target_ids: Tensor, cross: Sequence[KeyValue], source_lengths: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """As `decode`, and the cross-attention weights of every layer [B, H, T, S]."""
        x: Tensor = self.target_embedding(target_ids, torch.arange(target_ids.shape[1], device=target_ids.device))
        attentions = []
        for layer, keys_values in zip(self.decoder, cross, strict=True):
            x, weights = layer(x, keys_values, source_lengths)
            attentions.append(weights)
        return EAGER.normalize(self.decoder_norm, x), attentions

    def step(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        source_lengths: Tensor,
        past: Sequence[KeyValue],
        cross: Sequence[KeyValue],
        ops: Operators = EAGER,
        attention_layer: int | None = None,
        projection: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Stepped:
        """One token per row, input_ids [B], or several, [B, Q], at the positions from past_lengths [B] on;
        source_lengths [B], past [B, H, T, D] and cross [B, H, S, D] per layer → logits [B, V] or [B, Q, V], present
        [B, H, T, D] per layer, cross, and, of one token per row, the attention [B, S] of the layer asked for. With a
        `projection` [C, E], rows of the head's weight, logits are [B, C].

        The eager operators write past in place and return it; T must hold every position. Where a row has fewer than
        Q tokens left, the rest may be any: what stands beyond its length is never seen. `positions`, in the form of
        input_ids, are those to embed where a row may stand beyond the last one.
        """
        positions = past_lengths if positions is None else positions
        if input_ids.ndim == 2:
            several = past_lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = several.clamp(max=self.config.target_positions - 1)  # beyond stands only what is never seen
        x = self.target_embedding(input_ids, positions)
        presents, sources, attention = [], [], None
        for number, (layer, own, source) in enumerate(zip(self.decoder, past, cross, strict=True)):
            weighed = number == attention_layer
            x, present, given, weights = layer.step(x, own, past_lengths, source, source_lengths, ops, weighed=weighed)
            presents.append(present)
            sources.append(given)
            attention = weights if weighed else attention
        hidden = ops.normalize(self.decoder_norm, x)
        logits = self.head(hidden) if projection is None else ops.shortlist_logits(hidden.float(), projection)
        return Stepped(logits.float(), presents, sources, attention)

    @property
    def element(self) -> str:
        """The type of its keys and values, as the contract calls it."""
        return str(self.decoder[0].cross_attention.key.weight.dtype).removeprefix("torch.")

    @property
    def decoder(self) -> list[DecoderLayer]:
        """The decoder's layers, by their type."""
        return cast("list[DecoderLayer]", list(self.decoder_layers))
