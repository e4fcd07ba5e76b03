"""Weights in fewer bits, prepared at export: the float graph in, the same graph with quantised products out.

No activation is scaled by what other rows hold. With `int8` a row's numbers are the same to the last bit whoever is
beside it. With `int4` they are so with kvx's own operators; `MatMulNBits` adds in another order for one row than for
several.

- `int8`: one scale per output channel of a weight, products of bytes, activations scaled by their row's largest
  magnitude, or by what calibration saw. For many rows at a time. Weights have 7 bits: then two products with a byte fit
  in 16 bits, and no processor saturates. They are stored as kvx's own `BytesProduct` reads them, in panels of 16
  outputs and groups of 4 inputs; for `MatMulIntegerToFloat`, where that operator is missing, ONNX Runtime puts them in
  rows as it loads them.
- `int4`: blocks of 128 weights with a scale each (`NibblesProduct`, or `MatMulNBits` with activations in 8 bits per
  block), which reads the fewest bytes: for one sentence at a time. The encoder, which sees many tokens at once, stays
  int8.

Embeddings are stored in blocks (`GatherBlockQuantized`) of 8 or 4 bits. A table that is also the head's is there once,
as the product has it. Biases, norms and positions stay float32.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Letters: N outputs and K inputs of a projection, P panels of its outputs, J groups of its inputs, V vocabulary, E model
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvx.exporter.lowerings.kernels import OWN_DOMAIN
from kvx.runtime.bundle.precision import Widths

DOMAIN = "com.microsoft"
BLOCK = 128
PANEL, GROUP = 16, 4  # outputs and inputs beside each other in a panel
LARGEST_CODE = 63  # of a weight in 7 bits
RESIDUALS = {"BytesProduct": 5, "NibblesProduct": 4}  # the place of what is added, among the inputs of a product
MIDDLE = 128  # the code of an activation that stands for zero
ROWS_AT_ONCE = 16384
INT8_ACCURACY = 4  # MatMulNBits: activations in 8 bits, products of integers
SMALLEST_PEAK = 1e-30  # keeps a row of zeros from being divided by zero
SCALE_SHRINKINGS = np.linspace(1.0, 0.75, 11, dtype=np.float32)


Packed = TypeVar("Packed")


class Panels(NamedTuple):
    """A matrix [N, K] in `codes` of 7 bits [P, J, PANEL, GROUP], filled up with zeros, the `sums` of each output's
    [N], and its `scales` [N].
    """

    codes: NDArray[np.int8]
    sums: NDArray[np.int32]
    scales: NDArray[np.float32]


class Blocks(NamedTuple):
    """A matrix [rows, columns] in blocks along its columns: unsigned `codes` [rows, blocks, BLOCK·bits/8], whose
    middle stands for zero, and `scales` [rows, blocks].
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantize(
    model: ir.Model,
    widths: Widths,
    weights: Mapping[str, float | None],
    tied: Mapping[str, int] | None = None,
    *,
    kernels: bool = False,
    packing: Packing | None = None,
) -> None:
    """Replaces, in place, the products with and the lookups in the named weights by quantised ones: operators of ONNX
    Runtime, or with `kernels` kvx's own where it has them.

    With each weight comes the largest magnitude of what it is multiplied with, if that is known. Those that are `tied`
    are both looked up and multiplied somewhere in the bundle, and have this number of bits. `packing` is shared by
    graphs of the same weights.
    """
    kind = _KernelQuantizer if kernels else _Quantizer
    kind(model.graph, widths, weights, tied or {}, packing or Packing()).run()
    model.opset_imports[DOMAIN] = 1


class Packing:
    """Weights in panels, each packed once for all graphs that have it under its name."""

    def __init__(self) -> None:
        self.bytes_of = _remembered(panels)
        self.nibbles_of = _remembered(nibble_panels)


def _remembered(pack: Callable[[NDArray[np.float32]], Packed]) -> Callable[[str, NDArray[np.float32]], Packed]:
    known: dict[str, Packed] = {}

    def packed(name: str, weight: NDArray[np.float32]) -> Packed:
        if name not in known:
            known[name] = pack(weight)
        return known[name]

    return packed


def panels(weight: NDArray[np.float32]) -> Panels:
    """[N, K] → codes, of which each output has a scale of its own."""
    outputs, inputs = weight.shape
    filled = np.zeros((outputs + -outputs % PANEL, inputs + -inputs % GROUP), np.int8)
    scales = np.empty(outputs, np.float32)
    for some in _slices(outputs):
        codes, scales[some] = _channels(weight[some])
        filled[some, :inputs][: len(codes)] = codes
    sums = filled[:outputs].sum(axis=1, dtype=np.int32)
    codes = filled.reshape(-1, PANEL, filled.shape[1] // GROUP, GROUP).transpose(0, 2, 1, 3)
    return Panels(np.ascontiguousarray(codes), sums, scales)


def _channels(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[N, K] → codes [N, K] and scales [N]: of several scales a little below the one that reaches an output's extreme,
    the one with the least squared error.
    """
    extreme = np.maximum(np.abs(weight).max(axis=1, keepdims=True), SMALLEST_PEAK) / np.float32(LARGEST_CODE)
    best, scales = np.full(extreme.shape, np.inf, np.float32), extreme
    for shrinking in SCALE_SHRINKINGS:
        tried = extreme * shrinking
        error = np.square(_symmetric(weight, tried) * tried - weight).sum(axis=1, keepdims=True)
        scales, best = np.where(error < best, tried, scales), np.minimum(best, error)
    return _symmetric(weight, scales).astype(np.int8), scales[:, 0].astype(np.float32)


def _symmetric(weight: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.rint(weight / scales).clip(-LARGEST_CODE, LARGEST_CODE)
    return codes


def blocks(weight: NDArray[np.float32], bits: int) -> Blocks:
    """[rows, columns] → codes and scales; the last block is filled up with zeros."""
    parts = [_blocks(weight[some], bits) for some in _slices(len(weight))]
    return Blocks(np.concatenate([one.codes for one in parts]), np.concatenate([one.scales for one in parts]))


def nibble_panels(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """[N, K] → codes of 4 bits [P, blocks, BLOCK/8, PANEL, GROUP], two to a byte, and scales [P, blocks, PANEL]. What
    fills the last panel up stands for nothing.
    """
    packed = blocks(np.pad(weight, ((0, -len(weight) % PANEL), (0, 0))), 4)
    count = packed.codes.shape[1]
    codes = packed.codes.reshape(-1, PANEL, count, BLOCK // 2 // GROUP, GROUP).transpose(0, 2, 3, 1, 4)
    scales = packed.scales.reshape(-1, PANEL, count).transpose(0, 2, 1)
    return np.ascontiguousarray(codes), np.ascontiguousarray(scales)


def _slices(rows: int) -> Iterator[slice]:
    """A few rows at a time: a vocabulary's table many times over would take gigabytes."""
    return (slice(first, first + ROWS_AT_ONCE) for first in range(0, rows, ROWS_AT_ONCE))


def _blocks(weight: NDArray[np.float32], bits: int) -> Blocks:
    """Of several scales a little below the one that reaches a block's extreme, the one with the least squared error."""
    padding = -weight.shape[1] % BLOCK
    parts = np.pad(weight, ((0, 0), (0, padding))).reshape(len(weight), -1, BLOCK)
    half = 2 ** (bits - 1)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(axis=-1, keepdims=True), axis=-1)
    extreme = np.where(extreme == 0, np.float32(SMALLEST_PEAK), extreme) / -half  # the extreme's code is 0
    best, scales = np.full(extreme.shape, np.inf, np.float32), extreme
    for shrinking in SCALE_SHRINKINGS if bits == 4 else SCALE_SHRINKINGS[:1]:
        tried = extreme * shrinking
        error = np.square(_codes(parts, tried, half) * tried - parts).sum(axis=-1, keepdims=True)
        scales, best = np.where(error < best, tried, scales), np.minimum(best, error)
    codes = (_codes(parts, scales, half) + half).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return Blocks(codes, scales[..., 0].astype(np.float32))


def _codes(parts: NDArray[np.float32], scales: NDArray[np.float32], half: int) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.rint(parts / scales).clip(-half, half - 1)
    return codes


class _Quantizer:
    """Rewrites one graph; new values are named after the weight that they belong to."""

    def __init__(
        self,
        graph: ir.Graph,
        widths: Widths,
        weights: Mapping[str, float | None],
        tied: Mapping[str, int],
        packing: Packing,
    ) -> None:
        self._graph = graph
        self._widths = widths
        self._weights = weights
        self._tied = tied
        self._packing = packing
        self._rows: dict[str, ir.Value] = {}  # what is stored in panels, in rows

    def run(self) -> None:
        """Every product and lookup of a weight."""
        for node in list(self._graph):
            if node.op_type == "Gemm" and self._is_weight(node.inputs[1]):
                self._replace(
                    node, self._blocks_product(node) if self._widths.products == 4 else self._bytes_product(node)
                )
            elif node.op_type == "Gather" and self._is_weight(node.inputs[0]):
                self._replace(node, self._tied_lookup(node) if self._is_tied(node.inputs[0]) else self._lookup(node))
        used = {value for node in self._graph for value in node.inputs}
        left = sorted({value.name for value in used if self._is_weight(value) and value is not None and value.name})
        assert not left, f"products or lookups that no quantiser knows: {left}"
        for name in [name for name, value in self._graph.initializers.items() if value not in used]:
            del self._graph.initializers[name]

    def _is_tied(self, value: ir.Value | None) -> bool:
        return value is not None and value.name in self._tied

    def _is_weight(self, value: ir.Value | None) -> bool:
        return value is not None and value.name in self._weights

    def _bytes_product(self, gemm: ir.Node) -> list[ir.Node]:
        """x [rows, K] · weight [N, K] → [rows, N]."""
        x, weight, *bias = gemm.inputs
        name, matrix = _named(weight)
        positive = _comes_from(x, "Relu")
        levels = 255 if positive else 127
        middle = self._constant(f"zero_at_{255 - levels}", np.uint8(255 - levels))
        weights = (
            self._matrix(name, matrix),
            self._constant(f"{name}.scale", self._packing.bytes_of(name, matrix).scales),
        )
        largest = self._weights[name]
        if largest:
            step = self._constant(f"{name}.input_scale", np.float32(largest / levels))
            quantized = ir.node("QuantizeLinear", [x, step, middle])
            inputs = [quantized.outputs[0], weights[0], step, weights[1], middle, None, *bias]
            return [quantized, ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN)]
        step = self._constant(f"one_of_{levels}", np.float32(1 / levels))
        magnitude = [] if positive else [ir.node("Abs", [x])]
        peak = ir.node("ReduceMax", [magnitude[0].outputs[0] if magnitude else x, self._constant("last_axis", [-1])])
        floor = self._constant("smallest_peak", np.float32(SMALLEST_PEAK))
        held = ir.node("Max", [peak.outputs[0], floor])
        relative = ir.node("Div", [x, held.outputs[0]])
        quantized = ir.node("QuantizeLinear", [relative.outputs[0], step, middle])
        inputs = [quantized.outputs[0], weights[0], step, weights[1], middle]
        product = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN)
        scaled = ir.node("Mul", [product.outputs[0], held.outputs[0]])
        added = [ir.node("Add", [scaled.outputs[0], bias[0]])] if bias else []
        return [*magnitude, peak, held, relative, quantized, product, scaled, *added]

    def _matrix(self, name: str, weight: NDArray[np.float32]) -> ir.Value:
        """The panels of a weight [N, K] as a matrix [K, N]."""
        codes = self._packing.bytes_of(name, weight).codes
        count, groups = codes.shape[:2]
        stored = self._constant(f"{name}.int8", codes)
        orders = [0, 1, 3, 2], [1, 2, 0, 3]  # at once it would take ONNX Runtime four times as long
        return self._unpacked(stored, orders, [groups * GROUP, count * PANEL], weight.shape[::-1])

    def _in_rows(self, name: str, weight: NDArray[np.float32]) -> tuple[ir.Value, ir.Value]:
        """The panels of a weight [N, K] in 4 bits as codes [N, blocks, bytes] and scales [N, blocks]."""
        codes, scales = self._packing.nibbles_of(name, weight)
        outputs, (count, numbers) = len(weight), codes.shape[:2]
        shape = [count * PANEL, numbers, BLOCK // 2]
        rows = self._unpacked(
            self._constant(f"{name}.int4", codes), [[0, 3, 1, 2, 4]], shape, (outputs, numbers, BLOCK // 2)
        )
        stored = self._constant(f"{name}.scales", scales)
        return rows, self._unpacked(stored, [[0, 2, 1]], [count * PANEL, numbers], (outputs, numbers))

    def _unpacked(
        self, stored: ir.Value, orders: Sequence[list[int]], shape: list[int], wanted: tuple[int, ...]
    ) -> ir.Value:
        """What is stored in panels with its axes brought into one order after the other, as an array of this shape, of
        which the leading parts are `wanted`. ONNX Runtime computes it once, as it loads the graph.
        """
        name = f"{stored.name}.rows"
        if name not in self._rows:
            nodes: list[ir.Node] = []
            for order in orders:
                nodes.append(ir.node("Transpose", [nodes[-1].outputs[0] if nodes else stored], {"perm": order}))
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], self._constant(f"{name}.shape", shape)]))
            if list(wanted) != shape:
                ends = self._constant(f"{name}.start", [0] * len(shape)), self._constant(f"{name}.end", list(wanted))
                nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends]))
            for number, node in enumerate(nodes):
                node.outputs[0].name = f"{name}.{number}"
            self._graph.insert_before(self._graph[0], nodes)
            self._rows[name] = nodes[-1].outputs[0]
        return self._rows[name]

    def _blocks_product(self, gemm: ir.Node) -> list[ir.Node]:
        """x [rows, K] · weight [N, K] → [rows, N], x in 8 bits, block by block."""
        x, weight, *bias = gemm.inputs
        name, matrix = _named(weight)
        weights = self._in_rows(name, matrix)
        attributes = {"K": matrix.shape[1], "N": matrix.shape[0], "bits": 4, "block_size": BLOCK}
        attributes["accuracy_level"] = INT8_ACCURACY
        inputs = [x, *weights, *([None, None, bias[0]] if bias else [])]
        return [ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN)]

    def _lookup(self, gather: ir.Node) -> list[ir.Node]:
        """ids [...] → the rows of a table [V, E] that they name [..., E]."""
        table, ids = gather.inputs
        name, matrix = _named(table)
        width = matrix.shape[1]
        bits = self._widths.lookups if width % 2 == 0 else 8  # half a byte cannot end a row
        packed = blocks(matrix, bits)
        codes = packed.codes.reshape(len(matrix), -1)[:, : width * bits // 8]  # here a row is not filled up
        rows = f"{name}.rows"  # a product with the same weight, where it is tied, has constants of its own
        inputs = [self._constant(f"{rows}.int{bits}", codes), ids, self._constant(f"{rows}.scales", packed.scales)]
        attributes = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return [ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN)]

    def _tied_lookup(self, gather: ir.Node) -> list[ir.Node]:
        """Rows of the very codes that the product with the same weight has."""
        table, ids = gather.inputs
        name, matrix = _named(table)
        axes = len(gather.outputs[0].shape or ()) - 1  # of the ids
        if self._tied[name] != 4:
            return self._bytes_lookup(name, matrix, ids, axes)
        return self._nibbles_lookup(name, matrix, ids, axes)

    def _nibbles_lookup(self, name: str, matrix: NDArray[np.float32], ids: ir.Value | None, axes: int) -> list[ir.Node]:
        """ids [...] → rows of the product's weight [V, E]."""
        codes, scales = self._in_rows(name, matrix)
        beside = ir.node("Unsqueeze", [scales, self._constant("last_axis", [-1])])
        attributes = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
        found = ir.node("GatherBlockQuantized", [codes, ids, beside.outputs[0]], attributes, domain=DOMAIN)
        flat = ir.node("Reshape", [found.outputs[0], self._constant(f"rows_of_{axes}", [0] * axes + [-1])])
        width = matrix.shape[1]
        if width % BLOCK == 0:
            return [beside, found, flat]
        ends = (self._constant(f"to_{size}", [size]) for size in (0, width, -1))
        return [beside, found, flat, ir.node("Slice", [flat.outputs[0], *ends])]

    def _bytes_lookup(self, name: str, matrix: NDArray[np.float32], ids: ir.Value | None, axes: int) -> list[ir.Node]:
        """ids [...] → columns of the product's weight [E, V] as rows [..., E]."""
        columns = ir.node("Gather", [self._matrix(name, matrix), ids], {"axis": 1})
        rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [*range(1, axes + 1), 0]})
        numbers = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        scale = ir.node("Gather", [self._constant(f"{name}.scale", self._packing.bytes_of(name, matrix).scales), ids])
        beside = ir.node("Unsqueeze", [scale.outputs[0], self._constant("last_axis", [-1])])
        scaled = ir.node("Mul", [numbers.outputs[0], beside.outputs[0]])
        return [columns, rows, numbers, scale, beside, scaled]

    def _constant(self, name: str, array: NDArray[Any] | np.generic | Sequence[int]) -> ir.Value:
        known, values = self._graph.initializers.get(name), np.asarray(array)
        if known is None:
            known = ir.val(name, const_value=ir.tensor(values, name=name))
            self._graph.register_initializer(known)
        held = known.const_value
        assert held is not None
        assert np.array_equal(held.numpy(), values), f"two different constants are called {name}"
        return known

    def _replace(self, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
        old, new = node.outputs[0], nodes[-1].outputs[0]
        for number, made in enumerate(nodes[:-1]):
            made.outputs[0].name = f"{old.name}.{number}"
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], nodes, [old], [new])


class _KernelQuantizer(_Quantizer):
    """The same with kvx's own operators (runtime/kernels)."""

    def run(self) -> None:
        """Every product and lookup of a weight; what comes right after a product becomes part of it."""
        super().run()
        for node in [node for node in self._graph if node.op_type in RESIDUALS]:
            self._absorb(node)

    def _absorb(self, product: ir.Node) -> None:
        """A ReLU that takes the product alone, or else what is added to it."""
        result = product.outputs[0]
        if len(result.uses()) != 1 or result.is_graph_output():
            return
        [(after, _)] = result.uses()
        inputs, attributes = list(product.inputs), dict(product.attributes)
        place = RESIDUALS[product.op_type]
        if after.op_type == "Relu":
            attributes["positive_out"] = ir.AttrInt64("positive_out", 1)
        elif after.op_type == "Add" and (beside := _other(after, result)) is not None:
            inputs += [None] * (place + 1 - len(inputs))
            inputs[place] = beside
        else:
            return
        made = ir.Node(OWN_DOMAIN, product.op_type, inputs, attributes.values(), num_outputs=1)
        ir.convenience.replace_nodes_and_values(
            self._graph, after, [product, after], [made], [after.outputs[0]], [made.outputs[0]]
        )

    def _bytes_product(self, gemm: ir.Node) -> list[ir.Node]:
        """x [rows, K] · weight [N, K] → [rows, N]."""
        x, weight, *bias = gemm.inputs
        name, matrix = _named(weight)
        packed, positive = self._packing.bytes_of(name, matrix), _comes_from(x, "Relu")
        constants = (("int8", packed.codes), ("sums", packed.sums), ("scale", packed.scales))
        inputs = [x, *(self._constant(f"{name}.{kind}", array) for kind, array in constants), *(bias or [None])]
        largest = self._weights[name]
        if largest:
            levels = 255 if positive else 127
            inputs += [None, self._constant(f"{name}.input_scale", np.float32(largest / levels))]
        attributes = {"width": len(matrix), "positive_in": int(positive)}
        return [ir.node("BytesProduct", inputs, attributes, domain=OWN_DOMAIN)]

    def _blocks_product(self, gemm: ir.Node) -> list[ir.Node]:
        """x [rows, K] · weight [N, K] → [rows, N], x in 8 bits, block by block."""
        x, weight, *bias = gemm.inputs
        name, matrix = _named(weight)
        inputs = [x, *self._nibbles(name, matrix), *bias]
        return [ir.node("NibblesProduct", inputs, {"width": len(matrix)}, domain=OWN_DOMAIN)]

    def _bytes_lookup(self, name: str, matrix: NDArray[np.float32], ids: ir.Value | None, axes: int) -> list[ir.Node]:
        """ids [...] → the rows of a table that is stored in panels [..., E]."""
        packed = self._packing.bytes_of(name, matrix)
        stored = self._constant(f"{name}.int8", packed.codes), self._constant(f"{name}.scale", packed.scales)
        return [ir.node("BytesLookup", [ids, *stored], {"width": matrix.shape[1]}, domain=OWN_DOMAIN)]

    def _nibbles_lookup(self, name: str, matrix: NDArray[np.float32], ids: ir.Value | None, axes: int) -> list[ir.Node]:
        """ids [...] → the rows of a table that is stored in panels [..., E]."""
        stored = self._nibbles(name, matrix)
        sizes = {"rows": len(matrix), "width": matrix.shape[1]}
        return [ir.node("NibblesLookup", [ids, *stored], sizes, domain=OWN_DOMAIN)]

    def _nibbles(self, name: str, matrix: NDArray[np.float32]) -> tuple[ir.Value, ir.Value]:
        """The codes and scales of a weight in 4 bits, as they are stored."""
        codes, scales = self._packing.nibbles_of(name, matrix)
        return self._constant(f"{name}.int4", codes), self._constant(f"{name}.scales", scales)


def _comes_from(value: ir.Value | None, operator: str) -> bool:
    """Whether this operator gave the value, in any shape."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == operator


def _other(add: ir.Node, value: ir.Value) -> ir.Value | None:
    """What is added to a value, if it is one of the same known shape that the graph computes."""
    [other] = [given for given in add.inputs if given is not value] or [None]
    if other is None or other.is_initializer() or other.shape is None or other.shape != value.shape:
        return None
    named = all(isinstance(size, int) or size.value is not None for size in other.shape)
    return other if named else None


def _named(weight: ir.Value | None) -> tuple[str, NDArray[np.float32]]:
    assert weight is not None
    assert weight.name is not None
    assert weight.const_value is not None
    return weight.name, weight.const_value.numpy()
