"""What a backend is: something that encodes sources and runs decoder steps over a cache.

Letters: B rows, S source positions, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.cache import KVCache
from kvx.runtime.signature import TensorSpec

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]


class StepOutput(NamedTuple):
    """logits [B, V], or [B, Q, V] of Q tokens, valid until the next step; next_ids [B] and attention [B, S], the
    weights of one layer's cross-attention, where the graph gives them.
    """

    logits: FloatArray
    next_ids: IntArray | None = None
    attention: FloatArray | None = None


class Step(Protocol):
    """A decoder step bound to one cache."""

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n], one token for each of the cache's n active rows → logits [n, V]; or [n, Q] → [n, Q, V].

        Writes the positions from `cache.lengths` on of every active row in place; advancing the lengths is the
        caller's. Several tokens at once only where the backend takes `query_tokens`.
        """
        ...


class Backend(Protocol):
    """Runs the two graphs of the contract. One backend may serve several decodes at once."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def decodes(self) -> int:
        """How many decodes side by side pay off, measured: see docs/performance.md."""
        ...

    @property
    def query_tokens(self) -> bool:
        """Whether a step may take several tokens of a row at once."""
        ...

    @property
    def cache_specs(self) -> tuple[TensorSpec, ...]:
        """The buffers of a cache for this backend where a sentence has one row."""
        ...

    @property
    def beam_cache_specs(self) -> tuple[TensorSpec, ...]:
        """The buffers where a sentence has several rows, which may then share those of its source."""
        ...

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, H, S, D], named as the cache names them."""
        ...

    def bind(self, cache: KVCache) -> Step:
        """The decoder step over this cache, of one row a sentence or of several."""
        ...
