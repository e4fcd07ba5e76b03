"""Weights in fewer bits, prepared at export: the float graph in, the same graph with quantised products out.

No activation is scaled by what other rows hold. With `int8` a row's numbers are the same to the last bit whoever is
beside it; with `int4` they are the same up to rounding, since `MatMulNBits` adds in another order for one row than for
several.

- `int8`: one scale per output channel of a weight, products of bytes (`MatMulIntegerToFloat`), activations scaled by
  their row's largest magnitude, or by what calibration saw, which is faster. For many rows at a time. Weights are
  unsigned: a processor that multiplies bytes of both kinds without saturating takes them for signed ones at no cost,
  and for others ONNX Runtime would have to make them so at every load.
- `int4`: blocks of 128 weights with a scale each (`MatMulNBits`, activations in 8 bits per block), which reads the
  fewest bytes: for one sentence at a time. The encoder, which sees many tokens at once, stays int8.

Embeddings are stored in blocks (`GatherBlockQuantized`) of the same width. A table that is also the head's is there
once, as the product has it, and a lookup reads columns of it: else a runtime would turn it over at every load. Biases,
norms and positions stay float32.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Letters: N outputs and K inputs of a projection, V vocabulary, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvx.runtime.bundle.precision import Widths

DOMAIN = "com.microsoft"
BLOCK = 128
MIDDLE = 128  # the code of a byte that stands for zero
ROWS_AT_ONCE = 16384
INT8_ACCURACY = 4  # MatMulNBits: activations in 8 bits, products of integers
SMALLEST_PEAK = 1e-30  # keeps a row of zeros from being divided by zero
SCALE_SHRINKINGS = np.linspace(1.0, 0.75, 11, dtype=np.float32)


class Blocks(NamedTuple):
    """A matrix [rows, columns] in blocks along its columns: unsigned `codes` [rows, blocks, BLOCK·bits/8], whose
    middle stands for zero, and `scales` [rows, blocks].
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantize(
    model: ir.Model, widths: Widths, weights: Mapping[str, float | None], tied: Mapping[str, int] | None = None
) -> None:
    """Replaces, in place, the products with and the lookups in the named weights by quantised ones.

    With each weight comes the largest magnitude of what it is multiplied with, if that is known. Those that are `tied`
    are both looked up and multiplied somewhere in the bundle, and have this number of bits.
    """
    _Quantizer(model.graph, widths, weights, tied or {}).run()
    model.opset_imports[DOMAIN] = 1


def byte_channels(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """[N, K] → codes from 1 to 255, of which MIDDLE stands for zero, [K, N], and a scale for each output [N]."""
    codes, scales = np.empty(weight.shape[::-1], np.uint8), np.empty(len(weight), np.float32)
    for some in _slices(len(weight)):
        part = weight[some]
        scale = np.maximum(np.abs(part).max(axis=1), SMALLEST_PEAK) / 127
        codes[:, some], scales[some] = (np.rint(part / scale[:, None]) + MIDDLE).T, scale
    return codes, scales


def blocks(weight: NDArray[np.float32], bits: int) -> Blocks:
    """[rows, columns] → codes and scales; the last block is filled up with zeros."""
    parts = [_blocks(weight[some], bits) for some in _slices(len(weight))]
    return Blocks(np.concatenate([one.codes for one in parts]), np.concatenate([one.scales for one in parts]))


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
        self, graph: ir.Graph, widths: Widths, weights: Mapping[str, float | None], tied: Mapping[str, int]
    ) -> None:
        self._graph = graph
        self._widths = widths
        self._weights = weights
        self._tied = tied

    def run(self) -> None:
        """Every product and lookup of a weight."""
        for node in list(self._graph):
            if node.op_type == "Gemm" and self._is_weight(node.inputs[1]):
                self._replace(
                    node, self._bytes_product(node) if self._widths.products == 8 else self._blocks_product(node)
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
        codes, scales = byte_channels(matrix)
        positive = _comes_from(x, "Relu")
        levels = 255 if positive else 127
        middle = self._constant(f"zero_at_{255 - levels}", np.uint8(255 - levels))
        weights = self._constant(f"{name}.int8", codes), self._constant(f"{name}.scale", scales)
        centred = self._constant(f"zero_at_{MIDDLE}", np.uint8(MIDDLE))
        largest = self._weights[name]
        if largest:
            step = self._constant(f"{name}.input_scale", np.float32(largest / levels))
            quantized = ir.node("QuantizeLinear", [x, step, middle])
            inputs = [quantized.outputs[0], weights[0], step, weights[1], middle, centred, *bias]
            return [quantized, ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN)]
        step = self._constant(f"one_of_{levels}", np.float32(1 / levels))
        magnitude = [] if positive else [ir.node("Abs", [x])]
        peak = ir.node("ReduceMax", [magnitude[0].outputs[0] if magnitude else x, self._constant("last_axis", [-1])])
        floor = self._constant("smallest_peak", np.float32(SMALLEST_PEAK))
        held = ir.node("Max", [peak.outputs[0], floor])
        relative = ir.node("Div", [x, held.outputs[0]])
        quantized = ir.node("QuantizeLinear", [relative.outputs[0], step, middle])
        inputs = [quantized.outputs[0], weights[0], step, weights[1], middle, centred]
        product = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN)
        scaled = ir.node("Mul", [product.outputs[0], held.outputs[0]])
        added = [ir.node("Add", [scaled.outputs[0], bias[0]])] if bias else []
        return [*magnitude, peak, held, relative, quantized, product, scaled, *added]

    def _blocks_product(self, gemm: ir.Node) -> list[ir.Node]:
        """x [rows, K] · weight [N, K] → [rows, N], x in 8 bits, block by block."""
        x, weight, *bias = gemm.inputs
        name, matrix = _named(weight)
        packed = blocks(matrix, 4)
        weights = self._constant(f"{name}.int4", packed.codes), self._constant(f"{name}.scales", packed.scales)
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
        if self._tied[name] == 8:
            return self._bytes_lookup(name, matrix, ids, axes)
        packed = blocks(matrix, 4)
        codes = self._constant(f"{name}.int4", packed.codes)
        scales = self._constant(f"{name}.rows.scales", packed.scales[..., None])
        attributes = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
        found = ir.node("GatherBlockQuantized", [codes, ids, scales], attributes, domain=DOMAIN)
        flat = ir.node("Reshape", [found.outputs[0], self._constant(f"rows_of_{axes}", [0] * axes + [-1])])
        width = matrix.shape[1]
        if width % BLOCK == 0:
            return [found, flat]
        ends = (self._constant(f"to_{size}", [size]) for size in (0, width, -1))
        return [found, flat, ir.node("Slice", [flat.outputs[0], *ends])]

    def _bytes_lookup(self, name: str, matrix: NDArray[np.float32], ids: ir.Value | None, axes: int) -> list[ir.Node]:
        """ids [...] → columns of the product's weight [E, V] as rows [..., E]."""
        codes, scales = byte_channels(matrix)
        columns = ir.node("Gather", [self._constant(f"{name}.int8", codes), ids], {"axis": 1})
        rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [*range(1, axes + 1), 0]})
        numbers = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        centred = ir.node("Sub", [numbers.outputs[0], self._constant("middle", np.float32(MIDDLE))])
        scale = ir.node("Gather", [self._constant(f"{name}.scale", scales), ids])
        beside = ir.node("Unsqueeze", [scale.outputs[0], self._constant("last_axis", [-1])])
        scaled = ir.node("Mul", [centred.outputs[0], beside.outputs[0]])
        return [columns, rows, numbers, centred, scale, beside, scaled]

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


def _comes_from(value: ir.Value | None, operator: str) -> bool:
    """Whether this operator gave the value, in any shape."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == operator


def _named(weight: ir.Value | None) -> tuple[str, NDArray[np.float32]]:
    assert weight is not None
    assert weight.name is not None
    assert weight.const_value is not None
    return weight.name, weight.const_value.numpy()
