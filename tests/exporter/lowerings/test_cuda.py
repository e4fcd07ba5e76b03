"""The `cuda` lowering: what its provider has kernels for, and what a captured graph may hold."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from kvx.exporter.lowerings.cuda import CudaOperators
from kvx.exporter.lowerings.standard import StandardOperators
from kvx.exporter.precision.halves import in_precision
from kvx.exporter.writing.loop import LoopGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.bundle.manifest import LOOP_FILE, Precision
from kvx.runtime.bundle.signature import StepFeatures

HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
FLOATS = HALVES | {TensorProto.FLOAT}
INT64 = {TensorProto.INT64}
# What the first input may be: docs/OperatorKernels.md of ONNX Runtime, those that the loop could have.
CUDA_KERNELS = {
    "Abs": {TensorProto.FLOAT},
    "Add": FLOATS | INT64,
    "ArgMax": {TensorProto.FLOAT, TensorProto.FLOAT16},
    "Attention": FLOATS,
    "Cast": FLOATS | INT64 | {TensorProto.BOOL},
    "Clip": {TensorProto.FLOAT, TensorProto.FLOAT16} | INT64,
    "Equal": INT64,
    "Gather": FLOATS | INT64,
    "GatherElements": FLOATS | INT64,
    "Gemm": FLOATS,
    "GreaterOrEqual": INT64,
    "GroupQueryAttention": HALVES,
    "LayerNormalization": FLOATS,
    "Less": INT64 | {TensorProto.FLOAT},
    "Mul": FLOATS | INT64,
    "Not": {TensorProto.BOOL},
    "Or": {TensorProto.BOOL},
    "Relu": FLOATS,
    "Reshape": FLOATS | INT64,
    "ScatterElements": FLOATS | INT64,
    "Sub": FLOATS | INT64,
    "TensorScatter": FLOATS | INT64,
    "Unsqueeze": FLOATS | INT64,
    "Where": {TensorProto.BOOL},
}
TOTAL_SEQUENCE_LENGTH = 6  # the input of GroupQueryAttention that is read on the host
ELEMENT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


IDS = SpecialIds(pad=0, bos=1, eos=2)


# What has kernels for bfloat16 has them for float16.
@pytest.fixture(scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.proof), "bf16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module")
def loop(tiny: Transformer, precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> onnx.GraphProto:
    path: Path = tmp_path_factory.mktemp("cuda") / LOOP_FILE
    model = in_precision(tiny, precision)
    ops = StandardOperators() if precision == "fp32" else CudaOperators(model)
    write_onnx(LoopGraph(model, Framing.plain(IDS, IDS), StepFeatures().loop, ops), path)
    return onnx.shape_inference.infer_shapes(onnx.load(path)).graph


def of_shapes(graph: onnx.GraphProto) -> set[str]:
    """What is computed from the shapes of tensors alone, on the host."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "Shape" or (node.input[0] in found):
            found.update(node.output)
    return found


def types(graph: onnx.GraphProto) -> dict[str, int]:
    """The element type of every value."""
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }


def test_every_node_has_a_kernel_on_cuda_or_computes_a_shape(loop: onnx.GraphProto) -> None:
    known, host = types(loop), of_shapes(loop)
    for node in loop.node:
        if not host & set(node.output):
            assert known[node.input[0]] in CUDA_KERNELS[node.op_type], (node.op_type, node.name)


def test_shapes_go_only_where_they_are_read_on_the_host(loop: onnx.GraphProto) -> None:
    host = of_shapes(loop)
    for node in loop.node:
        read = {place for place, name in enumerate(node.input) if name in host}
        if read and not host & set(node.output):
            assert (node.op_type, read) == ("GroupQueryAttention", {TOTAL_SEQUENCE_LENGTH})


def test_the_standard_operators_of_float32_need_no_shape(loop: onnx.GraphProto, precision: Precision) -> None:
    assert bool(of_shapes(loop)) == (precision != "fp32")


def test_caches_have_the_precisions_type_and_the_choice_is_made_in_float32(
    loop: onnx.GraphProto, precision: Precision
) -> None:
    known = types(loop)
    caches = {known[value.name] for value in (*loop.input, *loop.output) if ".key" in value.name}
    assert caches == {ELEMENT[precision]}
    [choice] = [node for node in loop.node if node.op_type == "ArgMax"]
    assert known[choice.input[0]] == TensorProto.FLOAT
