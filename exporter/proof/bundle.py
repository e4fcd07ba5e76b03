"""The proof of a whole bundle, at its export and at any time after."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import torch

from kvx.exporter.precision.halves import widen
from kvx.exporter.progress import Progress
from kvx.exporter.proof.checks import OWN_CHECKS, Case, prove
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.quality import VerificationText
from kvx.exporter.proof.report import Check, ParityReport
from kvx.exporter.proof.trial import ExportedGraphs, is_large
from kvx.models.importers import load_checkpoint
from kvx.models.importers.padding import cut_to_vocabularies
from kvx.models.transformer import Transformer
from kvx.runtime import kernels
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.backends.torchscript import TorchScriptBackend
from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
from kvx.runtime.bundle.graphs import GRAPHS, OWN_STEP_FILE
from kvx.runtime.bundle.manifest import FileEntry, Manifest
from kvx.runtime.bundle.precision import PRECISIONS
from kvx.runtime.bundle.signature import cache_specs
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.errors import BundleError, InputError, OptionError
from kvx.runtime.measuring.evaluation import ParallelText
from kvx.runtime.rules import refuse
from kvx.runtime.system import available_threads
from kvx.runtime.text.lines import open_lines, read_lines
from kvx.runtime.text.sources import SourceReader, load_tokenizer

OWN = "onnx, own operators"  # what the report calls the graphs with kvx's own operators


def verify(folder: Path, checkpoint: Path, options: ParityOptions, progress: Progress | None = None) -> ParityReport:
    """Proves an existing bundle against a checkpoint once more: files, configuration, graphs, translations.

    A difference is in the report. Raises BundleError or CheckpointError where one of them cannot be opened at all, and
    OptionError for limits and files that would judge nothing.
    """
    progress = progress or Progress()
    manifest = Manifest.read(folder)
    refuse(options.without_effect(manifest.precision, coded_cache=manifest.features.cache_bits is not None))
    progress.phase("comparing the files with their hashes")
    checks = [_check_files(folder)]
    if checks[-1].passed:
        progress.phase("reading the checkpoint")
        bundle, model = Bundle(folder, manifest), _load_model(checkpoint, manifest)
        checks.append(_check_model(bundle, model))
        if checks[-1].passed:
            checks += prove_bundle(bundle, model, options, read_verification(bundle, options), progress)
    return ParityReport(options.limits(manifest.precision).tolerance, tuple(checks))


def _load_model(checkpoint: Path, manifest: Manifest) -> Transformer:
    """The model of a checkpoint, cut to the vocabularies as an export cuts it."""
    model = load_checkpoint(checkpoint, heads=manifest.model["decoder_heads"]).model
    sizes = (manifest.model[f"{side}_vocab_size"] for side in ("source", "target"))
    return cut_to_vocabularies(model, *sizes)[0]


def prove_bundle(
    bundle: Bundle, model: Transformer, options: ParityOptions, text: VerificationText | None, progress: Progress
) -> Iterator[Check]:
    """Every format of the bundle, run by the very backends that its users will run, also on the lines of a text."""
    manifest = bundle.manifest
    if is_large(model):
        torch.set_num_threads(available_threads())  # for a small one several would only wait for each other
    if "onnx" in bundle.formats:
        progress.phase("checking the ONNX files")
        with _readable(bundle) as folder:
            yield _check_onnx(bundle, folder)
    with _runnable(bundle) as runnable:
        for name in bundle.formats:
            try:
                graphs = _open_graphs(runnable, name, model)
            except BundleError as error:
                yield Check(name, "contract", False, str(error))
                continue
            yield Check(name, "contract", True, _as_described(manifest))
            progress.phase(f"proving {name} against eager PyTorch")
            case = Case(
                model,
                graphs,
                Plan.of(manifest, cache_specs(manifest.dimensions)),
                options,
                precision=manifest.precision,
                text=text,
                folder=runnable.folder,
                files=manifest.files,
            )
            yield from prove(case, progress)
            del graphs  # before others are loaded
            if name == "onnx" and OWN_STEP_FILE in manifest.files:
                yield from _prove_own(runnable, case, progress)
            del case


def _prove_own(bundle: Bundle, case: Case, progress: Progress) -> Iterator[Check]:
    """The graphs with kvx's own operators."""
    version = bundle.manifest.operators
    if not kernels.run(version):
        yield Check(OWN, "operators", True, f"neither proven nor used here: {kernels.lacking(version)}")
        return
    try:
        case.turn_to_own(partial(_load_onnx, bundle, case.model, own=True))
    except BundleError as error:
        yield Check(OWN, "operators", False, str(error))
        return
    yield Check(OWN, "operators", True, f"version {version}, with {kernels.instructions()}")
    progress.phase("proving kvx's own operators against eager PyTorch")
    yield from prove(case, progress, OWN_CHECKS)


def _as_described(manifest: Manifest) -> str:
    described, arithmetic = "names, types and axes as the manifest gives them", PRECISIONS[manifest.precision]
    if arithmetic.runs_on_cpu:
        return described
    return f"{described}; {arithmetic.element} is proven as float32, because a CPU has no kernels for it"


@contextlib.contextmanager
def _readable(bundle: Bundle) -> Iterator[Path]:
    """The folder of the graphs, or one with copies of them where they are links: the onnx package refuses to read
    weights from links, hard ones too, because they might lead out of the folder. The manifest's hashes say more.
    """
    names = [name for name in bundle.manifest.files if name.endswith((".onnx", ".data")) and name not in bundle.missing]
    if not any(_is_link(bundle.folder / name) for name in names):
        yield bundle.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            shutil.copyfile(bundle.folder / name, Path(folder) / name)
        yield Path(folder)


def _is_link(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


@contextlib.contextmanager
def _runnable(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, or a copy of its graphs that ONNX Runtime can run on a CPU."""
    if PRECISIONS[bundle.manifest.precision].runs_on_cpu:
        yield bundle
        return
    with _readable(bundle) as readable, tempfile.TemporaryDirectory() as folder:
        for name in (name for name in bundle.manifest.files if name.endswith(".onnx")):
            widen(readable / name, Path(folder) / name)
        for name in (name for graph in GRAPHS for name in graph.beside if name in bundle.manifest.files):
            shutil.copyfile(bundle.folder / name, Path(folder) / name)
        files = {path.name: FileEntry.of(path) for path in Path(folder).iterdir()}
        yield Bundle(Path(folder), replace(bundle.manifest, precision="fp32", files=files))


def _open_graphs(bundle: Bundle, name: str, model: Transformer) -> ExportedGraphs:
    if name == "torchscript":
        return TorchScriptBackend(bundle.files, bundle.manifest.dimensions, bundle.manifest.features)
    return _load_onnx(bundle, model, own=False)


def _load_onnx(bundle: Bundle, model: Transformer, *, own: bool) -> OnnxBackend:
    manifest = bundle.manifest
    backend = OnnxBackend(
        bundle.files, manifest.dimensions, manifest.features, own=own, product_bits=manifest.product_bits
    )
    backend.name = OWN if own else backend.name
    backend.load(kept=not is_large(model))
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
    differing = [name for name in expected if name in got and got[name] != expected[name]]
    if not differing and CHECKPOINT_FILE in bundle.manifest.files and CHECKPOINT_FILE not in bundle.missing:
        own = load_checkpoint(bundle.folder / CHECKPOINT_FILE).model.state_dict()
        weights = model.state_dict()
        names = sorted(own.keys() | weights)
        differing = [name for name in names if not _equal(own.get(name), weights.get(name))]
    detail = f"differing in {', '.join(differing[:10])}" if differing else "those of the checkpoint"
    return Check("model", "configuration and weights", not differing, detail)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _check_onnx(bundle: Bundle, folder: Path) -> Check:
    try:
        for name in (name for name in bundle.manifest.files if name.endswith(".onnx")):
            onnx.checker.check_model(folder / name, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check("onnx", "ONNX checker", False, str(error))
    return Check("onnx", "ONNX checker", True, "valid, shapes inferred")


def read_verification(bundle: Bundle, options: ParityOptions) -> VerificationText | None:
    """The verification text with its references, or None without one.

    Raises InputError where the files do not belong together.
    """
    text, reference = options.verify_text, options.verify_reference
    if text is None:
        return None
    references: list[str] = []
    _require_languages(bundle)
    if reference is not None:
        with open_lines(text) as sources, open_lines(reference) as targets:
            test_set = ParallelText(tuple(read_lines(sources)), tuple(read_lines(targets)))
        read = SourceReader(bundle).read(test_set.sources)
        references = [line for source, line in zip(read, test_set.references, strict=True) if source.ids]
    tokenizer = load_tokenizer(bundle, "target")
    eos = bundle.manifest.framing.eos
    return VerificationText(
        list(read_sources(bundle, text)), references, lambda ids: tokenizer.decode(ids[:-1] if ids[-1] == eos else ids)
    )


def _require_languages(bundle: Bundle) -> None:
    """Raises OptionError where nobody says which languages a text is in, and is translated to."""
    try:
        SourceReader(bundle).check_languages(None, None)
    except OptionError as error:
        option = f"default_{error.option}"
        raise OptionError(
            f"The model has many languages, and no `{option}` for the text",
            expected=error.expected,
            remedy="Set it when you export.",
            option=option,
        ) from None


def read_sources(bundle: Bundle, path: Path) -> Iterator[tuple[int, ...]]:
    """The ids of a file's lines without the empty ones. Raises InputError where none is left."""
    empty = True
    _require_languages(bundle)
    with open_lines(path) as stream:
        for text in SourceReader(bundle).read(read_lines(stream)):
            if text.ids:
                empty = False
                yield text.ids
    if empty:
        raise InputError(f"{path} holds no text", expected="at least one line of text", remedy="Check the file.")
