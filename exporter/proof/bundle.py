"""The proof of a whole bundle, at its export and at any time after."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import torch

from kvx.exporter.precision.halves import widen
from kvx.exporter.progress import Report
from kvx.exporter.proof.loop import check_loop
from kvx.exporter.proof.quality import VerificationText, prove_reduced
from kvx.exporter.proof.trial import Check, ExportedGraphs, ParityOptions, ParityReport, Trial, prove
from kvx.models.importers.reference import load_checkpoint
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.backends.torchscript import TorchScriptBackend
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
from kvx.runtime.bundle.manifest import LOOP_FILE, PROJECTION_FILE, Manifest, Precision
from kvx.runtime.bundle.signature import cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.errors import BundleError, InputError
from kvx.runtime.measuring.evaluation import ParallelText
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.text.lines import open_lines, read_lines
from kvx.runtime.text.sources import SourceReader, load_tokenizer


def verify(
    folder: Path,
    checkpoint: Path,
    options: ParityOptions,
    verify_text: Path | None = None,
    verify_reference: Path | None = None,
    report: Report | None = None,
) -> ParityReport:
    """Proves an existing bundle against a checkpoint once more: files, configuration, graphs, translations.

    Raises BundleError or CheckpointError where one of them cannot be opened at all, OptionError for what would judge
    nothing; a difference is in the report.
    """
    report = report or Report()
    manifest = Manifest.read(folder)
    refuse(
        Problem("", *one) for one in list(without_effect(manifest.precision, options, verify_text, verify_reference))
    )
    report.phase("comparing the files with their hashes")
    checks = [_check_files(folder)]
    if checks[-1].passed:
        report.phase("reading the checkpoint")
        model = load_checkpoint(checkpoint, heads=manifest.model["heads"]).model
        checks.append(_check_model(Bundle(folder, manifest), model))
        if checks[-1].passed:
            bundle = Bundle(folder, manifest)
            text = read_verification(bundle, verify_text, verify_reference)
            checks += prove_bundle(bundle, model, options, text, report)
    return ParityReport(options.limits(manifest.precision).tolerance, tuple(checks))


def without_effect(
    precision: Precision, options: ParityOptions, text: Path | None, reference: Path | None
) -> Iterator[tuple[str, str]]:
    """What of a proof's limits and files there is nothing for, and what they need."""
    need = "only with fewer bits and --verify-text"
    missing = [
        *(["without --verify-text"] if text is None else []),
        *(["with --precision fp32"] if precision == "fp32" else []),
    ]
    if missing and reference is not None:
        yield f"--verify-reference {' and '.join(missing)}", f"--verify-reference {need}"
    if missing and options.equal_lines is not None:
        yield f"--equal-lines {' and '.join(missing)}", f"--equal-lines {need}"
    if options.bleu_lost is not None and reference is None:
        yield "--bleu-lost without --verify-reference", "--bleu-lost only with --verify-reference"


def prove_bundle(
    bundle: Bundle, model: Transformer, options: ParityOptions, text: VerificationText | None, report: Report
) -> Iterator[Check]:
    """Every format of the bundle, run by the very backends that its users will run, also on the lines of a text."""
    precision = bundle.manifest.precision
    plan = Plan.of(bundle.manifest, cache_specs(bundle.manifest.dimensions))
    if "onnx" in bundle.manifest.formats:
        report.phase("checking the ONNX files")
        yield _check_onnx(bundle)
    with _runnable(bundle) as runnable:
        for name in bundle.manifest.formats:
            try:
                graphs = _open_graphs(runnable, name)
            except BundleError as error:
                yield Check(name, "contract", False, str(error))
                continue
            widened = "" if runnable is bundle else "; bfloat16 is proven as float32, for want of kernels on a CPU"
            yield Check(name, "contract", True, f"names, types and axes as the manifest gives them{widened}")
            report.phase(f"proving {name} against eager PyTorch")
            if precision == "fp32":
                yield from prove(model, graphs, plan, options, text.sources if text else ())
            else:
                yield from prove_reduced(model, graphs, plan, options, precision, text)
            if name == "onnx" and LOOP_FILE in bundle.manifest.files:
                report.phase("proving the decoder that feeds itself")
                trial = Trial(model, options, options.limits(precision).tolerance)
                yield check_loop(trial, graphs, runnable.folder, plan)


@contextlib.contextmanager
def _runnable(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, or what of it ONNX Runtime can run on a CPU."""
    if bundle.manifest.precision != "bf16":
        yield bundle
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in bundle.folder.glob("*.onnx"):
            widen(file, Path(folder) / file.name)
        if PROJECTION_FILE in bundle.manifest.files:
            shutil.copyfile(bundle.folder / PROJECTION_FILE, Path(folder) / PROJECTION_FILE)
        yield Bundle(Path(folder), replace(bundle.manifest, precision="fp32"))


def _open_graphs(bundle: Bundle, name: str) -> ExportedGraphs:
    arguments = bundle.folder, bundle.manifest.dimensions, bundle.manifest.features
    if name == "torchscript":
        return TorchScriptBackend(*arguments)
    backend = OnnxBackend(*arguments)
    backend.load()
    return backend


def _check_files(folder: Path) -> Check:
    try:
        Bundle.open(folder).check_hashes()
    except BundleError as error:
        return Check("files", "sizes and sha256", False, str(error))
    return Check("files", "sizes and sha256", True, "as the manifest gives them")


def _check_model(bundle: Bundle, model: Transformer) -> Check:
    """The configuration, and where the bundle has its own checkpoint every weight of it, to the last bit."""
    expected, got = model.config.to_dict(), dict(bundle.manifest.model)
    differing = [name for name in expected if got.get(name) != expected[name]]
    if not differing and CHECKPOINT_FILE in bundle.manifest.files:
        own = load_checkpoint(bundle.folder / CHECKPOINT_FILE).model.state_dict()
        weights = model.state_dict()
        names = sorted(own.keys() | weights)
        differing = [name for name in names if not _equal(own.get(name), weights.get(name))]
    detail = f"differing in {', '.join(differing[:10])}" if differing else "those of the checkpoint"
    return Check("model", "configuration and weights", not differing, detail)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _check_onnx(bundle: Bundle) -> Check:
    try:
        for name in (name for name in bundle.manifest.files if name.endswith(".onnx")):
            onnx.checker.check_model(bundle.folder / name, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check("onnx", "ONNX checker", False, str(error))
    return Check("onnx", "ONNX checker", True, "valid, shapes inferred")


def read_verification(bundle: Bundle, text: Path | None, reference: Path | None) -> VerificationText | None:
    """The verification text, if there is one, with its references, if there are any.

    Raises InputError where the files do not belong together.
    """
    if text is None:
        return None
    references: list[str] = []
    if reference is not None:
        with open_lines(text) as sources, open_lines(reference) as targets:
            test_set = ParallelText(tuple(read_lines(sources)), tuple(read_lines(targets)))
        read = SourceReader(bundle).read(test_set.sources)
        references = [line for source, line in zip(read, test_set.references, strict=True) if source.ids]
    tokenizer = load_tokenizer(bundle, "target")
    eos = bundle.manifest.target_ids.eos
    return VerificationText(
        list(read_sources(bundle, text)), references, lambda ids: tokenizer.decode(ids[:-1] if ids[-1] == eos else ids)
    )


def read_sources(bundle: Bundle, path: Path) -> Iterator[tuple[int, ...]]:
    """The ids of a file's lines, the empty ones left out. Raises InputError where none is left."""
    empty = True
    with open_lines(path) as stream:
        for text in SourceReader(bundle).read(read_lines(stream)):
            if text.ids:
                empty = False
                yield text.ids
    if empty:
        raise InputError(f"{path} without a text", expected="at least one line of text", remedy="Check the file.")
