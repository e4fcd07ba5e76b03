"""The precisions of a bundle: one row each, with everything that the exporter, the proof and the runtime need to know.

Types are named as the contract names them, so that this needs neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Lowering = Literal["ort", "standard", "cuda"]
CachePrecision = Literal["int8"]
FULL = "float32"  # what a checkpoint is in, and what eager computes in


class Widths(NamedTuple):
    """Bits of the weights in products and of those in lookups."""

    products: int
    lookups: int


class Limits(NamedTuple):
    """How far an export may be from eager.

    `tolerance` is the largest difference in a tensor; `equal_lines` the least share of lines that must be translated as
    eager does; `bleu_lost` the most points of BLEU that may be lost; `neighbours` the tolerance for a row alone against
    the same row among others.
    """

    tolerance: float
    equal_lines: float
    bleu_lost: float
    neighbours: float

    def with_those(self, other: Limits) -> Limits:
        """What may be lost where both cost something."""
        return Limits(
            max(self.tolerance, other.tolerance),
            min(self.equal_lines, other.equal_lines),
            max(self.bleu_lost, other.bleu_lost),
            max(self.neighbours, other.neighbours),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a precision does to the numbers of a model, and its `purpose` in a few words.

    `element` is the type of keys and values and of what products take and give, `residual` that of the residual stream.
    Weights have `step` bits in the graphs of the decoder and `encoder` bits in that of the encoder, or None where they
    are of the `element` type. `lowerings` are those that have operators for it, the default one first. `limits` are
    those of the proof. `runs_on_cpu` tells whether ONNX Runtime has kernels for it on a CPU. `older` are names that
    earlier releases wrote into manifests.
    """

    purpose: str
    limits: Limits
    lowerings: tuple[Lowering, ...]
    element: str = FULL
    residual: str = FULL
    step: Widths | None = None
    encoder: Widths | None = None
    runs_on_cpu: bool = True
    older: tuple[str, ...] = ()

    @property
    def halved(self) -> bool:
        """Whether the model itself has fewer bits."""
        return self.element != FULL

    @property
    def quantized(self) -> bool:
        """Whether weights become codes of 8 or 4 bits."""
        return self.step is not None

    @property
    def reduced(self) -> bool:
        """Whether anything has fewer bits than in the checkpoint."""
        return self.halved or self.quantized


PRECISIONS: dict[Precision, Arithmetic] = {
    "fp32": Arithmetic(
        purpose="PyTorch's own translations",
        limits=Limits(1e-4, 1.0, 0.0, neighbours=1e-4),
        lowerings=("ort", "standard", "cuda"),
        older=("float32",),
    ),
    # Roundings of 11 and of 8 bits. Kernels of 16 bits may differ for other numbers of rows, and then round elsewhere.
    "fp16": Arithmetic(
        purpose="GPUs",
        element="float16",
        residual="float16",
        limits=Limits(5e-3, 0.95, 0.2, neighbours=5e-3),
        lowerings=("cuda", "ort", "standard"),
    ),
    "bf16": Arithmetic(
        purpose="GPUs if activations overflow fp16",
        element="bfloat16",
        limits=Limits(4e-2, 0.9, 0.3, neighbours=4e-2),
        lowerings=("cuda",),
        runs_on_cpu=False,
    ),
    "int8": Arithmetic(
        purpose="many texts at a time on CPUs",
        step=Widths(7, 8),
        encoder=Widths(7, 8),
        limits=Limits(0.1, 0.8, 0.5, neighbours=1e-4),
        lowerings=("ort",),
    ),
    "int4": Arithmetic(
        purpose="single texts on CPUs",
        step=Widths(4, 4),
        encoder=Widths(7, 4),
        # Its products round otherwise for one row than for several.
        limits=Limits(0.25, 0.4, 1.0, neighbours=0.02),
        lowerings=("ort",),
    ),
}

CODED_CACHE = Limits(0.1, 0.9, 0.2, neighbours=1e-4)  # where keys and values are codes of 8 bits


def precision_named(written: object) -> Precision:
    """The precision that a manifest names, also as earlier releases did. Raises ValueError for an unknown one."""
    for name, arithmetic in PRECISIONS.items():
        if written == name or written in arithmetic.older:
            return name
    raise ValueError(f"unknown precision {written!r}")
