"""The graphs that an export writes: one row each, with when it is written, from what, and what proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvx.exporter.lowerings.lowered import Lowered
from kvx.exporter.lowerings.ort import GROUPED_WIDTH
from kvx.exporter.options import ExportOptions
from kvx.exporter.precision.halves import in_precision
from kvx.exporter.progress import Progress
from kvx.exporter.proof import checks
from kvx.exporter.writing.graphs import EncoderGraph, ShortlistGraph, StepGraph
from kvx.exporter.writing.loop import ForcedLoopGraph, LoopGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.exporter.writing.torchscript import write_torchscript
from kvx.models.transformer import Transformer
from kvx.runtime import kernels
from kvx.runtime.bundle.framing import Framing
from kvx.runtime.bundle.graphs import BEAMS, CHUNK, ENCODER, LOOP, OWN_ENCODER, OWN_STEP, SHORTLIST, STEP, Graph
from kvx.runtime.bundle.precision import Arithmetic, Widths
from kvx.runtime.bundle.signature import StepFeatures
from kvx.runtime.errors import OptionError


@dataclass(frozen=True, slots=True)
class Material:
    """What graphs are made of: a model in its precision, operators, features of its step, the ids around texts."""

    model: Transformer
    lowered: Lowered
    features: StepFeatures
    framing: Framing

    def features_of(self, graph: Graph) -> StepFeatures:
        """The features of one graph of the decoder."""
        assert graph.features is not None, f"{graph.name} is no graph of the decoder"
        return graph.features(self.features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one graph is written.

    `called` is what people call it. `module` makes it. `wanted` tells whether an export has it. `bits` are those of its
    weights. `shares` is the graph, written before it, whose weights it uses; `beside` writes further files. `own` is
    the same graph with kvx's own operators. `proof` is the check that it must pass.
    """

    graph: Graph
    called: str
    module: Callable[[Material], EncoderGraph | StepGraph | LoopGraph]
    proof: checks.Proof
    wanted: Callable[[ExportOptions], bool] = lambda options: True
    bits: Callable[[Arithmetic], Widths | None] = lambda arithmetic: arithmetic.step
    shares: Graph | None = STEP
    beside: Callable[[Material, Path], None] = lambda made, folder: None
    own: Graph | None = None


def _write_projection(made: Material, folder: Path) -> None:
    [name] = SHORTLIST.beside
    np.save(folder / name, made.model.projection().detach().numpy(), allow_pickle=False)


def _loop_graph(made: Material) -> LoopGraph:
    kind = ForcedLoopGraph if made.framing.forced else LoopGraph
    return kind(made.model, made.framing, made.features_of(LOOP), made.lowered.loop)


RECIPES = (
    Recipe(
        graph=ENCODER,
        called="the encoder",
        module=lambda made: EncoderGraph(made.model, made.lowered.step),
        bits=lambda arithmetic: arithmetic.encoder,
        shares=None,
        own=OWN_ENCODER,
        proof=checks.ENCODER_OUTPUTS,
    ),
    Recipe(
        graph=STEP,
        called="the decoder step",
        module=lambda made: StepGraph(made.model, made.lowered.step, made.features_of(STEP)),
        shares=ENCODER,
        proof=checks.STEPS,
    ),
    Recipe(
        graph=CHUNK,
        called="the decoder for several tokens at once",
        module=lambda made: StepGraph(made.model, made.lowered.step, made.features_of(CHUNK)),
        proof=checks.CHUNKS,
    ),
    Recipe(
        graph=BEAMS,
        called="the decoder for several rows a sentence",
        module=lambda made: StepGraph(made.model, made.lowered.beams, made.features_of(BEAMS)),
        own=OWN_STEP,
        proof=checks.ROWS_OF_A_SENTENCE,
    ),
    Recipe(
        graph=SHORTLIST,
        called="the decoder for a part of the vocabulary",
        module=lambda made: ShortlistGraph(made.model, made.lowered.beams, made.features_of(SHORTLIST)),
        wanted=lambda options: options.shortlist,
        beside=_write_projection,
        proof=checks.SHORTLISTED,
    ),
    Recipe(
        graph=LOOP,
        called="the decoder that feeds itself",
        module=_loop_graph,
        wanted=lambda options: options.loop or options.operators == "cuda",
        proof=checks.LOOPED,
    ),
)


def write_graphs(
    folder: Path,
    options: ExportOptions,
    model: Transformer,
    framing: Framing,
    features: StepFeatures,
    progress: Progress,
) -> None:
    """Every graph that the options ask for, in every format, with the files that it needs."""
    if "onnx" in options.formats:
        prepared = in_precision(model, options.precision)
        made = Material(prepared, Lowered.of(options.operators, prepared), features, framing)
        for recipe in _wanted(options, "onnx"):
            progress.phase(f"exporting {recipe.called} to ONNX")
            _write_onnx(recipe, made, folder, options)
    if "torchscript" in options.formats:
        progress.phase("tracing TorchScript")
        made = Material(model, Lowered.not_at_all(), features, framing)
        for recipe in _wanted(options, "torchscript"):
            write_torchscript(recipe.module(made), folder / recipe.graph.files["torchscript"])


def _wanted(options: ExportOptions, written: str) -> Iterator[Recipe]:
    return (recipe for recipe in RECIPES if written in recipe.graph.files and recipe.wanted(options))


def _write_onnx(recipe: Recipe, made: Material, folder: Path, options: ExportOptions) -> None:
    shared = None if recipe.shares is None else folder / recipe.shares.files["onnx"]
    bits, step = recipe.bits(options.arithmetic), options.arithmetic.step
    own = folder / recipe.own.files["onnx"] if recipe.own is not None and _has_own(recipe, made, options) else None
    write_onnx(
        recipe.module(made),
        folder / recipe.graph.files["onnx"],
        widths=bits,
        weights_of=shared,
        tied_bits=None if step is None else step.products,
        own=own,
        coded_cache=made.features.cache_bits is not None,
    )
    recipe.beside(made, folder)


def check_own(model: Transformer, options: ExportOptions) -> None:
    """Raises OptionError where kvx's own operators must be in the bundle and cannot be."""
    if not options.coded_cache:
        return
    lacks = None if kernels.library() is not None else "kvx has been installed without them"
    width = model.config.decoder_head_width
    if width % GROUPED_WIDTH:
        lacks = f"they have no heads of {width} channels"
    if lacks is not None:
        raise OptionError(
            f"`cache_precision` needs kvx's own operators, and {lacks}",
            expected=f"an installation with a compiler, and heads of a multiple of {GROUPED_WIDTH} channels",
            remedy="Install kvx again where there is a C compiler, or leave it out.",
            option="cache_precision",
        )


def _has_own(recipe: Recipe, made: Material, options: ExportOptions) -> bool:
    """Whether kvx's own operators can take over a graph, are there to prove it, and would change it."""
    config, arithmetic = made.model.config, options.arithmetic
    able = options.operators == "ort" and not arithmetic.halved and config.decoder_head_width % GROUPED_WIDTH == 0
    return able and kernels.library() is not None and (recipe.graph.features is not None or arithmetic.quantized)
