"""A graph with kvx's own operators (runtime/kernels): the encoder, or the step for one row a sentence or several.

`SelfAttention`, or `CodedSelfAttention` where the cache is in codes, takes the place of `GroupQueryAttention`,
`SourceAttention` that of `Attention` over the source with all
that brings the rows of a sentence together for it. Either takes lengths as the contract has them, and rows as products
give them. Products are kvx's own where they are quantised (exporter/precision/quantize.py).

Letters: B rows, E model width, G sentences that share them, H heads, D head width, S source positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kvx.runtime.bundle.signature import PAST, STEP_BYTES

OWN_DOMAIN = "kvx"
BIAS = 10  # the place of the bias of scores among the inputs of GroupQueryAttention


def with_kernels(model: ir.Model, *, coded: bool = False) -> ir.Model:
    """A copy of the graph of the encoder or of that for several rows a sentence, with kvx's own attention to the cache,
    in numbers or in codes, and to the source.
    """
    made = model.clone()
    graph = made.graph
    inputs = {value.name: value for value in graph.inputs}
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            new, replaced = _self_attention(node, inputs["past_lengths"], coded=coded)
        elif node.op_type == "Attention" and _reads_source(node):
            new, replaced = _source_attention(node, inputs["source_lengths"])
        else:
            continue
        ir.convenience.replace_nodes_and_values(graph, node, [], [new], replaced, new.outputs)
    made.opset_imports[OWN_DOMAIN] = 1
    RemoveUnusedNodesPass()(made)
    return made


def _self_attention(node: ir.Node, lengths: ir.Value, *, coded: bool) -> tuple[ir.Node, Sequence[ir.Value]]:
    """Packed queries, keys and values [B, 1, 3·E] → what replaces it, and what its outputs replace."""
    packed, past = _before(node, "Unsqueeze"), node.inputs[3:5]
    bias = node.inputs[BIAS:]
    heads = {"num_heads": node.attributes["num_heads"].as_int()}
    called = "CodedSelfAttention" if coded else "SelfAttention"
    new = ir.node(called, [packed, *past, lengths, *bias], heads, domain=OWN_DOMAIN, num_outputs=3)
    if coded:
        for value in (*past, *node.outputs[1:]):
            _become_codes(value)
    return new, [_after(node, "Reshape"), *node.outputs[1:]]


def _become_codes(value: ir.Value | None) -> None:
    """Gives a key or value of the cache [B, H, T, D] the type and shape that it has in codes."""
    assert value is not None
    assert value.shape is not None
    *axes, width = value.shape
    assert isinstance(width, int)
    value.type = ir.TensorType(ir.DataType.INT8)
    value.shape = ir.Shape([*axes, width + STEP_BYTES])


def _source_attention(node: ir.Node, lengths: ir.Value) -> tuple[ir.Node, Sequence[ir.Value]]:
    """Queries [G, H, B / G, D], brought there from [B, E] → what replaces it, and what its output replaces."""
    query = _before(node, "Transpose", "Reshape")
    keys = node.inputs[1]
    assert keys is not None
    assert keys.shape is not None
    heads = keys.shape[1]
    assert isinstance(heads, int)
    new = ir.node("SourceAttention", [query, *node.inputs[1:3], lengths], {"num_heads": heads}, domain=OWN_DOMAIN)
    return new, [_after(node, "Transpose", "Reshape")]


def _reads_source(node: ir.Node) -> bool:
    keys = node.inputs[1]
    return keys is not None and str(keys.name).startswith(PAST) and ".encoder." in str(keys.name)


def _before(node: ir.Node, *operators: str) -> ir.Value | None:
    """What stands before these operators, the last one first, which prepare the node's first input."""
    value = node.inputs[0]
    for operator in operators:
        producer = value.producer() if value is not None else None
        assert producer is not None, f"{operator} expected before {node.op_type}"
        assert producer.op_type == operator, f"{operator} expected before {node.op_type}"
        value = producer.inputs[0]
    return value


def _after(node: ir.Node, *operators: str) -> ir.Value:
    """What comes after these operators, which take the node's first output alone."""
    value = node.outputs[0]
    for operator in operators:
        [(consumer, _)] = value.uses()
        assert consumer.op_type == operator, f"{operator} expected after {node.op_type}"
        value = consumer.outputs[0]
    return value
