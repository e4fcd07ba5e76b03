"""Models in 16 bits: weights and tables, keys and values, and what products take and give.

Products, norms and softmax add up in float32 inside their kernels. Two things were measured on the reference model
(300 lines, greedy, eager PyTorch) before they were decided:

- The product with the vocabulary is a float32 one, of states in 16 bits. Logits rounded to 16 bits tie, and a tie goes
  to the lowest id: float16 then gives 296 of the 300 lines, instead of 299, bfloat16 284 instead of 298. A table of
  tokens that is tied to it stays float32 with it, and what is looked up there is rounded.
- The residual stream, to which every layer adds, is float16 with `fp16`: in float32 it would give the same 299 lines,
  with errors in logits of 0.007 instead of 0.010, and cost two kernels more at each of its three additions a layer.
  With `bf16` it is float32: in bfloat16, 8 bits of it, 294 lines instead of 298.

float16 holds nothing above 65504: the proof looks for larger values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from kvx.models.layers import Linear, Norm, RelativeBias
from kvx.models.operators import Operators
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.precision import PRECISIONS, Precision


def in_precision(model: Transformer, precision: Precision) -> Transformer:
    """The model itself, or a copy in the types of the precision."""
    arithmetic = PRECISIONS[precision]
    if not arithmetic.halved:
        return model
    element: torch.dtype = getattr(torch, arithmetic.element)  # the contract's names are torch's
    residual: torch.dtype = getattr(torch, arithmetic.residual)
    halved = copy.deepcopy(model)
    for module in halved.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, RelativeBias)) and module.weight is not halved.head.weight:
            module.to(element)
    for embedding in (halved.source_embedding, halved.target_embedding):
        embedding.residual = residual
        if embedding.positions is not None:
            embedding.positions = embedding.positions.to(residual)
    return halved


def widen(file: Path, wide: Path) -> None:
    """Copies an ONNX file with float32 wherever it has bfloat16, its weights being those that bfloat16 can hold.

    ONNX Runtime has no kernels for bfloat16 on a CPU: this is what can be run of such a graph there.
    """
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
    onnx.save(model, wide, save_as_external_data=True, location=f"{wide.name}.data")


class Peak(Operators):
    """The eager operators, noting the largest magnitude among the outputs of projections and the inputs of norms.

    That bounds what float16 holds: attention adds up its products of queries and keys in float32 inside its kernels,
    and gives a mean of values. A value that is not finite counts as infinite.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.where = "nothing"

    def note(self, where: str, x: Tensor) -> None:
        """Remembers the largest so far."""
        magnitude = float(x.abs().max())
        if math.isnan(magnitude):
            magnitude = math.inf
        if magnitude > self.largest:
            self.largest, self.where = magnitude, where

    def normalize(self, norm: Norm, x: Tensor) -> Tensor:
        """x [..., E] → [..., E], x being what the layers before have added up."""
        self.note("the residual stream", x)
        return super().normalize(norm, x)


@contextmanager
def peaks(model: Transformer) -> Iterator[Peak]:
    """Operators for the model, which note its peak as long as this lasts."""
    peak = Peak()

    def note(projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        peak.note(names[projection], output)

    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    hooks = [projection.register_forward_hook(note) for projection in names]
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()
