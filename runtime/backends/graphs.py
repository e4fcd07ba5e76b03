"""What the backends over a bundle's exported graphs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.signature import (
    Dimensions,
    Signature,
    StepFeatures,
    TensorSpec,
    cache_specs,
    encoder_signature,
    step_signature,
)
from kvx.runtime.decoding.backend import Step
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.errors import BundleError
from kvx.runtime.rules import count

THREADS = count(1024)  # what a number of threads or workers may be


class GraphBackend(ABC):
    """A backend over the encoder and the decoder step that an export wrote, with the tensors of the contract."""

    name: str
    query_tokens = False

    def __init__(self, dimensions: Dimensions, features: StepFeatures) -> None:
        self.features = features
        self.encoder_signature = encoder_signature(dimensions)
        self.step_signature = step_signature(dimensions, features.step)
        self.cache_specs: tuple[TensorSpec, ...] = cache_specs(dimensions)
        self.beam_cache_specs = self.cache_specs

    @abstractmethod
    def run_encoder(self, feeds: Tensors) -> Tensors:
        """The encoder as it is: its inputs by name → its outputs by name."""

    @abstractmethod
    def run_step(self, feeds: Tensors) -> Tensors:
        """The step out of place: its inputs by name → its outputs by name; the inputs stay as they are."""

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, H, S, D] by the cache's names."""
        outputs = self.run_encoder({"input_ids": input_ids, "source_lengths": source_lengths})
        return {past: outputs[present] for present, past in self.encoder_signature.presents.items()}

    def bind_chunk(self, cache: KVCache) -> Step:
        """The step for several tokens of a row, input_ids [n, Q] → logits [n, Q, V], where `query_tokens` is true."""
        raise NotImplementedError(f"{self.name} has no step for several tokens of a row")


def sizes_of(signature: Signature, feeds: Tensors) -> dict[str, int]:
    """The axes of a graph's inputs by their letters."""
    return {
        axis: size
        for spec in signature.inputs
        for axis, size in zip(spec.axes, feeds[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def check_outputs(file: str, specs: Iterable[TensorSpec], sizes: Mapping[str, int], outputs: Tensors) -> None:
    """Raises BundleError where a graph gave another shape or type than the contract has: it declares them itself, and
    need not keep to it.
    """
    for spec in specs:
        array, shape = outputs[spec.name], spec.shape(sizes)
        if array.shape != shape or (array.dtype != spec.dtype and spec.dtype != "bfloat16"):
            raise BundleError(
                f"{file} gave {spec.name} as {array.dtype} {list(array.shape)}",
                expected=f"{spec.dtype} {list(shape)}",
                remedy="Export the bundle again with this version of kvx.",
            )
