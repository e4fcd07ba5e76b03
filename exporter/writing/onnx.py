"""The graphs as ONNX files."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnx_ir.external_data import convert_tensors_to_external
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import Tensor, nn

from kvx.exporter.lowerings.kernels import with_kernels
from kvx.exporter.lowerings.standard import IR_VERSION, OPSET
from kvx.exporter.precision.quantize import Packing, quantize
from kvx.exporter.writing.graphs import EncoderGraph, StepGraph, example_inputs
from kvx.exporter.writing.loop import LoopGraph
from kvx.models.layers import Linear
from kvx.runtime.bundle.precision import Widths
from kvx.runtime.bundle.signature import PAST

HEAD = "model.head.weight"
LARGEST_INSIDE = 2**8  # bytes of a weight that stays within the file of a graph, as onnx_ir has it


def write_onnx(
    graph: EncoderGraph | StepGraph | LoopGraph,
    path: Path,
    *,
    widths: Widths | None = None,
    weights_of: Path | None = None,
    tied_bits: int | None = None,
    own: Path | None = None,
    coded_cache: bool = False,
) -> None:
    """One graph → an ONNX file that the checker passes, its weights beside it as `<path>.data`, which runtimes map into
    memory. With `widths` they are quantised.

    With `weights_of`, another graph in the same folder, they are shared with that one; `<path>.data` then has those
    that differ, but for the small ones, if there are any. To `own` goes the same graph with kvx's own operators, which
    shares the weights too, and whose cache is in codes where it is `coded_cache`.
    """
    model = _exported(graph)
    names = _shared_names(graph)
    _rename(model, names)
    weights = _weights(graph)
    tied = {HEAD: tied_bits or widths.products} if widths is not None and HEAD in names else {}
    owning, packing = None if own is None else with_kernels(model, coded=coded_cache), Packing()
    if widths is not None:
        quantize(model, widths, weights, tied, packing=packing)
    _save(model, path, weights_of)
    if own is not None and owning is not None:
        if widths is not None:
            quantize(owning, widths, weights, tied, kernels=True, packing=packing)
        _save(owning, own, weights_of or path)


def _exported(graph: EncoderGraph | StepGraph | LoopGraph) -> onnx_ir.Model:
    """The graph as torch exports it."""
    letters = {letter: torch.export.Dim(letter, min=1) for letter in ("B", "C", "G", "Q", "S", "T")}
    shapes = [
        {axis: letters[letter] for axis, letter in enumerate(spec.axes) if isinstance(letter, str)}
        for spec in graph.signature.inputs
    ]
    named = sum(not spec.name.startswith(PAST) for spec in graph.signature.inputs)  # the caches are one parameter
    flat, caches = shapes[:named], shapes[named:]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            example_inputs(graph.signature),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.signature.inputs],
            output_names=[spec.name for spec in graph.signature.outputs],
            dynamic_shapes=(*flat, tuple(caches)) if caches else tuple(flat),
            verbose=False,
        )
    assert program is not None
    program.model.ir_version = IR_VERSION
    _clear_metadata(program.model)
    return program.model


def _save(model: onnx_ir.Model, path: Path, weights_of: Path | None) -> None:
    """Writes a graph and the weights that it does not share."""
    CommonSubexpressionEliminationPass()(model)
    if weights_of is not None:
        _share_weights(model, weights_of)
    _put_beside(model, path)
    onnx_ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def _shared_names(graph: nn.Module) -> dict[str, str]:
    """The names of a weight that several modules share, each with the one that it has in every graph: that of the head
    where it is one of them.
    """
    modules = {name: module for name, module in graph.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    by_weight: dict[Tensor, list[str]] = {}
    for name, module in modules.items():
        by_weight.setdefault(module.weight, []).append(f"{name}.weight")
    shared = (names for names in by_weight.values() if len(names) > 1)
    return {name: HEAD if HEAD in names else min(names) for names in shared for name in names}


def _rename(model: onnx_ir.Model, names: dict[str, str]) -> None:
    """Gives a weight that is shared one name in every graph, by which graphs share it."""
    for name, shared in names.items():
        value = model.graph.initializers.pop(name, None)
        if value is not None:
            value.name = shared
            model.graph.initializers[shared] = value


def _weights(graph: nn.Module) -> dict[str, float | None]:
    """The weights that may be quantised, by name, each with the largest magnitude of its input where calibrated. A
    weight that several modules share has one name in the graph, that of any of them.
    """
    modules = {name: module for name, module in graph.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    largest = {module.weight: module.largest_input for module in modules.values() if isinstance(module, Linear)}
    return {f"{name}.weight": largest.get(module.weight) for name, module in modules.items()}


def _share_weights(model: onnx_ir.Model, other: Path) -> None:
    """Lets the model's weights be those in another graph's data file, wherever that has the same ones."""
    theirs = onnx_ir.load(other).graph.initializers
    for name, value in model.graph.initializers.items():
        tensor = theirs[name].const_value if name in theirs else None
        own = value.const_value
        if isinstance(tensor, onnx_ir.ExternalTensor) and own and np.array_equal(tensor.numpy(), own.numpy()):
            value.const_value = tensor


def _put_beside(model: onnx_ir.Model, path: Path) -> None:
    """Moves large weights that are not in any file yet to one of their own: a graph's file holds 2 GiB at the most."""
    tensors = {value: value.const_value for value in model.graph.initializers.values()}
    own = {
        value: tensor
        for value, tensor in tensors.items()
        if tensor is not None and not isinstance(tensor, onnx_ir.ExternalTensor) and tensor.nbytes > LARGEST_INSIDE
    }
    if own:
        moved = convert_tensors_to_external(list(own.values()), path.parent, f"{path.name}.data")
        for value, tensor in zip(own, moved, strict=True):
            value.const_value = tensor


def _clear_metadata(model: onnx_ir.Model) -> None:
    """Drops what the exporter noted for itself: stack traces with its own paths, and the names of torch's parts."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch 2.13 prints on every export: the names of free axes, its own deprecations, torchvision."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name: . will not be used", category=UserWarning)
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
