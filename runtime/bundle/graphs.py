"""The graphs of a bundle: one row each, with its name, its file in each format, and what it takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kvx.runtime.bundle.signature import (
    CHUNK_FEATURES,
    Dimensions,
    Signature,
    StepFeatures,
    encoder_signature,
    step_signature,
)

FORMAT_ENDINGS = {"onnx": (".onnx", ".data", ".npy"), "torchscript": (".ts",)}  # of the files of each format
FORMATS = tuple(FORMAT_ENDINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One graph. A bundle has it in the formats of which it holds the `files`, and the `required` ones in each format.

    `features` maps those of the bundle's decoder step to those of this graph, or is None for the encoder. `beside` are
    further files that it needs.
    """

    name: str
    files: Mapping[str, str]
    features: Callable[[StepFeatures], StepFeatures] | None
    required: bool = False
    beside: tuple[str, ...] = ()

    def signature(self, dimensions: Dimensions, features: StepFeatures) -> Signature:
        """What it takes and gives in a bundle whose decoder step has these features."""
        if self.features is None:
            return encoder_signature(dimensions)
        return step_signature(dimensions, self.features(features))

    def is_in(self, files: Collection[str]) -> bool:
        """Whether a bundle of these files has it, in whichever format."""
        return self.required or any(file in files for file in self.files.values())


ENCODER = Graph(
    name="encoder",
    files={"onnx": "encoder.onnx", "torchscript": "encoder.ts"},
    features=None,
    required=True,
)
STEP = Graph(
    name="decoder_step",
    files={"onnx": "decoder_step.onnx", "torchscript": "decoder_step.ts"},
    features=lambda features: features.step,
    required=True,
)
CHUNK = Graph(
    name="decoder_chunk",
    files={"onnx": "decoder_chunk.onnx"},
    features=lambda features: CHUNK_FEATURES,
)
BEAMS = Graph(
    name="decoder_beams",
    files={"onnx": "decoder_beams.onnx"},
    features=lambda features: features.beams,
)
SHORTLIST = Graph(
    name="decoder_shortlist",
    files={"onnx": "decoder_shortlist.onnx"},
    features=lambda features: features.shortlisted,
    beside=("projection.npy",),  # the rows of the output projection, float32 [V, E], that a shortlist picks from
)
LOOP = Graph(
    name="decoder_loop",
    files={"onnx": "decoder_loop.onnx"},
    features=lambda features: features.loop,
)
OWN_ENCODER = Graph(
    name="encoder_kernels",
    files={"onnx": "encoder_kernels.onnx"},
    features=None,
)
OWN_STEP = Graph(  # for one row a sentence or several
    name="decoder_kernels",
    files={"onnx": "decoder_kernels.onnx"},
    features=lambda features: features.own,
)
GRAPHS = (ENCODER, STEP, CHUNK, BEAMS, SHORTLIST, LOOP, OWN_ENCODER, OWN_STEP)

GRAPH_FILES = {  # of each format: the files that it cannot do without
    name: tuple(graph.files[name] for graph in GRAPHS if graph.required) for name in FORMATS
}
CHUNK_FILE = CHUNK.files["onnx"]
BEAMS_FILE = BEAMS.files["onnx"]
SHORTLIST_FILE = SHORTLIST.files["onnx"]
PROJECTION_FILE = SHORTLIST.beside[0]
LOOP_FILE = LOOP.files["onnx"]
OWN_ENCODER_FILE = OWN_ENCODER.files["onnx"]
OWN_STEP_FILE = OWN_STEP.files["onnx"]
