"""The graphs as TorchScript files."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from kvx.exporter.writing.graphs import EncoderGraph, StepGraph, example_inputs
from kvx.exporter.writing.loop import LoopGraph


def write_torchscript(graph: EncoderGraph | StepGraph | LoopGraph, path: Path) -> None:
    """One graph, traced and frozen → a TorchScript file. The step writes its caches in place."""
    _own_storages(graph)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.eval(), example_inputs(graph.signature), check_trace=False
        )
        torch.jit.save(torch.jit.freeze(traced), str(path))


def _own_storages(graph: nn.Module) -> None:
    """Copies tensors that are parts of larger ones, such as a mapped file: a module is written with all that they are
    parts of.
    """
    for tensor in (*graph.parameters(), *graph.buffers()):
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor.data = tensor.data.clone()
