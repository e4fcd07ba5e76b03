"""The reference encoder-decoder Transformer: pre-norm, sinusoidal positions, as plain as it can be.

Letters: B rows, S source positions, T target positions or cache capacity, E model width, H heads, D head width,
L decoder layers, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kvx.models.config import ModelConfig
from kvx.models.layers import Attention, Embedding, FeedForward, KeyValue, LayerNorm, Linear
from kvx.models.operators import EAGER, Operators, attend, blend, positions_below, weigh


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
    every layer; attention [B, S] of one layer, or None.
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

    def first_keys_values(self, input_ids: Tensor, positions: Tensor) -> KeyValue:
        """input_ids and positions [B] → what the first layer of the decoder writes for them [B, H, 1, D]: nothing else
        decides it.
        """
        layer = self.decoder[0]
        x = EAGER.normalize(layer.self_attention_norm, self.target_embedding(input_ids, positions))
        return layer.self_attention.token_keys_values(x)

    @property
    def element(self) -> str:
        """The type of its keys and values, as the contract calls it."""
        return str(self.decoder[0].cross_attention.key.weight.dtype).removeprefix("torch.")

    @property
    def decoder(self) -> list[DecoderLayer]:
        """The decoder's layers, by their type."""
        return cast("list[DecoderLayer]", list(self.decoder_layers))
