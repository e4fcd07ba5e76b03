"""A checkpoint and its tokenizers → a proven bundle, whole or not at all: the order of things."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import kvx
from kvx.exporter.folder import check_output, whole_or_nothing
from kvx.exporter.graphs import check_own, write_graphs
from kvx.exporter.lowerings.standard import OPSET
from kvx.exporter.options import ExportOptions
from kvx.exporter.precision.calibrate import calibrate
from kvx.exporter.progress import Progress
from kvx.exporter.proof.bundle import prove_bundle, read_sources, read_verification
from kvx.exporter.proof.report import Check, ParityReport
from kvx.exporter.reading import check_tokenizers, read_checkpoint, write_tokenizers
from kvx.models.importers import Checkpoint, save_checkpoint
from kvx.models.importers.text import Text
from kvx.runtime import kernels
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
from kvx.runtime.bundle.graphs import OWN_STEP_FILE
from kvx.runtime.bundle.manifest import FileEntry, Manifest, TokenizerEntry
from kvx.runtime.bundle.signature import StepFeatures, cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.errors import ParityError


def export(options: ExportOptions, progress: Progress | None = None) -> Manifest:
    """Writes the bundle that `options` describe and returns its manifest; `progress` hears of each phase.

    Raises ParityError where the proof fails, and CheckpointError, TokenizerError, OptionError or InputError for bad
    input; the folder is then as it was.
    """
    progress = progress or Progress()
    check_output(options.folder, options.checkpoint, force=options.force)
    progress.phase("reading the checkpoint")
    checkpoint, text = read_checkpoint(options, progress)
    features = options.features(checkpoint.model.config.decoder_layers, forced=len(text.framing.forced))
    check_own(checkpoint.model, options)
    with whole_or_nothing(options.folder, force=options.force) as folder:
        tokenizers = write_tokenizers(folder, text)
        manifest = _describe(options, checkpoint, text, tokenizers, features)
        bundle = Bundle(folder, replace(manifest, files=_entries(folder)))
        check_tokenizers(bundle)
        lines = read_verification(bundle, options.parity)
        if options.calibration is not None:
            progress.phase("calibrating")
            _calibrate(bundle, checkpoint, options.calibration)
        write_graphs(folder, options, checkpoint.model, manifest.framing, features, progress)
        if len(options.formats) > 1:
            save_checkpoint(checkpoint, folder / CHECKPOINT_FILE)
        files = _entries(folder)
        manifest = replace(manifest, files=files, operators=kernels.VERSION if OWN_STEP_FILE in files else None)
        if options.verify:
            checks = prove_bundle(Bundle(folder, manifest), checkpoint.model, options.parity, lines, progress)
            parity = _require_parity(checks, options.parity.limits(options.precision).tolerance)
            manifest = replace(manifest, parity=parity.to_dict())
        manifest.write(folder)
        progress.phase(f"writing {options.folder}")
    return manifest


def _describe(
    options: ExportOptions,
    checkpoint: Checkpoint,
    text: Text,
    tokenizers: Mapping[str, TokenizerEntry],
    features: StepFeatures,
) -> Manifest:
    """The manifest of a bundle without graphs yet, and not proven yet."""
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        kvx_version=kvx.__version__,
        model=checkpoint.model.config.to_dict(),
        precision=options.precision,
        lowering=options.operators,
        features=features,
        opset=OPSET,
        max_new_tokens=checkpoint.max_new_tokens,
        family=checkpoint.family,
        framing=text.framing,
        languages=text.languages,
        tokenizers=tokenizers,
        defaults=checkpoint.defaults,
        files={},
        parity=None,
        product_bits=None if options.arithmetic.step is None else options.arithmetic.step.products,
    )


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {path.name: FileEntry.of(path) for path in sorted(folder.iterdir())}


def _calibrate(bundle: Bundle, checkpoint: Checkpoint, text: Path) -> None:
    plan = Plan.of(bundle.manifest, cache_specs(bundle.manifest.dimensions))
    calibrate(checkpoint.model, list(read_sources(bundle, text)), plan)


def _require_parity(checks: Iterable[Check], tolerance: float) -> ParityReport:
    report = ParityReport(tolerance, tuple(checks))
    failed = [f"{check.backend}, {check.name}: {check.detail}" for check in report.checks if not check.passed]
    if failed:
        raise ParityError(
            f"The export differs from eager PyTorch ({'; '.join(failed)})",
            expected=f"differences within the tolerance {tolerance:g} and the other limits",
            remedy="Nothing was written. Please report the model's configuration, or raise the limits knowingly.",
        )
    return report
