"""`kvx export`."""

from __future__ import annotations

import copy
import importlib.util
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from kvx.exporter.writing.graphs import EncoderGraph, StepGraph
from kvx.exporter.writing.torchscript import write_torchscript
from kvx.runtime import kernels
from kvx.runtime.bundle.manifest import Manifest
from kvx.tests.commands.running import (
    NUMBERS,
    PATIENCE,
    Converse,
    Run,
    invoke,
    names_in,
    refused,
)

OWN_LINE = re.compile(r"kvx: |parity with eager PyTorch: |  (ok  |FAIL) ")


@pytest.fixture
def small(tiny_checkpoint_folder: Path) -> list[str]:
    """What makes an export of the tiny model quick."""
    return ["export", str(tiny_checkpoint_folder / "model.pt"), "--format", "torchscript", "--no-verify"]


def test_success_prints_nothing_but_our_own_lines(run: Run, tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    found = run("export", tiny_checkpoint_folder / "model.pt", "-o", "bundles/tiny")
    assert (found.code, found.out) == (0, "bundles/tiny\n")
    assert [line for line in found.err.splitlines() if not OWN_LINE.match(line)] == []
    assert found.err.startswith("parity with eager PyTorch: passed")
    assert names_in(tmp_path / "bundles") == ["tiny"]
    own = {"decoder_kernels.onnx"} if kernels.library() else set()
    assert {path.name for path in (tmp_path / "bundles" / "tiny").iterdir()} == own | {
        "manifest.json",
        "encoder.onnx",
        "decoder_step.onnx",
        "decoder_step.onnx.data",
        "encoder.onnx.data",
        "decoder_chunk.onnx",
        "decoder_beams.onnx",
        "encoder.ts",
        "decoder_step.ts",
        "model.pt",
        "source.model",
        "target.model",
    }


def test_an_output_that_exists_is_replaced_only_where_asked_for(small: list[str], tmp_path: Path) -> None:
    output = tmp_path / "tiny"
    first = invoke(*small, "-o", output)
    assert (first.code, first.out) == (0, f"{output}\n")
    assert "not proven" in first.err
    before = Manifest.read(output)
    again = invoke(*small, "-o", output)
    assert again.code == 2
    assert "exists already" in again.err
    assert "--force" in again.err
    assert Manifest.read(output) == before
    assert invoke(*small, "-o", output, "--force").code == 0
    assert Manifest.read(output).created > before.created
    assert names_in(tmp_path) == ["tiny"]


def test_the_attention_of_a_layer_comes_where_asked_for(small: list[str], tmp_path: Path) -> None:
    alone = invoke(*small, "-o", tmp_path / "refused", "--attention-layer", "0")
    assert alone.code == 2
    assert "--attention-layer 0 has no effect without --with-attention" in alone.err
    layers = []
    for name, more in (("last", []), ("first", ["--attention-layer", "0"])):
        assert invoke(*small, "-o", tmp_path / name, "--with-attention", *more).code == 0
        layers.append(Manifest.read(tmp_path / name).features.attention)
    assert layers == [1, 0]


def test_the_default_output_is_named_after_the_checkpoints_folder(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = f"artifacts/{Path(small[1]).parent.name}"
    assert invoke(*small).out == f"{folder}\n"
    assert Manifest.read(tmp_path / folder).formats == ("torchscript",)


def test_a_checkpoint_that_is_a_link_to_itself_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").symlink_to("model.pt")
    for output in (tmp_path / "new", bundle):
        refused(invoke("export", tmp_path / "model.pt", "-o", output, "--force"), "model.pt cannot be opened")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("foreign", ["file", "folder", "empty", "link"])
def test_what_is_no_bundle_is_never_replaced(
    small: list[str], numbers_bundle: Path, tmp_path: Path, foreign: str, force: list[str]
) -> None:
    output = tmp_path / foreign
    if foreign == "file":
        output.write_text("mine")
    elif foreign == "link":
        output.symlink_to(numbers_bundle)
    else:
        output.mkdir()
    if foreign == "folder":
        (output / "mine").write_text("mine")

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")}

    before = state()
    found = invoke(*small, "-o", output, *force)
    assert found.code == 2
    assert "never replaced" in found.err
    assert state() == before


def test_the_checkpoints_own_folder_is_never_replaced(small: list[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(small[1]).parent, tmp_path / "checkpoint"))
    (folder / "manifest.json").write_text("{}")
    found = invoke(small[0], folder / "model.pt", *small[2:], "-o", folder, "--force")
    assert found.code == 2
    assert (folder / "model.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["nowhere/model.pt"], "nowhere/model.pt"),
        (["CHECKPOINT", "--source-tokenizer", "nowhere"], "nowhere"),
        (["CHECKPOINT", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["CHECKPOINT", "--max-new-tokens", "21"], "--max-new-tokens is 21"),
        (["CHECKPOINT", "--heads", "3"], "heads"),
        (["CHECKPOINT", "--tolerance", "0"], "--tolerance is 0"),
        (["CHECKPOINT", "-o", "FILE/bundle"], "FILE/bundle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], mention: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    arguments = [small[1] if argument == "CHECKPOINT" else argument for argument in arguments]
    found = invoke("export", *arguments, *small[2:])
    assert found.code == 2
    assert found.err.startswith("kvx: error: ")
    assert mention in found.err
    assert names_in(tmp_path) == ["FILE"]


def test_an_export_that_differs_from_eager_is_a_failure_and_leaves_nothing(
    tiny_checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_altered(graph: EncoderGraph | StepGraph, path: Path) -> None:
        altered = copy.deepcopy(graph)
        for parameter in altered.parameters():
            parameter.add_(1e-6)
        write_torchscript(altered, path)

    monkeypatch.setattr("kvx.exporter.graphs.write_torchscript", write_altered)
    command: list[str | Path] = ["export", tiny_checkpoint_folder / "model.pt", "--format", "torchscript", "-o"]
    found = invoke(*command, tmp_path / "tiny", "--tolerance", "1e-9")
    assert found.code == 1
    assert "differs from eager PyTorch" in found.err
    assert names_in(tmp_path) == []
    assert invoke(*command, tmp_path / "tiny").code == 0  # within the usual tolerance


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "model.pt"],
        ["verify", "bundle", "model.pt"],
        ["translate", "--backend", "torch", "one"],
        ["translate", "--backend", "torchscript", "one"],
    ],
    ids=" ".join,
)
def test_without_the_extra_the_way_to_it_is_named(
    numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *others: None if name == "torch" else find(name, *others)
    )
    if arguments[0] == "translate":
        arguments = [*arguments, "--model", str(numbers_bundle)]
    found = invoke(*arguments)
    assert (found.code, found.out) == (2, "")
    assert "torch" in found.err
    assert "pip install 'kvx[export]'" in found.err


@pytest.mark.parametrize("arguments", [["export", "model.pt"], ["verify", "bundle", "model.pt"]], ids=" ".join)
def test_without_onnx_runtime_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *others: None if name == "onnxruntime" else find(name, *others)
    )
    found = invoke(*arguments)
    assert (found.code, found.out) == (2, "")
    assert "needs onnxruntime, which is not installed" in found.err
    assert "pip install 'kvx[gpu]'" in found.err


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.proof), (signal.SIGTERM, 143)]
)
def test_a_signal_that_ends_an_export_leaves_no_half_bundle(
    converse: Converse, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = converse("export", str(NUMBERS), "-o", "bundles/numbers")
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("bundles/.numbers.*/encoder.onnx")) and time.monotonic() < deadline:
        time.sleep(0.05)
    [partial] = names_in(tmp_path / "bundles")
    assert re.fullmatch(r"\.numbers\.[0-9a-f]+\.partial", partial)
    command.process.send_signal(number)
    found = command.end()
    assert (found.code, found.out, found.err) == (code, "", "")
    assert names_in(tmp_path / "bundles") == []
