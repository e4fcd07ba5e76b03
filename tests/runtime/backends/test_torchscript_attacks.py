"""TorchScript archives: exports of kvx are loaded; a program of anybody else is refused before any of it runs."""

from __future__ import annotations

import ast
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from kvx import BundleError, Translator
from kvx.runtime.backends.torchscript_code import CALLS, Records, check_module
from kvx.runtime.bundle.manifest import FileEntry

torch = pytest.importorskip("torch")

FORMAT_1 = Path(__file__).resolve().parents[2] / "fixtures" / "format-1" / "both"
STEP = "decoder_step.ts"
NAME = re.compile(rb"__torch__[a-z0-9_.]+\.StepGraph")
RETURN = re.compile(rb"(?m)^    return ")

Change = Callable[[bytes], bytes]


def records(path: Path) -> Records:
    found: Records = torch._C.PyTorchFileReader(str(path))
    return found


def code_of(path: Path) -> str:
    [name] = [name for name in records(path).get_all_records() if name.endswith(".py")]
    return records(path).get_record(name).decode()


def calls_of(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(code_of(path))) if isinstance(node, ast.Call)}


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


def change(bundle: Path, changes: Mapping[str, Change], added: Mapping[str, bytes] | None = None) -> None:
    """Changes the records of the step whose names end so, adds others, and makes the hash right."""
    path = bundle / STEP
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    for ending, of in changes.items():
        [name] = [name for name in found if name.endswith(ending)]
        found[name] = of(found[name])
    prefix = next(iter(found)).partition("/")[0]
    found |= {f"{prefix}/{name}": content for name, content in (added or {}).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in found.items():
            archive.writestr(name, content)
    values = json.loads((bundle / "manifest.json").read_text())
    values["files"][STEP] = asdict(FileEntry.of(path))
    (bundle / "manifest.json").write_text(json.dumps(values))


def first(pattern: bytes, by: bytes) -> Change:
    """Replaces what is found first."""

    def replaced(content: bytes) -> bytes:
        changed = re.sub(pattern, lambda _: by, content, count=1)
        assert changed != content
        return changed

    return replaced


def refused(bundle: Path, *mentions: str) -> None:
    with pytest.raises(BundleError) as caught:
        Translator.load(bundle, backend="torchscript").translate(["one"])
    for mention in (STEP, *mentions):
        assert mention in str(caught.value)


def test_all_exports_pass_and_together_use_every_operator_of_the_list(
    tiny_bundle: Path, numbers_bundle: Path, attention_bundle: Path, modules_of_parts: list[Path]
) -> None:
    folders = (tiny_bundle, numbers_bundle, attention_bundle, FORMAT_1)
    paths = [path for folder in folders for path in sorted(folder.glob("*.ts"))]
    assert len(paths) == 2 * len(folders)
    paths += modules_of_parts
    for path in paths:
        check_module(path.name, records(path))
    assert set[str]().union(*map(calls_of, paths)) - {"annotate", "torch.device"} == CALLS


def test_an_archive_that_is_only_packed_anew_is_loaded(bundle: Path) -> None:
    change(bundle, {})
    assert Translator.load(bundle, backend="torchscript").translate(["one"])[0].text == "eins"


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("when", ["forward", "load", "default"])
def test_a_module_that_writes_a_file_is_refused_and_writes_none(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, *, checked: bool
) -> None:
    """Unchecked it writes one: these are true attacks. The name has no character that code could not have."""
    monkeypatch.chdir(tmp_path)
    file = Path("written")
    name = NAME.findall(code_of(bundle / STEP).encode())[0]
    writes = f'torch.save([1], "{file}")'.encode()
    changes: dict[str, Change] = {".py": first(RETURN.pattern, b"    _0 = " + writes + b"\n    return ")}
    if when == "load":
        get = b"\n  def __getstate__(self: " + name + b") -> int:\n    return 1"
        set_ = b"\n  def __setstate__(self: " + name + b", state: int) -> NoneType:\n    _0 = " + writes
        changes[".py"] = lambda code: code.rstrip() + get + set_ + b"\n    return None\n"
        changes["/data.pkl"] = first(rb"\}\(u", b"K\x01")
    if when == "default":
        more = f', more: Tensor=torch.from_file("{file}", True, 10)) -> '
        changes = {".py": first(rb"\) -> ", more.encode())}
    change(bundle, changes)
    if checked:
        refused(bundle, "a program that kvx export did not write")
    else:
        monkeypatch.setattr("kvx.runtime.backends.torchscript.check_module", lambda file, records: None)
        try:
            Translator.load(bundle, backend="torchscript").translate(["one"])
        except BundleError:
            assert when == "default"
    assert file.exists() == (not checked)


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        (rb"torch\.relu", b"torch.rot90"),
        (rb"torch\.relu", b"ops.aten.relu"),
        (rb"torch\.relu\(", b"input.relu("),
        (rb"CONSTANTS\.c0", b"self.weights"),
        (rb"CONSTANTS\.c0", b"getattr(self, c0)"),
        (rb"CONSTANTS\.c0", b"__torch__.torch.classes.quantized.LinearPackedParamsBase"),
        (rb"__parameters__ = \[\]", b"__parameters__ = [torch.relu]"),
        (rb"__buffers__ = \[\]", b'__buffers__ = []\n  __annotations__ = []\n  x : Final[int] = torch.ones("1")'),
        (rb"\(Module\)", b"(Interface)"),
        (rb"\(Module\)", b"(NamedTuple)"),
        (rb"^class", b"import os\nclass"),
        (rb"def forward", b"@script_method\n  def forward"),
        (rb"def forward", b"def backward"),
        (rb"    return ", b"    if True:\n      _0 = 1\n    return "),
        (rb"    return ", b"    while True:\n      _0 = 1\n    return "),
        (rb"    return ", b"    def inner(): return 1\n    return "),
        (rb"    return ", b"    self.x = 1\n    return "),
        (rb"    return ", b"    # \\\n    return "),
        (rb"    return ", b"    \t_0 = 1\n    return "),
        (rb'"cpu"', b'"cuda"'),
        (rb"^class", b"("),
        (rb"^class", b"-" * 100_000 + b"1\nclass"),
    ],
)
def test_code_of_another_kind_is_refused(bundle: Path, pattern: bytes, by: bytes) -> None:
    change(bundle, {".py": first(b"(?m)" + pattern, by)})
    refused(bundle, "a program that kvx export did not write")


def test_a_second_method_and_a_second_class_are_refused(bundle: Path) -> None:
    original = (bundle / STEP).read_bytes()
    code = code_of(bundle / STEP).encode()
    for more in (code.partition(b"__buffers__ = []\n")[2].replace(b"forward", b"other"), code):
        (bundle / STEP).write_bytes(original)
        change(bundle, {".py": lambda content, more=more: content + more})  # type: ignore[misc]
        refused(bundle, "a program")


@pytest.mark.parametrize(
    "name", ["code/__torch__/other.py", "model.json", "bytecode.pkl", "extra/x", "DATA.PKL", "code/__torch__/x.pkl"]
)
def test_records_of_another_kind_are_refused(bundle: Path, name: str) -> None:
    change(bundle, {}, {name: b"class A(Module):\n  pass\n"})
    refused(bundle, "records")


@pytest.mark.parametrize(
    ("record", "pattern", "by"),
    [
        ("/constants/0", b"(?s)^.{8}", b""),  # shorter than its tensor
        ("/constants/0", b"^", b"\0" * 8),
        ("/constants.pkl", b"FloatStorage", b"ByteStorage"),
        ("/constants.pkl", b"_rebuild_tensor_v2", b"_rebuild_qtensor"),
        ("/constants.pkl", b"ctorch._utils\n_rebuild_tensor_v2", b"cos\nsystem"),
        ("/constants.pkl", rb"K\x00\(", b"K\x01("),  # an offset
        ("/constants.pkl", rb"K\x00\(", b"J\xff\xff\xff\xff("),
        ("/constants.pkl", b"K@K\x01", b"K@K\x7f"),  # strides
        ("/constants.pkl", b"^\x80\x02", b"\x80\x02cos\nsystem\n0"),
        ("/constants.pkl", rb"\.$", b"i"),
        ("/data.pkl", b"__torch__", b"__other__"),
        ("/data.pkl", b"StepGraph", b"EncoderGraph"),
        ("/data.pkl", rb"c__torch__[a-z0-9_.]+", b"c__torch__.torch.classes.quantized"),
        ("/data.pkl", rb"\}\(u", b"}(X\x01\x00\x00\x00aK\x01u"),
        ("/data.pkl", b"(?s)^.*$", b""),
        ("/data.pkl", b"(?s)^.*$", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."),
    ],
)
def test_pickles_of_another_kind_are_refused(bundle: Path, record: str, pattern: bytes, by: bytes) -> None:
    change(bundle, {record: first(pattern, by)})
    refused(bundle)


def test_a_graph_that_fails_while_it_runs_or_gives_other_tensors_is_an_error_of_the_bundle(bundle: Path) -> None:
    original = (bundle / STEP).read_bytes()
    for pattern, by, mention in (
        (rb"torch\.transpose\(heads, 1, 2\)", b"torch.transpose(heads, 1, 7)", "cannot run"),
        (rb"\(torch\.to\(logits, 6\)", b"(torch.to(logits, 7)", "float64"),
        (rb"\(torch\.to\(logits, 6\)", b"(torch.select(logits, 0, 0)", "[1, 72]"),
    ):
        (bundle / STEP).write_bytes(original)
        change(bundle, {".py": first(pattern, by)})
        refused(bundle, mention)
