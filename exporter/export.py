"""A checkpoint and its tokenizers → a proven bundle, whole or not at all: the order of things."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import kvx
from kvx.exporter.folder import check_output, whole_or_nothing
from kvx.exporter.graphs import write_graphs
from kvx.exporter.lowerings.standard import OPSET
from kvx.exporter.options import ExportOptions
from kvx.exporter.precision.calibrate import calibrate
from kvx.exporter.progress import Progress
from kvx.exporter.proof.bundle import prove_bundle, read_sources, read_verification
from kvx.exporter.proof.report import Check, ParityReport
from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE, Bundle
from kvx.runtime.bundle.manifest import FileEntry, Manifest
from kvx.runtime.bundle.signature import StepFeatures, cache_specs
from kvx.runtime.decoding.plan import Plan, check_limit
from kvx.runtime.errors import OptionError, ParityError, TokenizerError
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece


def export(options: ExportOptions, progress: Progress | None = None) -> Manifest:
    """Writes the bundle that `options` describe and returns its manifest; `progress` hears of each phase.

    Raises ParityError where the proof fails, and CheckpointError, TokenizerError, OptionError or InputError for bad
    input; the folder is then as it was.
    """
    progress = progress or Progress()
    check_output(options.folder, options.checkpoint, force=options.force)
    progress.phase("reading the checkpoint")
    checkpoint = _read_checkpoint(options, progress)
    tokenizers = _load_tokenizers(options, checkpoint)
    features = options.features(checkpoint.model.config.decoder_layers)
    manifest = _describe(options, checkpoint, tokenizers, features)
    with whole_or_nothing(options.folder, force=options.force) as folder:
        _copy_tokenizers(folder, options)
        bundle = Bundle(folder, replace(manifest, files=_entries(folder)))
        text = read_verification(bundle, options.parity)
        if options.calibration is not None:
            progress.phase("calibrating")
            _calibrate(bundle, checkpoint, options.calibration)
        write_graphs(folder, options, checkpoint.model, manifest.target_ids, features, progress)
        if len(options.formats) > 1:
            save_checkpoint(checkpoint, folder / CHECKPOINT_FILE)
        manifest = replace(manifest, files=_entries(folder))
        if options.verify:
            checks = prove_bundle(Bundle(folder, manifest), checkpoint.model, options.parity, text, progress)
            parity = _require_parity(checks, options.parity.limits(options.precision).tolerance)
            manifest = replace(manifest, parity=parity.to_dict())
        manifest.write(folder)
        progress.phase(f"writing {options.folder}")
    return manifest


def _read_checkpoint(options: ExportOptions, progress: Progress) -> Checkpoint:
    """The checkpoint with the limit that the bundle shall have."""
    checkpoint = load_checkpoint(options.checkpoint, heads=options.heads)
    config = checkpoint.model.config
    if options.heads not in (None, config.heads):
        raise OptionError(
            f"`heads` is {options.heads}",
            expected=f"the checkpoint's own {config.heads}",
            remedy="Leave it out.",
            option="heads",
        )
    for note in checkpoint.notes:
        progress.note(note)
    limit = checkpoint.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    check_limit(limit, config.target_positions)
    return replace(checkpoint, max_new_tokens=limit)


def _load_tokenizers(options: ExportOptions, checkpoint: Checkpoint) -> tuple[SentencePiece, SentencePiece]:
    config = checkpoint.model.config
    loaded = []
    for name, chosen, size, option in (
        (SOURCE_TOKENIZER_FILE, options.source_tokenizer, config.source_vocab_size, "source_tokenizer"),
        (TARGET_TOKENIZER_FILE, options.target_tokenizer, config.target_vocab_size, "target_tokenizer"),
    ):
        path = options.tokenizer_path(name, chosen)
        tokenizer = SentencePiece(path)
        if len(tokenizer) != size:
            raise TokenizerError(
                f"{path} has {len(tokenizer)} pieces",
                expected=f"{size}, the rows of the model's embedding",
                remedy=f"Name the tokenizer that the model was trained with (`{option}`).",
                option=option,
            )
        loaded.append(tokenizer)
    return loaded[0], loaded[1]


def _copy_tokenizers(folder: Path, options: ExportOptions) -> None:
    for name, chosen in (
        (SOURCE_TOKENIZER_FILE, options.source_tokenizer),
        (TARGET_TOKENIZER_FILE, options.target_tokenizer),
    ):
        shutil.copyfile(options.tokenizer_path(name, chosen), folder / name)


def _describe(
    options: ExportOptions,
    checkpoint: Checkpoint,
    tokenizers: tuple[SentencePiece, SentencePiece],
    features: StepFeatures,
) -> Manifest:
    """The manifest of a bundle without files yet, and not proven yet."""
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
        files={},
        parity=None,
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
