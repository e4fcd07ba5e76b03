"""The operators of a lowering, one kind for each use of the decoder."""

from __future__ import annotations

from typing import NamedTuple, Self

from kvx.exporter.lowerings.beams import OrtBeamOperators, StandardBeamOperators
from kvx.exporter.lowerings.cuda import CudaOperators
from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.lowerings.standard import StandardOperators
from kvx.models.operators import EAGER, Operators
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.precision import FULL, Lowering


class Lowered(NamedTuple):
    """A lowering's operators for the encoder and the step, for several rows a sentence, and for the loop."""

    step: Operators
    beams: Operators
    loop: Operators

    @classmethod
    def of(cls, lowering: Lowering, model: Transformer) -> Self:
        """The CUDA provider has no fused attention of float32 or of biased scores: there its lowering is the standard
        one (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cuda/bert/group_query_attention.cc).
        """
        biased = model.config.positions == "relative"
        if lowering == "standard" or (lowering == "cuda" and (biased or model.element == FULL)):
            return cls(StandardOperators(), StandardBeamOperators(), StandardOperators())
        step = OrtOperators(model) if lowering == "ort" else CudaOperators(model)
        return cls(step, OrtBeamOperators(model), StandardOperators() if biased else CudaOperators(model))

    @classmethod
    def not_at_all(cls) -> Self:
        """The operators of eager PyTorch, which a tracer takes as they are."""
        return cls(EAGER, EAGER, EAGER)
