"""What to export, in which form, and where to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from kvx.exporter.proof.limits import ParityOptions
from kvx.runtime.bundle.framing import MOST_PREFIX
from kvx.runtime.bundle.graphs import FORMATS
from kvx.runtime.bundle.precision import PRECISIONS, Arithmetic, CachePrecision, Lowering, Precision
from kvx.runtime.bundle.signature import StepFeatures
from kvx.runtime.errors import OptionError
from kvx.runtime.rules import (
    Option,
    Problem,
    choice,
    count,
    described,
    encodable,
    flag,
    path,
    refuse,
    text,
    wrong_values,
)

Format = Literal["onnx", "torchscript", "both"]

MOST_HEADS = 2**16
MOST_LAYERS = 1024
LARGEST_LIMIT = 2**24
PURPOSES = ", ".join(f"{name} for {arithmetic.purpose}" for name, arithmetic in PRECISIONS.items())


def default_lowerings() -> str:
    """The default lowering of each precision in words, that of float32 first."""
    by_lowering: dict[Lowering, list[Precision]] = {}
    for name, arithmetic in PRECISIONS.items():
        by_lowering.setdefault(arithmetic.lowerings[0], []).append(name)
    usual, *others = by_lowering
    return "; ".join([usual, *(f"{lowering} with {' and '.join(by_lowering[lowering])}" for lowering in others)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export. Raises one OptionError that names everything unknown or contradictory.

    `loop` also writes the graph that feeds itself with any lowering, not with "cuda" alone. `parity` says how the
    export is proven.
    """

    checkpoint: Annotated[
        Path,
        Option(
            path(),
            "The trained model: a folder of Hugging Face transformers (Marian, M2M100, NLLB, BART, mBART, Pegasus, T5, "
            "mT5, UMT5, ByT5) or of Eole, a checkpoint of fairseq, OpenNMT-py or Marian, a state dict, or a model.pt "
            "in kvx's own format.",
        ),
    ]
    output: Annotated[
        Path | None,
        Option(
            path(),
            "Write the bundle to this folder.",
            unset="artifacts/<name of the checkpoint's folder>, and -<precision> after it",
            flags=("-o", "--output"),
        ),
    ] = None
    source_tokenizer: Annotated[
        Path | None,
        Option(path(), "The sentencepiece model of the source.", unset="source.model beside the checkpoint"),
    ] = None
    target_tokenizer: Annotated[
        Path | None,
        Option(path(), "The sentencepiece model of the target.", unset="target.model beside the checkpoint"),
    ] = None
    heads: Annotated[
        int | None,
        Option(
            count(MOST_HEADS),
            "The number of attention heads. A plain state dict does not record it, and the proof does not notice a "
            "wrong number, with which translations are wrong.",
            unset="d_model / 64",
        ),
    ] = None
    layout: Annotated[
        Path | None,
        Option(
            path(),
            "A file that names the parts and tensors of a model of your own. `--write-layout` drafts one.",
        ),
    ] = None
    format: Annotated[
        Format | None,
        Option(
            choice(get_args(Format)),
            "Write ONNX graphs, TorchScript modules, or both. With both, a copy of the checkpoint is written too, "
            "for the eager backends.",
            unset="both; onnx with fewer bits or for CUDA",
            flags=("--format",),
        ),
    ] = None
    lowering: Annotated[
        Lowering | None,
        Option(
            choice(get_args(Lowering)),
            "Which operators the ONNX graphs use: ONNX Runtime's own (ort), those of the ONNX standard alone "
            "(standard), or those that run in CUDA graphs (cuda).",
            unset=default_lowerings(),
        ),
    ] = None
    precision: Annotated[
        Precision,
        Option(
            choice(get_args(Precision)),
            f"The number format of weights and arithmetic: {PURPOSES}. All but fp32 may change translations.",
        ),
    ] = "fp32"
    cache_precision: Annotated[
        CachePrecision | None,
        Option(
            choice(get_args(CachePrecision)),
            "Keep what was translated so far in 8 bits, a quarter of the memory, which speeds up long translations. It "
            "may change them, and needs kvx's own operators: elsewhere the bundle works as if this was not set.",
            unset="as the precision computes",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Option(
            path(),
            "Sample source texts, one per line. The scales of activations are fixed on them, which speeds up "
            "translation. For int8 and int4.",
            unset="scales are computed for each row at run time",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Option(
            count(LARGEST_LIMIT),
            "The default length limit of a translation, in tokens, the end token included. `kvx translate` can set "
            "another.",
            unset="the checkpoint's own limit",
        ),
    ] = None
    default_source_language: Annotated[
        str | None,
        Option(
            text(),
            "The language of texts for which none is named, by its code.",
            unset="the checkpoint's own, if it has one",
            flags=("--default-from",),
        ),
    ] = None
    default_target_language: Annotated[
        str | None,
        Option(
            text(),
            "The language to translate to where none is named, by its code.",
            unset="the checkpoint's own, if it has one",
            flags=("--default-to",),
        ),
    ] = None
    text_prefix: Annotated[
        str | None,
        Option(
            encodable(MOST_PREFIX),
            'What stands before every text that is translated with this bundle, as in "translate English to German: ".',
            unset="nothing",
        ),
    ] = None
    attention: Annotated[
        bool,
        Option(
            flag(),
            "Also write cross-attention weights into the graphs, for alignments and attention pages.",
            flags=("--with-attention",),
        ),
    ] = False
    attention_layer: Annotated[
        int | None,
        Option(
            count(MOST_LAYERS - 1, least=0),
            "The decoder layer whose attention `attention` writes, counted from 0.",
            unset="the last layer",
        ),
    ] = None
    verify: Annotated[
        bool,
        Option(flag(), "Compare the export with eager PyTorch before it is kept.", flags=("--verify/--no-verify",)),
    ] = True
    parity: ParityOptions = field(default_factory=ParityOptions)
    shortlist: Annotated[
        bool,
        Option(
            flag(),
            "Also write the ONNX graph that translating with a shortlist needs.",
            flags=("--with-shortlist",),
        ),
    ] = False
    loop: Annotated[
        bool, Option(flag(), "Also write the decoder that feeds itself, with any lowering.", hidden=True)
    ] = False
    force: Annotated[
        bool, Option(flag(), "Replace the bundle that is already in the output folder.", flags=("--force",))
    ] = False

    def __post_init__(self) -> None:
        wrong = list(wrong_values(self))
        if {"precision", "lowering", "format"}.isdisjoint(problem.option for problem in wrong):
            wrong += [*self._contradictions(), *self._without_effect()]
        refuse(wrong)

    def _contradictions(self) -> Iterator[Problem]:
        if self.operators not in self.arithmetic.lowerings:
            able = " or ".join(self.arithmetic.lowerings)
            yield Problem(
                "precision",
                f"`precision` {self.precision} does not go together with `lowering` {self.operators}",
                f"`lowering` {able} with `precision` {self.precision}",
            )
        if self.arithmetic.reduced and self.format not in (None, "onnx"):
            yield Problem(
                "precision",
                f"`precision` {self.precision} does not go together with `format` {self.format}",
                "`format` onnx with fewer bits",
            )
        elif self.cache_precision is not None and (self.operators != "ort" or self.arithmetic.halved):
            yield Problem(
                "cache_precision",
                f"`cache_precision` {self.cache_precision} does not go together with `precision` {self.precision} and "
                f"`lowering` {self.operators}",
                "`lowering` ort and `precision` fp32, int8 or int4 with `cache_precision`",
            )
        elif self.lowering == "cuda" and self.format == "both":
            yield Problem(
                "lowering", "`lowering` cuda does not go together with `format` both", "`format` onnx with cuda"
            )
        if self.shortlist and "onnx" not in self.formats:
            yield Problem(
                "shortlist",
                f"`shortlist` does not go together with `format` {self.format}",
                "`format` onnx with `shortlist`",
            )

    def _without_effect(self) -> Iterator[Problem]:
        if self.calibration is not None and not self.arithmetic.quantized:
            quantized = " or ".join(name for name in PRECISIONS if PRECISIONS[name].quantized)
            yield Problem(
                "calibration",
                f"`calibration` has no effect with `precision` {self.precision}",
                f"`calibration` only with {quantized}",
            )
        if self.attention_layer is not None and not self.attention:
            yield Problem(
                "attention_layer",
                f"`attention_layer` {self.attention_layer} has no effect without `attention`",
                "`attention_layer` only with `attention`",
            )
        if "onnx" not in self.formats:
            yield from self._only_of_onnx()
        yield from (
            self.parity.without_effect(self.precision, coded_cache=self.coded_cache)
            if self.verify
            else self._only_of_proofs()
        )

    def _only_of_onnx(self) -> Iterator[Problem]:
        only = ("lowering", self.lowering), ("loop", self.loop), ("cache_precision", self.cache_precision)
        for name, value in only:
            if value:
                yield Problem(
                    name, f"`{name}` has no effect with `format` {self.format}", f"`{name}` only with `format` onnx"
                )

    def _only_of_proofs(self) -> Iterator[Problem]:
        for name, option in described(ParityOptions).items():
            if not option.hidden and getattr(self.parity, name) is not None:
                yield Problem(name, f"`{name}` has no effect without `verify`", "texts and limits only of a proof")

    @property
    def arithmetic(self) -> Arithmetic:
        """What the precision does to the numbers of the model."""
        return PRECISIONS[self.precision]

    @property
    def coded_cache(self) -> bool:
        """Whether graphs with kvx's own operators keep their cache in codes."""
        return self.cache_precision is not None

    @property
    def operators(self) -> Lowering:
        """The lowering: the one that was chosen, or else the default of the precision."""
        return self.lowering or self.arithmetic.lowerings[0]

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write."""
        if self.format in FORMATS:
            return (self.format,)
        return ("onnx",) if self.arithmetic.reduced or self.operators == "cuda" else FORMATS

    def features(self, layers: int, *, forced: int = 0) -> StepFeatures:
        """What the step has beyond the contract's core, in a model with this number of decoder layers, whose targets
        begin with this many tokens that are not chosen.

        Raises OptionError.
        """
        layer = layers - 1 if self.attention_layer is None else self.attention_layer
        if layer >= layers:
            raise OptionError(
                f"`attention_layer` is {layer}",
                expected=f"0 to {layers - 1}, the model's decoder layers",
                remedy="Correct it, or leave it out for the last layer.",
                option="attention_layer",
            )
        presents = self.operators == "ort" and "onnx" in self.formats
        return StepFeatures(
            source_presents=presents,
            attention=layer if self.attention else None,
            forced=forced,
            cache_bits=8 if self.coded_cache else None,
        )

    @property
    def folder(self) -> Path:
        """The bundle's folder. A checkpoint that is a link is named for where the link is: a hub's own are hashes."""
        if self.output is not None:
            return self.output
        path = Path(os.path.normpath(self.checkpoint.absolute()))
        name = _model_name(path if path.is_dir() else path.parent)
        return Path("artifacts") / (f"{name}-{self.precision}" if self.arithmetic.reduced else name)

    def tokenizer_path(self, name: str, chosen: Path | None) -> Path:
        """Where a tokenizer is: the chosen path, or the file of this name beside the checkpoint."""
        return chosen or self.checkpoint.parent / name


def _model_name(folder: Path) -> str:
    """The name of the model in a folder, also in a hub's cache, whose folders of snapshots are named for commits."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
