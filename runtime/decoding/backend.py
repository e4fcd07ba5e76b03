"""What a backend is: something that encodes sources and runs decoder steps over a cache.

Letters: B rows, S source positions, V target vocabulary, C of it on a shortlist, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.decoding.cache import KVCache


class StepOutput(NamedTuple):
    """logits [B, V], or [B, Q, V] of Q tokens, valid until the next step; attention [B, S], the weights of one layer's
    cross-attention, where the graph gives them.
    """

    logits: FloatArray
    attention: FloatArray | None = None


class Step(Protocol):
    """A decoder step bound to one cache."""

    def __call__(self, input_ids: IntArray) -> StepOutput:
        """input_ids [n], one token for each of the cache's n active rows → logits [n, V]; or [n, Q] → [n, Q, V].

        Writes the positions from `cache.lengths` on of every active row in place; advancing the lengths is the
        caller's. Which of the two forms it takes is decided when it is bound.
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
        """The step for one token of a row, input_ids [n], over this cache, of one row a sentence or of several."""
        ...

    def bind_chunk(self, cache: KVCache) -> Step:
        """The step for several tokens of a row, input_ids [n, Q] → logits [n, Q, V], where `query_tokens` is true."""
        ...


class ShortlistStep(Protocol):
    """A decoder step bound to one cache, with an output projection that its caller chooses."""

    def __call__(self, input_ids: IntArray, projection: FloatArray) -> StepOutput:
        """input_ids [n], projection [C, E] → logits [n, C]. It may change in place from step to step."""
        ...


class Shortlisting(Protocol):
    """What a backend has for steps over a part of the vocabulary."""

    @property
    def projection(self) -> FloatArray:
        """The rows of the whole output projection [V, E], mapped. Raises BundleError."""
        ...

    @property
    def cache_specs(self) -> tuple[TensorSpec, ...]:
        """The buffers of a cache, of one row a sentence or of several, which share those of its source."""
        ...

    def bind(self, cache: KVCache) -> ShortlistStep:
        """The decoder step over this cache."""
        ...


@runtime_checkable
class ShortlistBackend(Protocol):
    """A backend that knows steps over a part of the vocabulary."""

    @property
    def shortlisting(self) -> Shortlisting | None:
        """These, or None where the bundle has no graph for them."""
        ...


class Candidates(Protocol):
    """Which target tokens a sentence may become."""

    def knows(self, source_ids: Sequence[int]) -> bool:
        """source_ids [S] → whether there are candidates for all of them."""
        ...

    def candidates(self, source_ids: Sequence[int]) -> IntArray:
        """source_ids [S] → the target ids [C] of one sentence, ascending, each once."""
        ...


def shortlisting_of(backend: Backend) -> Shortlisting | None:
    """A backend's steps over a part of the vocabulary, if it has any."""
    return backend.shortlisting if isinstance(backend, ShortlistBackend) else None


def specs_of(backend: Backend, *, beams: int, shortlisted: bool) -> tuple[TensorSpec, ...]:
    """The buffers of a cache in which a sentence has this many rows."""
    if shortlisted:
        shortlisting = shortlisting_of(backend)
        assert shortlisting is not None, "a shortlist on a backend that has no steps for it"
        return shortlisting.cache_specs
    return backend.cache_specs if beams == 1 else backend.beam_cache_specs
