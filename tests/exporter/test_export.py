"""Exports appear whole or not at all, replace only what they may, and can be proven again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import sentencepiece
import torch

import kvx
from kvx import CheckpointError, InputError, KvxError, OptionError, TokenizerError
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions, Format
from kvx.exporter.progress import Progress
from kvx.exporter.proof.bundle import verify
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.report import ParityReport
from kvx.exporter.writing.graphs import StepGraph
from kvx.exporter.writing.torchscript import write_torchscript
from kvx.models.config import ModelConfig
from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint
from kvx.models.importers.reference import reference_name
from kvx.models.transformer import Transformer
from kvx.runtime import kernels
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest
from kvx.runtime.bundle.signature import StepFeatures

TOKENIZERS = {"source.model", "target.model"}
ONNX_FILES = {"encoder.onnx", "decoder_step.onnx"}
TORCHSCRIPT_FILES = {"encoder.ts", "decoder_step.ts"}
GRAPHS = ONNX_FILES | TORCHSCRIPT_FILES
SHARED = {"decoder_beams.onnx", "decoder_chunk.onnx", "decoder_step.onnx.data", "encoder.onnx.data"}
OWN = {"decoder_kernels.onnx"} if kernels.library() else set()  # with kvx's own operators, where they can be proven


@pytest.fixture
def options(tiny_checkpoint_folder: Path, tmp_path: Path) -> ExportOptions:
    """The quickest export there is."""
    return ExportOptions(
        checkpoint=tiny_checkpoint_folder / "model.pt", output=tmp_path / "bundle", format="torchscript", verify=False
    )


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a good bundle, to be spoilt."""
    return shutil.copytree(tiny_bundle, tmp_path / "copied")


def with_output(options: ExportOptions, output: Path, *, force: bool = True) -> ExportOptions:
    return dataclasses.replace(options, output=output, force=force)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "formats", "files"),
    [
        ("standard", ("onnx",), ONNX_FILES | SHARED),
        ("torchscript", ("torchscript",), TORCHSCRIPT_FILES),
        ("tiny", ("onnx", "torchscript"), GRAPHS | SHARED | OWN | {"model.pt"}),
    ],
)
def test_a_bundle_holds_the_files_of_its_format(
    options: ExportOptions, request: pytest.FixtureRequest, name: str, formats: tuple[str, ...], files: set[str]
) -> None:
    if name == "torchscript":
        assert export(options) == Manifest.read(options.folder)
    folder = options.folder if name == "torchscript" else request.getfixturevalue(f"{name}_bundle")
    manifest = Manifest.read(folder)
    assert contents(folder).keys() == files | TOKENIZERS | {MANIFEST_FILE}
    assert manifest.formats == formats
    assert (manifest.parity is None) == (name != "tiny")


def test_the_manifest_describes_every_other_file(tiny_bundle: Path) -> None:
    files = json.loads((tiny_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    expected = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents(tiny_bundle).items()
        if name != MANIFEST_FILE
    }
    assert files == expected


def test_the_manifest_says_when_it_was_created_in_utc(options: ExportOptions) -> None:
    before = datetime.datetime.now(datetime.UTC)
    created = datetime.datetime.fromisoformat(export(options).created)
    assert created.utcoffset() == datetime.timedelta(0)
    assert before <= created <= datetime.datetime.now(datetime.UTC)


def test_the_manifest_describes_the_graphs_as_they_are(tiny_bundle: Path) -> None:
    described = json.loads((tiny_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))["graphs"]
    types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
    for name in ("encoder", "decoder_step", "decoder_chunk", "decoder_beams"):
        graph = onnx.load(tiny_bundle / f"{name}.onnx").graph
        for side, values in (("inputs", graph.input), ("outputs", graph.output)):
            got = [
                {
                    "name": value.name,
                    "type": types[value.type.tensor_type.elem_type],
                    "axes": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
                }
                for value in values
            ]
            assert described[name][side] == got


def test_the_manifest_holds_the_model_the_limits_and_the_special_ids(tiny_bundle: Path, tiny: Transformer) -> None:
    values = json.loads((tiny_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    config = tiny.config
    assert values["model"] == config.to_dict()
    assert values["max_new_tokens"] == 18
    assert values["kvx_version"] == kvx.__version__
    assert (values["precision"], values["lowering"], values["opset"]) == ("fp32", "ort", 24)
    bytes_per_token = 2 * config.decoder_layers * config.d_model * 4
    assert values["limits"] == {
        "source_positions": config.source_positions,
        "target_positions": config.target_positions,
        "cache_bytes_per_source_token": bytes_per_token,
        "cache_bytes_per_target_token": bytes_per_token,
    }
    source, target = (
        sentencepiece.SentencePieceProcessor(model_file=str(tiny_bundle / f"{side}.model"))
        for side in ("source", "target")
    )
    framing = values["framing"]
    assert (framing["prefix"], framing["suffix"]) == ([source.bos_id()], [source.eos_id()])
    assert (framing["start"], framing["eos"], framing["pad"]) == (target.bos_id(), target.eos_id(), source.pad_id())
    assert (framing["forced"], framing["never"]) == ([], [])
    assert values["tokenizers"]["target"] == {"kind": "sentencepiece", "files": {"model": "target.model"}}


def test_the_manifest_holds_the_proof_of_every_format(tiny_bundle: Path) -> None:
    parity = json.loads((tiny_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))["parity"]
    assert parity["passed"] is True
    assert all(check["passed"] for check in parity["checks"])
    for backend in ("onnx", "torchscript"):
        compared = {name for check in parity["checks"] if check["backend"] == backend for name in check["differences"]}
        assert "logits" in compared
        assert "present.0.encoder.key" in compared
        assert "present.1.decoder.value" in compared


def test_model_pt_is_the_checkpoint(tiny_bundle: Path, tiny: Transformer) -> None:
    checkpoint = load_checkpoint(tiny_bundle / "model.pt")
    assert checkpoint.model.config == tiny.config
    assert checkpoint.max_new_tokens == 18
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(checkpoint.model.state_dict()[name], tensor)


def test_without_an_output_a_bundle_is_named_after_the_checkpoints_folder(
    options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(options.checkpoint.parent, tmp_path / "captions")
    export(dataclasses.replace(options, checkpoint=Path("captions") / "model.pt", output=None))
    assert Bundle.open(tmp_path / "artifacts" / "captions").manifest.formats == ("torchscript",)


def test_tokenizers_may_come_from_elsewhere(options: ExportOptions, tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    shutil.copyfile(options.checkpoint.parent / "source.model", source)
    shutil.copyfile(options.checkpoint.parent / "target.model", target)
    alone = tmp_path / "alone" / "model.pt"
    alone.parent.mkdir()
    shutil.copyfile(options.checkpoint, alone)
    export(dataclasses.replace(options, checkpoint=alone, source_tokenizer=source, target_tokenizer=target))
    assert (options.folder / "source.model").read_bytes() == source.read_bytes()
    assert (options.folder / "target.model").read_bytes() == target.read_bytes()


def test_lines_of_a_text_are_proven_too(options: ExportOptions, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("one\n\ntwo hundred\n", encoding="utf-8")
    manifest = export(dataclasses.replace(options, verify=True, parity=ParityOptions(verify_text=text)))
    assert manifest.parity
    check = manifest.parity["checks"][-1]
    assert check["name"] == "greedy on the verification text"
    assert "2 of 2 sentences equal" in check["detail"]


class Recorder(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


ONE_HEAD = {
    f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("heads", 1), ("head_width", 64))
}


def test_what_had_to_be_assumed_is_reported(options: ExportOptions, tmp_path: Path, tiny: Transformer) -> None:
    config = ModelConfig.from_dict({**tiny.config.to_dict(), "d_model": 64, **ONE_HEAD})
    state = {reference_name(name): tensor for name, tensor in Transformer(config).state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    for name in TOKENIZERS:
        shutil.copyfile(options.checkpoint.parent / name, tmp_path / name)
    progress = Recorder()
    export(dataclasses.replace(options, checkpoint=tmp_path / "state.pt"), progress)
    assert len(progress.notes) == 1
    assert "`heads`" in progress.notes[0]


class Interrupting(Progress):
    """Presses Ctrl-C as a phase begins."""

    def __init__(self, at: str) -> None:
        self.at = at

    def phase(self, text: str) -> None:
        if text.startswith(self.at):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("written", "phase"),
    [
        ("torchscript", "reading the checkpoint"),
        ("torchscript", "tracing TorchScript"),
        ("torchscript", "proving torchscript"),
        ("torchscript", "writing"),
        ("onnx", "exporting the decoder step"),
    ],
)
def test_an_interrupt_leaves_nothing(options: ExportOptions, written: Format, phase: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(dataclasses.replace(options, format=written, verify=True), Interrupting(phase))
    assert not list(options.folder.parent.iterdir())


def test_an_interrupt_leaves_the_old_bundle_as_it_was(options: ExportOptions) -> None:
    export(options)
    before = contents(options.folder.parent)
    with pytest.raises(KeyboardInterrupt):
        export(dataclasses.replace(options, max_new_tokens=5, force=True), Interrupting("writing"))
    assert contents(options.folder.parent) == before


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_while_a_bundle_is_replaced_by_two_renames_brings_the_old_one_back(
    options: ExportOptions, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(
        "kvx.exporter.folder.exchange", lambda one, other: False
    )  # as where the system has no such thing
    export(options)
    before = contents(options.folder.parent)
    rename, calls = Path.rename, itertools.count(1)

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(dataclasses.replace(options, max_new_tokens=5, force=True))
    assert contents(options.folder.parent) == before


def test_an_output_that_exists_is_not_replaced_unasked(options: ExportOptions) -> None:
    export(options)
    before = contents(options.folder)
    with pytest.raises(OptionError) as caught:
        export(options)
    assert "`force`" in caught.value.remedy
    assert contents(options.folder) == before


def test_force_replaces_a_bundle_whole(options: ExportOptions, bundle: Path) -> None:
    (bundle / "stray").write_text("from another time", encoding="utf-8")
    export(with_output(options, bundle))
    assert contents(bundle).keys() == TORCHSCRIPT_FILES | TOKENIZERS | {MANIFEST_FILE}
    Bundle.open(bundle).check_hashes()


def make_empty_folder(path: Path, bundle: Path) -> None:
    path.mkdir()


def make_folder_of_the_users(path: Path, bundle: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work", encoding="utf-8")


def make_file(path: Path, bundle: Path) -> None:
    path.write_text("a file", encoding="utf-8")


def make_link_to_a_bundle(path: Path, bundle: Path) -> None:
    path.symlink_to(bundle, target_is_directory=True)


def make_dangling_link(path: Path, bundle: Path) -> None:
    path.symlink_to(bundle / "nowhere")


@pytest.mark.parametrize(
    "make",
    [make_empty_folder, make_folder_of_the_users, make_file, make_link_to_a_bundle, make_dangling_link],
)
def test_what_is_no_bundle_is_never_replaced(
    options: ExportOptions, bundle: Path, make: Callable[[Path, Path], None]
) -> None:
    make(options.folder, bundle)
    before = contents(bundle.parent)
    with pytest.raises(OptionError, match="never replaced"):
        export(with_output(options, options.folder))
    assert contents(bundle.parent) == before
    assert os.path.lexists(options.folder)


@pytest.mark.parametrize("linked", [False, True])
def test_a_bundle_that_holds_the_checkpoint_is_never_replaced(
    options: ExportOptions, bundle: Path, tmp_path: Path, linked: bool
) -> None:
    checkpoint = bundle / "model.pt"
    if linked:
        checkpoint = tmp_path / "link.pt"
        checkpoint.symlink_to(bundle / "model.pt")
    before = contents(bundle)
    with pytest.raises(OptionError, match="holds the checkpoint"):
        export(dataclasses.replace(with_output(options, bundle), checkpoint=checkpoint))
    assert contents(bundle) == before


def test_a_bundle_around_the_checkpoints_folder_is_never_replaced(options: ExportOptions, bundle: Path) -> None:
    shutil.copytree(options.checkpoint.parent, bundle / "inner")
    with pytest.raises(OptionError, match="holds the checkpoint"):
        export(dataclasses.replace(with_output(options, bundle), checkpoint=bundle / "inner" / "model.pt"))
    assert (bundle / "inner" / "model.pt").is_file()


def test_the_current_folder_as_output_is_replaced_or_refused(
    options: ExportOptions, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    with contextlib.suppress(OptionError):
        export(with_output(options, Path()))
    Bundle.open(bundle).check_hashes()


def test_an_output_that_cannot_be_made_is_an_option_error(options: ExportOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OptionError, match="`output`"):
        export(with_output(options, tmp_path / "file" / "bundle"))


@pytest.mark.parametrize("limit", [0, -1, 21])
def test_a_limit_beyond_the_positions_is_refused(options: ExportOptions, limit: int) -> None:
    with pytest.raises(OptionError, match=rf"max_new_tokens.* {limit}\. Expected .*1 to \d+"):
        export(dataclasses.replace(options, max_new_tokens=limit))
    assert not options.folder.exists()


@pytest.mark.parametrize("limit", [1, 20])
def test_a_limit_up_to_the_positions_becomes_the_bundles(options: ExportOptions, limit: int) -> None:
    export(dataclasses.replace(options, max_new_tokens=limit))
    assert Manifest.read(options.folder).max_new_tokens == limit


def test_a_checkpoint_whose_own_limit_is_beyond_its_positions_is_refused(
    options: ExportOptions, tmp_path: Path, tiny: Transformer
) -> None:
    save_checkpoint(Checkpoint(tiny, max_new_tokens=21), tmp_path / "model.pt")
    shutil.copyfile(options.checkpoint.parent / "source.model", tmp_path / "source.model")
    shutil.copyfile(options.checkpoint.parent / "target.model", tmp_path / "target.model")
    with pytest.raises(OptionError, match="21"):
        export(dataclasses.replace(options, checkpoint=tmp_path / "model.pt"))


def test_a_checkpoint_that_cannot_be_read_leaves_nothing(options: ExportOptions, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export(dataclasses.replace(options, checkpoint=tmp_path / "none.pt"))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_size_is_refused(options: ExportOptions) -> None:
    source, target = (options.checkpoint.parent / f"{side}.model" for side in ("source", "target"))
    for wrong, path, got, expected in (
        (dataclasses.replace(options, source_tokenizer=target), target, 72, 64),
        (dataclasses.replace(options, target_tokenizer=source), source, 64, 72),
    ):
        with pytest.raises(TokenizerError) as caught:
            export(wrong)
        assert caught.value.got == f"{path} has {got} pieces"
        assert caught.value.expected.startswith(f"{expected},")
    assert not options.folder.exists()


def test_a_missing_tokenizer_is_named_with_the_option_that_helps(options: ExportOptions, tmp_path: Path) -> None:
    shutil.copyfile(options.checkpoint, tmp_path / "model.pt")
    with pytest.raises(TokenizerError) as caught:
        export(dataclasses.replace(options, checkpoint=tmp_path / "model.pt"))
    assert str(tmp_path / "source.model") in caught.value.got
    assert "`source_tokenizer`" in caught.value.remedy
    assert not options.folder.exists()


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_tokenizer_is_refused(options: ExportOptions, tmp_path: Path, content: bytes) -> None:
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"damaged\.model"):
        export(dataclasses.replace(options, source_tokenizer=damaged))


@pytest.mark.parametrize("missing", [("bos",), ("eos",), ("pad",), ("pad", "bos", "eos")])
def test_a_tokenizer_without_control_pieces_is_refused(
    options: ExportOptions, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    pad, bos, eos = (-1 if name in missing else index for index, name in enumerate(("pad", "bos", "eos"), 1))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five six seven"] * 4),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        unk_id=0,
        pad_id=pad,
        bos_id=bos,
        eos_id=eos,
    )
    (tmp_path / "partial.model").write_bytes(model.getvalue())
    with pytest.raises(TokenizerError) as caught:
        export(dataclasses.replace(options, target_tokenizer=tmp_path / "partial.model"))
    assert f"has no {' and no '.join(missing)}" in caught.value.got
    assert not options.folder.exists()


def test_a_verification_text_that_cannot_be_read_leaves_nothing(options: ExportOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        export(dataclasses.replace(options, verify=True, parity=ParityOptions(verify_text=tmp_path / "none.txt")))
    assert not list(tmp_path.iterdir())


# What `kvx verify` finds.


def prove_again(bundle: Path, checkpoint: Path) -> ParityReport:
    return verify(bundle, checkpoint, ParityOptions(steps=4))


def failed(report: ParityReport) -> dict[str, str]:
    """Backend and name of each check that failed, with what it saw."""
    return {f"{check.backend}, {check.name}": check.detail for check in report.checks if not check.passed}


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Puts other content under a name, with a manifest that vouches for it."""
    (bundle / name).write_bytes(content)
    entry = dataclasses.asdict(FileEntry.of(bundle / name))
    change_manifest(bundle, lambda values: values["files"].update({name: entry}))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(values)
    (bundle / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")


def altered(model: Transformer) -> Transformer:
    other = copy.deepcopy(model)
    other.head.weight[3, 0] += 1e-2
    return other


def with_fewer_layers(model: Transformer) -> Transformer:
    return Transformer(ModelConfig.from_dict({**model.config.to_dict(), "decoder_layers": 1}))


def altered_onnx(path: Path) -> bytes:
    model = onnx.load(path)
    (head,) = (tensor for tensor in model.graph.initializer if "head" in tensor.name)
    values = onnx.numpy_helper.to_array(head).copy()
    values[3, 0] += 1e-2
    head.CopyFrom(onnx.numpy_helper.from_array(values, head.name))
    content: bytes = model.SerializeToString()
    return content


def altered_torchscript(model: Transformer, folder: Path) -> bytes:
    write_torchscript(StepGraph(altered(model), features=StepFeatures(source_presents=True)), folder / "altered.ts")
    return (folder / "altered.ts").read_bytes()


def test_a_good_bundle_is_proven_again(tiny_bundle: Path, options: ExportOptions) -> None:
    report = prove_again(tiny_bundle, options.checkpoint)
    assert report.passed
    own = {"onnx, own operators"} if kernels.library() else set()
    assert {check.backend for check in report.checks} == own | {"files", "model", "onnx", "torchscript"}


def test_a_state_dict_needs_no_heads_to_be_proven_against(tiny_bundle: Path, tmp_path: Path, tiny: Transformer) -> None:
    torch.save({reference_name(name): tensor for name, tensor in tiny.state_dict().items()}, tmp_path / "state.pt")
    assert prove_again(tiny_bundle, tmp_path / "state.pt").passed


@pytest.mark.parametrize("name", sorted(GRAPHS | TOKENIZERS | {"model.pt"}))
def test_one_flipped_byte_is_found_in_any_file(bundle: Path, options: ExportOptions, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    found = failed(prove_again(bundle, options.checkpoint))
    assert found.keys() == {"files, sizes and sha256"}
    assert name in found["files, sizes and sha256"]


def test_a_file_that_is_gone_or_cut_is_found(bundle: Path, options: ExportOptions) -> None:
    os.truncate(bundle / "encoder.ts", 100)
    assert "encoder.ts" in failed(prove_again(bundle, options.checkpoint))["files, sizes and sha256"]
    (bundle / "encoder.ts").unlink()
    assert "encoder.ts" in failed(prove_again(bundle, options.checkpoint))["files, sizes and sha256"]


def test_other_weights_are_found_by_name(bundle: Path, tmp_path: Path, tiny: Transformer) -> None:
    save_checkpoint(Checkpoint(altered(tiny), max_new_tokens=18), tmp_path / "other.pt")
    found = failed(prove_again(bundle, tmp_path / "other.pt"))
    assert found["model, configuration and weights"] == "differing in head.weight"


def test_other_weights_are_found_without_a_model_pt(options: ExportOptions, tmp_path: Path, tiny: Transformer) -> None:
    export(options)
    save_checkpoint(Checkpoint(altered(tiny), max_new_tokens=18), tmp_path / "other.pt")
    assert any(
        name.startswith("torchscript, logits of") for name in failed(prove_again(options.folder, tmp_path / "other.pt"))
    )


def test_another_configuration_is_found_by_field(bundle: Path, tmp_path: Path, tiny: Transformer) -> None:
    config = ModelConfig.from_dict({**tiny.config.to_dict(), "encoder_d_ff": 25, "encoder_layers": 2})
    save_checkpoint(Checkpoint(Transformer(config), max_new_tokens=18), tmp_path / "other.pt")
    found = failed(prove_again(bundle, tmp_path / "other.pt"))
    assert found["model, configuration and weights"] == "differing in encoder_layers, encoder_d_ff"


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_another_graph_is_found_even_where_the_manifest_vouches_for_it(
    bundle: Path, options: ExportOptions, tmp_path: Path, tiny: Transformer, backend: str
) -> None:
    if backend == "onnx":
        replace_file(bundle, "decoder_step.onnx", altered_onnx(bundle / "decoder_step.onnx"))
    else:
        replace_file(bundle, "decoder_step.ts", altered_torchscript(tiny, tmp_path))
    Bundle.open(bundle).check_hashes()
    found = failed(prove_again(bundle, options.checkpoint))
    assert any(name.startswith(f"{backend}, logits of") for name in found)
    assert all(name.startswith(backend) for name in found)


def test_a_graph_is_proven_although_the_manifest_leaves_out_its_format(bundle: Path, options: ExportOptions) -> None:
    replace_file(bundle, "decoder_step.onnx", altered_onnx(bundle / "decoder_step.onnx"))
    change_manifest(bundle, lambda values: values.update(formats=["torchscript"]))
    try:
        report = prove_again(bundle, options.checkpoint)
    except KvxError:
        return
    assert not report.passed


@pytest.mark.parametrize("name", sorted(GRAPHS | {"decoder_beams.onnx", "decoder_chunk.onnx"}))
def test_a_file_that_is_no_graph_is_found(bundle: Path, options: ExportOptions, name: str) -> None:
    replace_file(bundle, name, b"no graph at all")
    found = failed(prove_again(bundle, options.checkpoint))
    assert any(name in detail for detail in found.values())


@pytest.mark.parametrize("ending", ["onnx", "ts"])
def test_graphs_under_each_others_names_are_found(bundle: Path, options: ExportOptions, ending: str) -> None:
    encoder, step = ((bundle / f"{name}.{ending}").read_bytes() for name in ("encoder", "decoder_step"))
    replace_file(bundle, f"encoder.{ending}", step)
    replace_file(bundle, f"decoder_step.{ending}", encoder)
    found = failed(prove_again(bundle, options.checkpoint))
    assert found.keys() == {f"{'onnx' if ending == 'onnx' else 'torchscript'}, contract"}


@pytest.mark.parametrize("change", [altered, with_fewer_layers])
def test_another_model_pt_is_found_even_where_the_manifest_vouches_for_it(
    bundle: Path, options: ExportOptions, tiny: Transformer, change: Callable[[Transformer], Transformer]
) -> None:
    save_checkpoint(Checkpoint(change(tiny), max_new_tokens=18), bundle / "model.pt")
    replace_file(bundle, "model.pt", (bundle / "model.pt").read_bytes())
    assert "model, configuration and weights" in failed(prove_again(bundle, options.checkpoint))


def test_a_folder_that_only_looks_like_a_bundle_is_never_replaced(options: ExportOptions, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / MANIFEST_FILE).write_text("{}")
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="no bundle"):
        export(with_output(options, tmp_path / "work"))
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years of work"


def test_a_cache_in_8_bits_needs_kvxs_own_operators(options: ExportOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "0")
    with pytest.raises(OptionError, match="needs kvx's own operators"):
        export(dataclasses.replace(options, format="onnx", cache_precision="int8"))
    assert not options.folder.exists()


def test_heads_that_contradict_the_checkpoint_are_refused(options: ExportOptions) -> None:
    with pytest.raises(OptionError, match=r"`heads` is 1\. Expected the checkpoint's own 2"):
        export(dataclasses.replace(options, heads=1))


@pytest.mark.parametrize("name", ["decoder_chunk.onnx", "decoder_beams.onnx"])
def test_all_graphs_of_the_decoder_share_their_weights(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / name, load_external_data=False)
    matrices = [part for part in model.graph.initializer if len(part.dims) == 2]
    assert len(matrices) > 10
    places = {entry.value for part in matrices for entry in part.external_data if entry.key == "location"}
    assert places == {"decoder_step.onnx.data"}
    assert all(part.data_location == onnx.TensorProto.EXTERNAL for part in matrices)
    assert not (tiny_bundle / f"{name}.data").exists()
