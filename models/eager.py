"""The eager model as a backend of the runtime: with a cache, and without one as its truth."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch import Tensor

from kvx.models.layers import KeyValue
from kvx.models.operators import EAGER, Operators
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.signature import PAST, Dimensions, TensorSpec, cache_specs, key_value_names
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import KVCache

PAST_IDS = "past_ids"


class TorchBackend:
    """Eager PyTorch with the cache of the contract.

    Steps of one token give the attention of the decoder layer `attention_layer`, counted from 0. `ops` replaces the
    eager operators.
    """

    name = "torch"
    query_tokens = True
    decodes = 1  # torch's compute threads are one pool, which a second decode would only fight for

    def __init__(self, model: Transformer, *, attention_layer: int | None = None, ops: Operators = EAGER) -> None:
        self.model = model
        self._ops = ops
        self._attention_layer = attention_layer
        self.cache_specs: tuple[TensorSpec, ...] = cache_specs(Dimensions.of_model(model.config.to_dict()))
        self.beam_cache_specs = self.cache_specs

    @torch.inference_mode()
    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, H, S, D] by the cache's names."""
        cross = self.model.encode(torch.from_numpy(input_ids), torch.from_numpy(source_lengths), self._ops)
        return {
            name: tensor.numpy()
            for layer, keys_values in enumerate(cross)
            for name, tensor in zip(key_value_names(PAST, layer, "encoder"), keys_values, strict=True)
        }

    def bind(self, cache: KVCache) -> Step:
        """The step for one token of a row over the cache's buffers, which are written in place."""
        return self._bind(cache, self._attention_layer)

    def bind_chunk(self, cache: KVCache) -> Step:
        """The step for several tokens of a row, input_ids [n, Q] → logits [n, Q, V]."""
        return self._bind(cache, None)

    def _bind(self, cache: KVCache, attention_layer: int | None) -> Step:
        @torch.inference_mode()
        def step(input_ids: IntArray) -> StepOutput:
            past, cross = self._keys_values(cache, "decoder"), self._keys_values(cache, "encoder")
            ids, lengths = torch.from_numpy(input_ids), _lengths(cache)
            stepped = self.model.step(ids, *lengths, past, cross, self._ops, attention_layer=attention_layer)
            return StepOutput(logits=_array(stepped.logits), attention=_array(stepped.attention))

        return step

    def _keys_values(self, cache: KVCache, side: str) -> list[KeyValue]:
        n, layers = cache.active, self.model.config.decoder_layers
        names = (key_value_names(PAST, layer, side) for layer in range(layers))
        return [KeyValue(*(torch.from_numpy(cache.buffers[name][:n]) for name in pair)) for pair in names]


class NoCacheBackend(TorchBackend):
    """Eager PyTorch that keeps only the ids and computes every earlier position again at each step."""

    name = "torch-no-cache"
    query_tokens = False

    def __init__(self, model: Transformer, *, attention_layer: int | None = None) -> None:
        super().__init__(model, attention_layer=attention_layer)
        cross = tuple(spec for spec in self.cache_specs if "S" in spec.axes)
        self.cache_specs = (TensorSpec(PAST_IDS, "int64", ("B", "T")), *cross)
        self.beam_cache_specs = self.cache_specs

    def bind(self, cache: KVCache) -> Step:
        """The step over the ids in the cache."""

        @torch.inference_mode()
        def step(input_ids: IntArray) -> StepOutput:
            n = cache.active
            lengths, source_lengths = _lengths(cache)
            cache.buffers[PAST_IDS][np.arange(n), cache.lengths[:n]] = input_ids
            ids = torch.from_numpy(cache.buffers[PAST_IDS][:n, : int(cache.lengths[:n].max()) + 1])
            hidden, weights = self.model.decode_weighed(ids, self._keys_values(cache, "encoder"), source_lengths)
            rows, layer = torch.arange(n), self._attention_layer
            attention = None if layer is None else weights[layer][rows, :, lengths].mean(dim=1)
            return StepOutput(logits=_array(self.model.logits(hidden[rows, lengths])), attention=_array(attention))

        return step

    def bind_chunk(self, cache: KVCache) -> Step:
        """There is no such step: `query_tokens` is false."""
        raise NotImplementedError(f"{self.name} takes one token of a row at a time")


def _lengths(cache: KVCache) -> tuple[Tensor, Tensor]:
    """past_lengths [n] and source_lengths [n] of the active rows."""
    n = cache.active
    return torch.from_numpy(cache.lengths[:n]), torch.from_numpy(cache.source_lengths[:n])


@overload
def _array(tensor: Tensor) -> FloatArray: ...


@overload
def _array(tensor: None) -> None: ...


def _array(tensor: Tensor | None) -> FloatArray | None:
    return None if tensor is None else tensor.numpy()
