"""A checkpoint and its tokenizers → a proven bundle, whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import numpy as np

import kvx
from kvx.exporter.lowerings.beams import OrtBeamOperators, StandardBeamOperators
from kvx.exporter.lowerings.cuda import CudaOperators
from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.lowerings.standard import OPSET, StandardOperators
from kvx.exporter.precision.calibrate import calibrate
from kvx.exporter.precision.halves import in_precision
from kvx.exporter.precision.quantize import ENCODER_WIDTHS, STEP_WIDTHS
from kvx.exporter.progress import Report
from kvx.exporter.proof.bundle import prove_bundle, read_sources, read_verification, without_effect
from kvx.exporter.proof.trial import Check, ParityOptions, ParityReport
from kvx.exporter.writing.graphs import EncoderGraph, ShortlistGraph, StepGraph
from kvx.exporter.writing.loop import LoopGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.exporter.writing.torchscript import write_torchscript
from kvx.models.importers.reference import Checkpoint, load_checkpoint, save_checkpoint
from kvx.models.operators import Operators
from kvx.models.transformer import Transformer
from kvx.runtime.backends import onnx, torchscript
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE, Bundle
from kvx.runtime.bundle.manifest import (
    BEAMS_FILE,
    CHUNK_FILE,
    ELEMENTS,
    LOOP_FILE,
    PROJECTION_FILE,
    SHORTLIST_FILE,
    FileEntry,
    Manifest,
    Precision,
    SpecialIds,
)
from kvx.runtime.bundle.signature import CHUNK_FEATURES, StepFeatures, cache_specs
from kvx.runtime.decoding.plan import Plan, check_limit
from kvx.runtime.errors import BundleError, OptionError, ParityError, TokenizerError
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.text.tokenizers.sentencepiece import Tokenizer

Format = Literal["onnx", "torchscript", "both"]
Lowering = Literal["ort", "standard", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export, and where to.

    `checkpoint`: the file. `output`: the bundle's folder (default artifacts/<name of the checkpoint's folder>).
    `source_tokenizer`, `target_tokenizer`: sentencepiece models (default: source.model and target.model beside the
    checkpoint). `heads`: the head count of a bare state dict. `format`: what to write; "both" also writes model.pt
    (default: both, and onnx with fewer bits or for CUDA). `lowering`: the operators of the ONNX graphs, "ort" for ONNX
    Runtime's own, "standard" for ai.onnx alone, "cuda" for those that a captured CUDA graph may hold (default: cuda
    with fp16 and bf16, else ort). `precision`: that of the weights. `calibration`: text on which the scales of bytes
    are fixed; without it every row has its own. `max_new_tokens`: the bundle's default limit. `verify`: whether to
    prove the export, also on the lines of `verify_text` and against their translations in `verify_reference`. `loop`:
    whether to write the graph that feeds itself with any lowering, not with "cuda" alone. `force`: replace an existing
    bundle. `attention`: steps also give the attention to the source of a decoder layer, the `attention_layer` counted
    from 0 (default: the last). `shortlist`: also write what translating with a shortlist needs. Raises OptionError for
    what does not go together.
    """

    checkpoint: Path
    output: Path | None = None
    source_tokenizer: Path | None = None
    target_tokenizer: Path | None = None
    heads: int | None = None
    format: Format | None = None
    lowering: Lowering | None = None
    precision: Precision = "fp32"
    calibration: Path | None = None
    max_new_tokens: int | None = None
    verify: bool = True
    verify_text: Path | None = None
    verify_reference: Path | None = None
    parity: ParityOptions = field(default_factory=ParityOptions)
    loop: bool = False
    force: bool = False
    attention: bool = False
    attention_layer: int | None = None
    shortlist: bool = False

    def __post_init__(self) -> None:
        refuse(Problem("", *one) for one in [*self._unknown(), *self._contradictions(), *self._without_effect()])

    def _unknown(self) -> Iterator[tuple[str, str]]:
        known = {"lowering": get_args(Lowering), "precision": get_args(Precision), "format": get_args(Format)}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices and (value is not None or name == "precision"):
                yield f"--{name} {value}", f"--{name} {', '.join(choices[:-1])} or {choices[-1]}"

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.quantized and self.operators != "ort":
            yield f"--precision {self.precision} with --lowering {self.operators}", "int8 and int4 with ort alone"
        if self.precision == "bf16" and self.operators != "cuda":
            yield f"--precision bf16 with --lowering {self.operators}", "bf16 with cuda, whose kernels alone have it"
        if self.reduced and self.format not in (None, "onnx"):
            yield f"--precision {self.precision} with --format {self.format}", "fewer bits with the onnx format"
        elif self.lowering == "cuda" and self.format == "both":
            yield "--lowering cuda with --format both", "cuda with the onnx format"
        if self.shortlist and "onnx" not in self.formats:
            yield f"--with-shortlist with --format {self.format}", "a shortlist with the onnx format"
        if self.attention and self.attention_layer is not None and self.attention_layer < 0:
            yield f"--attention-layer {self.attention_layer}", "a layer from 0 up"

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        if self.calibration is not None and not self.quantized:
            yield f"--calibration with --precision {self.precision}", "--calibration only with int8 or int4"
        if self.attention_layer is not None and not self.attention:
            yield (
                f"--attention-layer {self.attention_layer} without --with-attention",
                "--attention-layer only with --with-attention",
            )
        if "onnx" not in self.formats and not self.reduced:
            if self.lowering is not None:
                yield f"--lowering {self.lowering} with --format {self.format}", "--lowering with the onnx format"
            if self.loop:
                yield f"loop with --format {self.format}", "loop with the onnx format"
        if self.verify:
            yield from without_effect(self.precision, self.parity, self.verify_text, self.verify_reference)
            return
        of_proofs = {
            "--verify-text": self.verify_text,
            "--verify-reference": self.verify_reference,
            "--tolerance": self.parity.tolerance,
            "--equal-lines": self.parity.equal_lines,
            "--bleu-lost": self.parity.bleu_lost,
        }
        for name, value in of_proofs.items():
            if value is not None:
                yield f"{name} with --no-verify", "texts and limits only of a proof"

    @property
    def operators(self) -> Lowering:
        """The lowering, as given or as the precision has it by default."""
        return self.lowering or ("cuda" if self.precision in ELEMENTS else "ort")

    @property
    def quantized(self) -> bool:
        """Whether weights become codes of 8 or 4 bits."""
        return self.reduced and self.precision not in ELEMENTS

    @property
    def reduced(self) -> bool:
        """Whether anything has fewer bits than in the checkpoint."""
        return self.precision != "fp32"

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write."""
        if self.format in ("onnx", "torchscript"):
            return (self.format,)
        return ("onnx",) if self.reduced or self.operators == "cuda" else ("onnx", "torchscript")

    def features(self, layers: int) -> StepFeatures:
        """What the step of a model with so many decoder layers has beyond the contract's core. Raises OptionError."""
        layer = layers - 1 if self.attention_layer is None else self.attention_layer
        if layer >= layers:
            raise OptionError(
                f"--attention-layer {layer}",
                expected=f"0 to {layers - 1}, the model's decoder layers",
                remedy="Correct it, or leave it out for the last.",
            )
        presents = self.operators == "ort" and "onnx" in self.formats
        return StepFeatures(source_presents=presents, attention=layer if self.attention else None)

    @property
    def folder(self) -> Path:
        """The bundle's folder."""
        return self.output or Path("artifacts") / self.checkpoint.resolve().parent.name

    def tokenizer_path(self, name: str, given: Path | None) -> Path:
        """Where a tokenizer is: as given, or beside the checkpoint."""
        return given or self.checkpoint.parent / name


def export(options: ExportOptions, report: Report | None = None) -> Manifest:
    """Writes the bundle that `options` describe and returns its manifest; `report` hears of each phase.

    Raises ParityError where the proof fails, and CheckpointError, TokenizerError, OptionError or InputError for bad
    input; the folder is then as it was.
    """
    _check_output(options)
    report = report or Report()
    report.phase("reading the checkpoint")
    checkpoint = load_checkpoint(options.checkpoint, heads=options.heads)
    if options.heads not in (None, checkpoint.model.config.heads):
        raise OptionError(
            f"--heads {options.heads}",
            expected=f"the checkpoint's own {checkpoint.model.config.heads}",
            remedy="Leave it out.",
        )
    for note in checkpoint.notes:
        report.note(note)
    tokenizers = _load_tokenizers(options, checkpoint)
    checkpoint = _with_limit(checkpoint, options.max_new_tokens)
    features = options.features(checkpoint.model.config.decoder_layers)
    with _whole_or_nothing(options.folder, replace_bundle=options.force) as folder:
        _copy_tokenizers(folder, options)
        bundle = Bundle(folder, _describe(folder, options, checkpoint, tokenizers, features))
        text = read_verification(bundle, options.verify_text, options.verify_reference)
        if options.calibration is not None:
            report.phase("calibrating")
            _calibrate(bundle, checkpoint, options.calibration)
        _write_graphs(folder, options, checkpoint, tokenizers[1].special_ids, features, report)
        manifest = _describe(folder, options, checkpoint, tokenizers, features)
        manifest.write(folder)
        if options.verify:
            checks = prove_bundle(Bundle(folder, manifest), checkpoint.model, options.parity, text, report)
            parity = _require_parity(checks, options.parity.limits(options.precision).tolerance)
            manifest = replace(manifest, parity=parity.to_dict())
            manifest.write(folder)
        report.phase(f"writing {options.folder}")
    return manifest


def _check_output(options: ExportOptions) -> None:
    """Refuses, before any work, an output that must not be replaced."""
    folder, checkpoint = options.folder, options.checkpoint.resolve()
    if not folder.exists() and not folder.is_symlink():
        return
    if checkpoint.is_relative_to(folder.resolve()):
        remedy = "Name another folder with --output: this one holds the checkpoint."
    elif folder.is_symlink() or not _is_bundle(folder):
        remedy = "Name another folder with --output: this one is no bundle, so it is never replaced."
    elif not options.force:
        remedy = "Replace it with --force, or name another folder with --output."
    else:
        return
    raise OptionError(f"output {folder}, which exists", expected="a new folder", remedy=remedy)


def _is_bundle(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except BundleError:
        return False
    return True


def _load_tokenizers(options: ExportOptions, checkpoint: Checkpoint) -> tuple[Tokenizer, Tokenizer]:
    config = checkpoint.model.config
    loaded = []
    for name, given, size in (
        (SOURCE_TOKENIZER_FILE, options.source_tokenizer, config.source_vocab_size),
        (TARGET_TOKENIZER_FILE, options.target_tokenizer, config.target_vocab_size),
    ):
        path = options.tokenizer_path(name, given)
        tokenizer = Tokenizer(path)
        if len(tokenizer) != size:
            raise TokenizerError(
                f"{path} with {len(tokenizer)} pieces",
                expected=f"{size}, the rows of the model's embedding",
                remedy="Name the tokenizer that the model was trained with.",
            )
        loaded.append(tokenizer)
    return loaded[0], loaded[1]


def _with_limit(checkpoint: Checkpoint, limit: int | None) -> Checkpoint:
    limit = checkpoint.max_new_tokens if limit is None else limit
    check_limit(limit, checkpoint.model.config.target_positions)
    return replace(checkpoint, max_new_tokens=limit)


def _copy_tokenizers(folder: Path, options: ExportOptions) -> None:
    for name, given in (
        (SOURCE_TOKENIZER_FILE, options.source_tokenizer),
        (TARGET_TOKENIZER_FILE, options.target_tokenizer),
    ):
        shutil.copyfile(options.tokenizer_path(name, given), folder / name)


def _calibrate(bundle: Bundle, checkpoint: Checkpoint, text: Path) -> None:
    plan = Plan.of(bundle.manifest, cache_specs(bundle.manifest.dimensions))
    calibrate(checkpoint.model, list(read_sources(bundle, text)), plan)


def _write_graphs(
    folder: Path,
    options: ExportOptions,
    checkpoint: Checkpoint,
    target_ids: SpecialIds,
    features: StepFeatures,
    report: Report,
) -> None:
    model = checkpoint.model
    if "onnx" in options.formats:
        _write_onnx_graphs(folder, options, in_precision(model, options.precision), target_ids, features, report)
    if "torchscript" in options.formats:
        report.phase("tracing TorchScript")
        write_torchscript(EncoderGraph(model), folder / torchscript.ENCODER_FILE)
        write_torchscript(StepGraph(model, features=features), folder / torchscript.STEP_FILE)
    if len(options.formats) > 1:
        save_checkpoint(checkpoint, folder / CHECKPOINT_FILE)


class Lowered(NamedTuple):
    """A lowering's operators for the encoder and the step, for several rows a sentence, and for the loop."""

    step: Operators
    beams: Operators
    loop: Operators

    @classmethod
    def of(cls, lowering: Lowering, model: Transformer) -> Self:
        """Of float32 the CUDA provider has no fused attention: there its lowering is the standard one."""
        if lowering == "standard" or (lowering == "cuda" and model.element == "float32"):
            return cls(StandardOperators(), StandardBeamOperators(), StandardOperators())
        step = OrtOperators(model) if lowering == "ort" else CudaOperators(model)
        return cls(step, OrtBeamOperators(model), CudaOperators(model))


def _write_onnx_graphs(
    folder: Path,
    options: ExportOptions,
    model: Transformer,
    target_ids: SpecialIds,
    features: StepFeatures,
    report: Report,
) -> None:
    lowered = Lowered.of(options.operators, model)
    report.phase("exporting the encoder to ONNX")
    write_onnx(
        EncoderGraph(model, lowered.step), folder / onnx.ENCODER_FILE, widths=ENCODER_WIDTHS.get(options.precision)
    )
    widths, step = STEP_WIDTHS.get(options.precision), folder / onnx.STEP_FILE
    report.phase("exporting the decoder step to ONNX")
    write_onnx(StepGraph(model, lowered.step, features), step, widths=widths)
    report.phase("exporting the decoder for several tokens at once to ONNX")
    write_onnx(StepGraph(model, lowered.step, CHUNK_FEATURES), folder / CHUNK_FILE, widths=widths, weights_of=step)
    report.phase("exporting the decoder for several rows a sentence to ONNX")
    beams = StepGraph(model, lowered.beams, features.beams)
    write_onnx(beams, folder / BEAMS_FILE, widths=widths, weights_of=step)
    if options.shortlist:
        report.phase("exporting the decoder for a part of the vocabulary to ONNX")
        shortlisted = ShortlistGraph(model, lowered.beams, features.shortlisted)
        write_onnx(shortlisted, folder / SHORTLIST_FILE, widths=widths, weights_of=step)
        np.save(folder / PROJECTION_FILE, model.head.weight.detach().numpy(), allow_pickle=False)
    if options.loop or options.operators == "cuda":
        report.phase("exporting the decoder that feeds itself to ONNX")
        loop = LoopGraph(model, target_ids, lowered.loop)
        write_onnx(loop, folder / LOOP_FILE, widths=widths, weights_of=step)


def _describe(
    folder: Path,
    options: ExportOptions,
    checkpoint: Checkpoint,
    tokenizers: tuple[Tokenizer, Tokenizer],
    features: StepFeatures,
) -> Manifest:
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        kvx_version=kvx.__version__,
        model=checkpoint.model.config.to_dict(),
        precision=options.precision,
        lowering=options.operators,
        features=features,
        opset=OPSET,
        max_new_tokens=checkpoint.max_new_tokens,
        source_ids=tokenizers[0].special_ids,
        target_ids=tokenizers[1].special_ids,
        files={path.name: FileEntry.of(path) for path in sorted(folder.iterdir())},
        parity=None,
    )


def _require_parity(checks: Iterable[Check], tolerance: float) -> ParityReport:
    report = ParityReport(tolerance, tuple(checks))
    failed = [f"{check.backend}, {check.name}: {check.detail}" for check in report.checks if not check.passed]
    if failed:
        raise ParityError(
            f"an export that differs from eager PyTorch ({'; '.join(failed)})",
            expected=f"differences within the tolerance {tolerance:g} and the other limits",
            remedy="Nothing was written. Please report the model's configuration, or raise the limits knowingly.",
        )
    return report


@contextlib.contextmanager
def _whole_or_nothing(folder: Path, *, replace_bundle: bool) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place at the end, or vanishes."""
    folder = folder.absolute()
    partial, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{what}") for what in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OptionError(
            f"output {folder}, which cannot be made ({error.strerror})",
            expected="a folder that may be written",
            remedy="Name another with --output.",
        ) from None
    try:
        yield partial
        if folder.exists() and not (replace_bundle and _is_bundle(folder)):
            raise OptionError(
                f"output {folder}, which has appeared meanwhile", expected="a new folder", remedy="Export again."
            )
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
