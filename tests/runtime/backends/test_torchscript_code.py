"""A TorchScript module that could do more than kvx's exports do is refused before any of it runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from kvx import BundleError, Translator
from kvx.runtime.backends.torchscript_code import OPERATORS
from kvx.runtime.backends.torchscript_code import check_module as check_records
from kvx.runtime.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest
from kvx.tests.conftest import ROOT

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

FORMAT_1 = ROOT / "tests" / "fixtures" / "format-1" / "both"
STEP = "decoder_step.ts"


class Writes(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Writes a file while it runs, and gives an answer."""

    def forward(self, x: torch.Tensor, path: str) -> torch.Tensor:  # type: ignore[name-defined]
        torch.ops.aten.save(x, path)
        return x


class WritesWhenLoaded(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Writes a file while it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.x = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
        return x

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:  # type: ignore[name-defined]
        return self.path, self.x, self.training

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:  # type: ignore[name-defined]
        self.path = state[0]
        self.x = torch.from_file(state[0], shared=True, size=4)
        self.training = state[2]


def check_module(path: Path) -> None:
    check_records(path.name, torch._C.PyTorchFileReader(str(path)))


def saved(folder: Path) -> Path:
    """A module that writes `folder`/written when it is loaded."""
    module = torch.jit.script(WritesWhenLoaded(str(folder / "written")))
    torch.jit.save(module, folder / STEP)
    (folder / "written").unlink(missing_ok=True)
    return folder / STEP


def with_code(source: Path, target: Path, change: Callable[[str], str]) -> None:
    """A copy of a module with other code."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content.decode()).encode() if name.endswith(".py") else content)


def vouched(bundle: Path, folder: Path, module: Path) -> Path:
    """A copy of a bundle with another step, whose hash the manifest has."""
    copied = shutil.copytree(bundle, folder)
    shutil.copyfile(module, copied / STEP)
    values = json.loads((copied / MANIFEST_FILE).read_text(encoding="utf-8"))
    values["files"][STEP] = asdict(FileEntry.of(copied / STEP))
    (copied / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    return copied


@pytest.mark.parametrize("name", ["numbers", "tiny", "attention"])
def test_what_kvx_exports_is_allowed(name: str, request: pytest.FixtureRequest) -> None:
    for module in request.getfixturevalue(f"{name}_bundle").glob("*.ts"):
        check_module(module)


def test_what_the_last_release_exported_is_allowed() -> None:
    for module in FORMAT_1.glob("*.ts"):
        check_module(module)


def test_every_operator_on_the_list_is_one_that_an_export_uses(
    numbers_bundle: Path, attention_bundle: Path, modules_of_parts: list[Path]
) -> None:
    code = ""
    for module in (*numbers_bundle.glob("*.ts"), *attention_bundle.glob("*.ts"), *modules_of_parts):
        with zipfile.ZipFile(module) as archive:
            code += "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".py"))
    assert {name for name in OPERATORS if f"torch.{name}(" not in code} == set()


def test_a_module_that_writes_when_it_is_loaded_is_not_loaded(numbers_bundle: Path, tmp_path: Path) -> None:
    module = saved(tmp_path)
    torch.jit.load(module)
    assert (tmp_path / "written").exists(), "the attack does nothing"
    (tmp_path / "written").unlink()
    with pytest.raises(BundleError, match="Do not use this bundle"):
        Translator.load(vouched(numbers_bundle, tmp_path / "bundle", module), backend="torchscript")
    assert not (tmp_path / "written").exists()


def test_a_module_with_an_operator_that_no_export_has_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Writes()), tmp_path / STEP)
    with pytest.raises(BundleError, match="Do not use this bundle"):
        check_module(tmp_path / STEP)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda code: code.replace("torch.relu(", "torch.save("), "torch.save"),
        (lambda code: code.replace("torch.relu(", "ops.aten.relu("), "ops.aten.relu"),
        (lambda code: code.replace('"cpu"', '"/etc/passwd"'), "characters"),
        (lambda code: code + "# a comment\n", "characters"),
        (lambda code: code + "class Other(Module):\n  __parameters__ = []\n", "cannot be read"),
        (lambda code: code + "  def more(self) -> int:\n    return 1\n", "__buffers__"),
        (lambda code: code.replace("    return ", "    while True:\n      x = 1\n    return ", 1), "while True"),
        (lambda code: code + "  (", "cannot be read"),
    ],
)
def test_other_code_is_refused(numbers_bundle: Path, tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    with_code(numbers_bundle / STEP, tmp_path / STEP, change)
    with pytest.raises(BundleError, match=reason):
        check_module(tmp_path / STEP)


@pytest.mark.parametrize(
    "name", ["decoder_step/data.pkl", "other/version", "decoder_step/extra/x", "decoder_step/code/b.py"]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_more_in_it_is_refused(numbers_bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(numbers_bundle / STEP, tmp_path / STEP)
    with zipfile.ZipFile(tmp_path / STEP, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises((BundleError, RuntimeError)):  # of torch's reader, for a second folder
        check_module(tmp_path / STEP)


@pytest.mark.usefixtures("plain_graphs")
def test_a_module_that_fails_while_it_runs_is_an_error_that_names_the_file(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = Manifest.read(bundle)
    model = {**manifest.model, "source_positions": 400, "target_positions": 400}
    dataclasses.replace(manifest, model=model, max_new_tokens=300).write(bundle)
    for backend, files in (("torchscript", r"decoder_step\.ts"), ("onnx", r"decoder_step\.onnx")):
        translator = Translator.load(bundle, backend=backend, threads=1)
        with pytest.raises(BundleError, match=f"cannot run {files}"):
            translator.translate(["one"], min_new_tokens=60, max_new_tokens=100)
        with pytest.raises(BundleError, match="cannot run encoder"):
            translator.translate(["one " * 200])
