"""The encoder-decoder Transformer, of the parts that its configuration names, as plain as it can be.

Letters: B rows, S source positions, T target positions or cache capacity, E model width, H heads, D head width,
L decoder layers, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kvx.models.blocks import DecoderLayer, EncoderLayer, make_norm
from kvx.models.config import ModelConfig
from kvx.models.layers import Embedding, KeyValue, Linear, Norm, RelativeBias
from kvx.models.operators import EAGER, Operators


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
        self.source_embedding = Embedding(config.source_vocab_size, config.source_positions, config)
        self.target_embedding = Embedding(config.target_vocab_size, config.target_positions, config)
        self.source_embedding_norm = make_norm(config) if config.embedding_norm else None
        self.target_embedding_norm = make_norm(config) if config.embedding_norm else None
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_biases = _relative_biases(config, config.encoder_layers, config.encoder_heads, both_ways=True)
        self.decoder_biases = _relative_biases(config, config.decoder_layers, config.decoder_heads, both_ways=False)
        self.encoder_norm = make_norm(config) if config.final_norm else None
        self.decoder_norm = make_norm(config) if config.final_norm else None
        self.head = Linear(config.d_model, config.target_vocab_size, bias=config.head_bias)
        self.tie()

    def tie(self) -> None:
        """Lets what the configuration ties be one tensor."""
        if self.config.shared_embeddings:
            self.target_embedding.tokens.weight = self.source_embedding.tokens.weight
        if self.config.tied_head:
            self.head.weight = self.target_embedding.tokens.weight

    def forward(self, input_ids: Tensor, source_lengths: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: input_ids [B, S], source_lengths [B], target_ids [B, T] from bos → logits [B, T, V]."""
        cross = self.encode(input_ids, source_lengths)
        return self.logits(self.decode(target_ids, cross, source_lengths))

    def encode(self, input_ids: Tensor, source_lengths: Tensor, ops: Operators = EAGER) -> list[KeyValue]:
        """input_ids [B, S], source_lengths [B] → cross-attention keys and values per decoder layer [B, H, S, D]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = _normalize(ops, self.source_embedding_norm, self.source_embedding(input_ids, positions))
        biases = _computed(self.encoder_biases, positions[None], input_ids.shape[1], len(self.encoder_layers))
        for layer, bias in zip(self.encoder_layers, biases, strict=True):
            x = layer(x, source_lengths, bias, ops)
        memory = _normalize(ops, self.encoder_norm, x)
        return [layer.cross_attention.keys_values(memory) for layer in self.decoder]

    def decode(self, target_ids: Tensor, cross: Sequence[KeyValue], source_lengths: Tensor) -> Tensor:
        """target_ids [B, T], cross [B, H, S, D] per layer → last hidden states [B, T, E], without a cache."""
        return self.decode_weighed(target_ids, cross, source_lengths)[0]

    def decode_weighed(
        self, target_ids: Tensor, cross: Sequence[KeyValue], source_lengths: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """As `decode`, and the cross-attention weights of every layer [B, H, T, S]."""
        positions = torch.arange(target_ids.shape[1], device=target_ids.device)
        x = self._embed_target(target_ids, positions, EAGER)
        attentions = []
        biases = _computed(self.decoder_biases, positions[None], target_ids.shape[1], len(self.decoder))
        for layer, keys_values, bias in zip(self.decoder, cross, biases, strict=True):
            x, weights = layer(x, keys_values, source_lengths, bias)
            attentions.append(weights)
        return _normalize(EAGER, self.decoder_norm, x), attentions

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., E] → logits [..., V]."""
        logits: Tensor = self.head(self._scaled(hidden))
        return logits

    def projection(self) -> Tensor:
        """The rows that a shortlist picks from: those of the head's weight, and, where it has a bias, that as their
        last column [V, E or E + 1].
        """
        weight = self.head.weight
        return weight if self.head.bias is None else torch.cat([weight, self.head.bias[:, None]], dim=1)

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
        `projection`, rows of that of the model, logits are [B, C].

        The eager operators write past in place and return it; T must hold every position. Where a row has fewer than
        Q tokens left, the rest may be any: what stands beyond its length is never seen. `positions`, in the form of
        input_ids, are those to embed where a row may stand beyond the last one.
        """
        positions = past_lengths if positions is None else positions
        if input_ids.ndim == 2:
            several = past_lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = several.clamp(max=self.config.target_positions - 1)  # beyond stands only what is never seen
        x = self._embed_target(input_ids, positions, ops)
        queries = positions if positions.ndim == 2 else positions[:, None]
        biases = _computed(self.decoder_biases, queries, past[0].key.shape[2], len(self.decoder))
        presents, sources, attention = [], [], None
        for number, (layer, own, source, bias) in enumerate(zip(self.decoder, past, cross, biases, strict=True)):
            weighed = number == attention_layer
            x, present, given, weights = layer.step(
                x, own, past_lengths, source, source_lengths, bias, ops, weighed=weighed
            )
            presents.append(present)
            sources.append(given)
            attention = weights if weighed else attention
        hidden = _normalize(ops, self.decoder_norm, x)
        logits = self.logits(hidden) if projection is None else self._shortlist_logits(hidden, projection, ops)
        return Stepped(logits.float(), presents, sources, attention)

    def first_keys_values(self, input_ids: Tensor, positions: Tensor) -> KeyValue:
        """input_ids and positions [B] → what the first layer of the decoder writes for them [B, H, 1, D]: nothing else
        decides it.
        """
        return self.decoder[0].first_keys_values(self._embed_target(input_ids, positions, EAGER))

    def _embed_target(self, target_ids: Tensor, positions: Tensor, ops: Operators) -> Tensor:
        return _normalize(ops, self.target_embedding_norm, self.target_embedding(target_ids, positions))

    def _shortlist_logits(self, hidden: Tensor, projection: Tensor, ops: Operators) -> Tensor:
        hidden = self._scaled(hidden).float()
        if self.head.bias is not None:
            hidden = torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], dim=1)
        return ops.shortlist_logits(hidden, projection)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.config.head_scale == 1.0 else hidden * self.config.head_scale

    @property
    def element(self) -> str:
        """The type of its keys and values, as the contract calls it."""
        return str(self.decoder[0].cross_attention.key.weight.dtype).removeprefix("torch.")

    @property
    def decoder(self) -> list[DecoderLayer]:
        """The decoder's layers, by their type."""
        return cast("list[DecoderLayer]", list(self.decoder_layers))


def _relative_biases(config: ModelConfig, layers: int, heads: int, *, both_ways: bool) -> nn.ModuleList:
    """One for all layers, one for each, or none."""
    number = 0 if config.positions != "relative" else layers if config.relative_by_layer else 1
    return nn.ModuleList(RelativeBias(config.relative_distance, heads, both_ways=both_ways) for _ in range(number))


def _computed(biases: nn.ModuleList, positions: Tensor, keys: int, layers: int) -> list[Tensor | None]:
    """The biases of every layer for queries at these positions [B, Q]: [B, H, Q, K] or None."""
    computed = [bias(positions, keys) for bias in biases] or [None]
    return computed * layers if len(computed) == 1 else computed


def _normalize(ops: Operators, norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else ops.normalize(norm, x)
