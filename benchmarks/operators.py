"""Which operators of ONNX Runtime the `ort` lowering and the precisions rest on, measured side by side.

    python benchmarks/operators.py [--threads 1] [--rows 1,8,32,64,128]

First every product of one decoder step of a base-size model (6 layers, d_model 512, d_ff 2048, 32,000 tokens), in each
kind of weights; then self-attention over a cache and attention to a source (8 heads of 64, 20 of 32 positions).
Prints Markdown tables: minimum of several runs. Compare rows of one run only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from kvx.runtime.backends.ort import ort
from kvx.runtime.measuring.tables import markdown_table

LAYERS, WIDTH, INNER, WORDS = 6, 512, 2048, 32_000
PRODUCTS = [(WIDTH, 3 * WIDTH), *[(WIDTH, WIDTH)] * 3, (WIDTH, INNER), (INNER, WIDTH)] * LAYERS + [(WIDTH, WORDS)]
HEADS, HEAD_WIDTH, CAPACITY, USED = 8, 64, 32, 20
RUNS = 15
DOMAIN = "com.microsoft"


@dataclass(slots=True)
class Graph:
    """A graph that grows: nodes, constants, inputs and outputs."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    bound: dict[str, str] = field(default_factory=dict)

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: int
    ) -> str:
        """Adds a node and gives the name of its first output."""
        made = helper.make_node(operator, list(inputs), list(outputs), domain=domain)
        made.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(made)
        return outputs[0]

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> str:
        """Adds a constant once and gives its name."""
        self.constants.setdefault(name, np.asarray(array))
        return name

    def model(self) -> ModelProto:
        """The whole."""
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "operators", self.inputs, self.outputs, constants)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=12)


Product = Callable[[Graph, str, str, int, int], str]


def float32(graph: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
    """Gemm over float32 weights."""
    weight = graph.constant(name, np.ones((outputs, inputs), np.float32))
    return graph.node("Gemm", [x, weight], [f"{name}.y"], transB=1)


def blocks(bits: int, size: int) -> Product:
    """MatMulNBits, activations in 8 bits."""

    def product(graph: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
        codes = graph.constant(name, np.ones((outputs, inputs // size, size * bits // 8), np.uint8))
        scales = graph.constant(f"{name}.scales", np.ones((outputs, inputs // size), np.float32))
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": 4}
        return graph.node("MatMulNBits", [x, codes, scales], [f"{name}.y"], domain=DOMAIN, **attributes)

    return product


def per_tensor(graph: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
    """DynamicQuantizeMatMul: one scale for the whole batch, so that rows lean on each other."""
    weight, scale = _channels(graph, name, inputs, outputs)
    return graph.node("DynamicQuantizeMatMul", [x, weight, scale], [f"{name}.y"], domain=DOMAIN)


def fixed(graph: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
    """Products of bytes with a scale that is known: int8, calibrated."""
    return _bytes(graph, x, name, _channels(graph, name, inputs, outputs))


def per_row(graph: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
    """Products of bytes with a scale for each row: int8."""
    magnitude = graph.node("Abs", [x], [f"{name}.magnitude"])
    axis = graph.constant("axis", np.array([-1]))
    peak = graph.node("ReduceMax", [magnitude, axis], [f"{name}.peak"])
    held = graph.node("Max", [peak, graph.constant("floor", np.float32(1e-30))], [f"{name}.held"])
    relative = graph.node("Div", [x, held], [f"{name}.relative"])
    product = _bytes(graph, relative, name, _channels(graph, name, inputs, outputs))
    return graph.node("Mul", [product, held], [f"{name}.scaled"])


def _channels(graph: Graph, name: str, inputs: int, outputs: int) -> tuple[str, str]:
    weight = graph.constant(name, np.ones((inputs, outputs), np.int8))
    return weight, graph.constant(f"{name}.scale", np.ones(outputs, np.float32))


def _bytes(graph: Graph, x: str, name: str, weights: tuple[str, str]) -> str:
    step, middle = graph.constant("step", np.float32(1 / 127)), graph.constant("middle", np.uint8(128))
    quantized = graph.node("QuantizeLinear", [x, step, middle], [f"{name}.quantized"])
    inputs = [quantized, weights[0], step, weights[1], middle]
    return graph.node("MatMulIntegerToFloat", inputs, [f"{name}.y"], domain=DOMAIN)


KINDS: dict[str, Product] = {
    "float32": float32,
    "8 bits, blocks of 128": blocks(8, 128),
    "8 bits, blocks of 32": blocks(8, 32),
    "4 bits, blocks of 128 (int4)": blocks(4, 128),
    "4 bits, blocks of 32": blocks(4, 32),
    "bytes, a scale for the batch": per_tensor,
    "bytes, a scale for each row (int8)": per_row,
    "bytes, fixed scales (int8, calibrated)": fixed,
}


def step_of(kind: Product) -> Graph:
    """All products of a step, each on an input of its width."""
    graph = Graph()
    graph.inputs = [
        helper.make_tensor_value_info(f"x{size}", TensorProto.FLOAT, ["B", size]) for size in (WIDTH, INNER)
    ]
    for number, (inputs, outputs) in enumerate(PRODUCTS):
        y = kind(graph, f"x{inputs}", f"w{number}", inputs, outputs)
        graph.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["B", outputs]))
    return graph


def attention(kind: str) -> Graph:
    """LAYERS attentions of one query token a row, each over keys and values of its own."""
    graph, width = Graph(), HEADS * HEAD_WIDTH
    packed = 3 * width if kind == "self" else width
    lengths = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B"]) for name in ("lengths", "last")]
    graph.inputs = [helper.make_tensor_value_info("q", TensorProto.FLOAT, ["B", 1, packed]), *lengths]
    last = graph.node("Cast", ["last"], ["last32"], to=TensorProto.INT32)
    total = graph.constant("total", np.array([CAPACITY], np.int32))
    nothing = ["", ""]
    if kind == "source, GroupQueryAttention":
        rows = graph.node("Shape", ["lengths"], ["rows"])
        shape = graph.node("Concat", [rows, graph.constant("rest", np.array([0, width]))], ["shape"], axis=0)
        nothing = [graph.node("ConstantOfShape", [shape], ["nothing"])] * 2
    for layer in range(LAYERS):
        past, present = [f"k{layer}", f"v{layer}"], [f"k{layer}.present", f"v{layer}.present"]
        cache: list[str | int | None] = ["B", HEADS, CAPACITY, HEAD_WIDTH]
        graph.inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in past]
        if kind == "source, Attention":
            heads = graph.constant("heads", np.array([0, HEADS, 1, HEAD_WIDTH]))
            query = graph.node("Reshape", ["q", heads], [f"q{layer}"])
            y = graph.node("Attention", [query, *past, "", "", "", "lengths"], [f"y{layer}"])
            graph.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["B", HEADS, 1, HEAD_WIDTH]))
            continue
        attributes = {"num_heads": HEADS, "kv_num_heads": HEADS}
        inputs = ["q", *nothing, *past, last, total]
        y = graph.node("GroupQueryAttention", inputs, [f"y{layer}", *present], domain=DOMAIN, **attributes)
        graph.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["B", 1, width]))
        graph.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in present]
        graph.bound |= dict(zip(present, past, strict=True))
    return graph


def milliseconds(graph: Graph, rows: Sequence[int], threads: int) -> list[float]:
    """The fastest run at each row count, present bound onto past."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [_fastest(session, graph, count) for count in rows]


def _fastest(session: ort.InferenceSession, graph: Graph, rows: int) -> float:
    random, binding, values = np.random.default_rng(0), session.io_binding(), {}
    for node in (*session.get_inputs(), *session.get_outputs()):
        shape = [rows if isinstance(axis, str) else axis for axis in node.shape]
        array = random.standard_normal(shape).astype(np.float32)
        if node.type == "tensor(int64)":
            array = np.full(shape, USED - (node.name == "last"))
        values[node.name] = ort.OrtValue.ortvalue_from_numpy(array)
    for node in session.get_inputs():
        binding.bind_ortvalue_input(node.name, values[node.name])
    for node in session.get_outputs():
        binding.bind_ortvalue_output(node.name, values[graph.bound.get(node.name, node.name)])
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1e3


def show(title: str, measured: dict[str, list[float]], rows: Sequence[int]) -> None:
    """A Markdown table."""
    lines = ([name, *(f"{value:.2f}" for value in times)] for name, times in measured.items())
    print("", *markdown_table([title, *map(str, rows)], lines, text={0}), sep="\n")


def main() -> None:
    """Measures products, then attentions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,8,32,64,128")
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    products = {name: milliseconds(step_of(kind), rows, arguments.threads) for name, kind in KINDS.items()}
    show("products of a step, ms, by rows", products, rows)
    kinds = ("self", "source, GroupQueryAttention", "source, Attention")
    attentions = {kind: milliseconds(attention(kind), rows, arguments.threads) for kind in kinds}
    per_layer = {kind: [value / LAYERS for value in times] for kind, times in attentions.items()}
    show("attention of a layer, ms, by rows", per_layer, rows)


if __name__ == "__main__":
    main()
