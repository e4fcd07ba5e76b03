"""Only regular files that the manifest names are read, wherever links to them lead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from kvx import BundleError, Translator
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.external import external_files
from kvx.runtime.bundle.files import LFS_POINTER, FileEntry, NotRegularError, open_regular
from kvx.runtime.bundle.folder import Bundle, newest_bundle

HANGS = 20  # seconds
Layout = Callable[[Path, Path], None]


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Changes the manifest's entries of files."""
    values = json.loads((bundle / "manifest.json").read_text())
    change(values["files"])
    write_derived(bundle, values)


def write_derived(bundle: Path, values: dict[str, object]) -> None:
    (bundle / "manifest.json").write_text(json.dumps(values))


def as_hub(bundle: Path, elsewhere: Path) -> None:
    """The snapshot of a hub: a link for each file, to a blob with another name."""
    for number, path in enumerate(sorted(bundle.iterdir())):
        blob = path.rename(elsewhere / f"blob-{number}")
        path.symlink_to(os.path.relpath(blob, bundle))


def as_volume(bundle: Path, elsewhere: Path) -> None:
    """A volume of Kubernetes: links through a link that is exchanged for the next version."""
    del elsewhere
    version = bundle / "..2026_01_01"
    version.mkdir()
    for path in [path for path in bundle.iterdir() if path.is_file()]:
        path.rename(version / path.name)
        path.symlink_to(Path("..data") / path.name)
    (bundle / "..data").symlink_to(version.name)


def as_hard_links(bundle: Path, elsewhere: Path) -> None:
    for path in bundle.iterdir():
        os.link(path, elsewhere / path.name)


@pytest.mark.parametrize("layout", [as_hub, as_volume, as_hard_links])
def test_a_bundle_of_links_is_a_bundle(bundle: Path, tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "blobs").mkdir()
    layout(bundle, tmp_path / "blobs")
    translator = Translator.load(bundle, threads=1)
    assert translator.translate(["twelve"])[0].text == "zwölf"
    assert translator.translate(["twelve"], beam_size=2)[0].text == "zwölf"
    Bundle.open(bundle).check_hashes()
    os.utime((bundle / "decoder_step.onnx.data").resolve())
    assert newest_bundle(tmp_path) == bundle


@pytest.mark.parametrize("name", ["encoder.onnx", "source.model", "model.pt"])
def test_a_link_to_something_else_is_an_altered_file(bundle: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "other").write_bytes(content)
    (bundle / name).unlink()
    (bundle / name).symlink_to(tmp_path / "other")
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(bundle).check_hashes()


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx", "model.pt", "source.model", "encoder.ts"])
@pytest.mark.parametrize("kind", ["pipe", "linked pipe", "device", "folder", "dangling link", "loop"])
def test_what_is_no_regular_file_is_refused_without_waiting(bundle: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = bundle / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "linked pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling link":
            path.symlink_to(tmp_path / "nothing")
        case "loop":
            path.symlink_to(path)
    script = (
        "import resource, sys; from pathlib import Path; from kvx import BundleError, Translator\n"
        "from kvx.runtime.bundle.folder import newest_bundle\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "folder, manifest = Path(sys.argv[1]), sys.argv[2] == 'manifest.json'\n"
        "for use in (lambda: Translator.load(folder), lambda: newest_bundle(folder.parent))[: 2 if manifest else 1]:\n"
        "    try: use()\n"
        "    except BundleError: print('refused')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(bundle), name], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert run.stdout == "refused\n" * (2 if name == "manifest.json" else 1), run.stderr[-500:]


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(NotRegularError, match="is not a regular file"):
            open_regular(path)


class TestMissingFiles:
    def test_of_a_format_that_is_not_used_are_no_fault(self, bundle: Path) -> None:
        pytest.importorskip("torch")
        for name in ("model.pt", "encoder.ts", "decoder_step.ts"):
            (bundle / name).unlink()
        opened = Bundle.open(bundle)
        opened.check_hashes()
        assert (set(opened.missing), opened.formats) == ({"model.pt", "encoder.ts", "decoder_step.ts"}, ("onnx",))
        assert Translator.load(bundle).translate(["twelve"])[0].text == "zwölf"
        with pytest.raises(BundleError, match=r"has no encoder\.ts and no decoder_step\.ts\. .*it has: onnx"):
            Translator.load(bundle, backend="torchscript")
        lines = [line for line in describe(opened) if line.endswith("(missing)")]
        assert sorted(line.split()[0] for line in lines) == ["decoder_step.ts", "encoder.ts", "model.pt"]
        assert "onnx; fp32, lowering ort" in "\n".join(describe(opened))

    def test_of_the_other_format_are_none_either(self, bundle: Path) -> None:
        pytest.importorskip("torch")
        for path in (path for path in bundle.iterdir() if path.suffix in (".onnx", ".data")):
            path.unlink()
        assert Bundle.open(bundle).formats == ("torchscript",)
        assert Translator.load(bundle, backend="torchscript").translate(["twelve"])[0].text == "zwölf"
        with pytest.raises(BundleError, match=r"has no encoder\.onnx"):
            Translator.load(bundle)

    @pytest.mark.parametrize(
        "name", ["encoder.onnx", "decoder_chunk.onnx", "decoder_step.onnx.data", "encoder.ts", "source.model"]
    )
    def test_are_a_fault_where_the_rest_of_the_format_is_there(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=f"{name} is not there"):
            Bundle.open(bundle)

    def test_altered_files_of_another_format_are_a_fault(self, bundle: Path) -> None:
        os.truncate(bundle / "encoder.ts", 100)
        with pytest.raises(BundleError, match=r"encoder\.ts is 100 bytes long"):
            Translator.load(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx", "model.pt", "target.model"])
def test_a_pointer_of_git_lfs_is_named_as_such(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
    with pytest.raises(BundleError, match=rf"{name} is a pointer of Git LFS.* git lfs pull\."):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx"])
def test_the_path_of_a_file_of_a_bundle_is_answered_with_its_folder(bundle: Path, name: str) -> None:
    with pytest.raises(BundleError, match=f"is a file of a bundle.*Name the folder itself: {bundle}"):
        Bundle.open(bundle / name)


@pytest.mark.parametrize("name", ["decoder_chunk.onnx", "decoder_beams.onnx"])
def test_a_graph_that_the_manifest_does_not_list_is_not_there(bundle: Path, name: str) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    del values["files"][name]
    del values["graphs"][name.removesuffix(".onnx")]
    write_derived(bundle, values)
    (bundle / name).write_bytes(b"garbage")
    translator = Translator.load(bundle, threads=1)
    assert translator.score(["twelve"], ["zwölf"])[0].sum < 0
    assert translator.translate(["twelve"], beam_size=2)[0].text == "zwölf"


def test_weights_that_the_manifest_does_not_list_are_not_read(bundle: Path) -> None:
    edit(bundle, lambda files: files.pop("encoder.onnx.data"))
    with pytest.raises(BundleError, match=r"encoder\.onnx keeps weights in 'encoder\.onnx\.data'.*manifest names"):
        Translator.load(bundle)


def test_the_files_beside_a_graph_are_those_that_onnx_finds(numbers_bundle: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for path in numbers_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = {
            entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"
        }
        assert expected
        assert external_files(path) == expected
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="hidden")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    inner = onnx.helper.make_graph([constant], "inner", [], [])
    outer = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function("d", "f", [], ["c"], [constant], [])
    for graph, functions in (([constant], []), ([outer], []), ([], [function])):
        model = onnx.helper.make_model(onnx.helper.make_graph(graph, "g", [], []), functions=functions)
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        assert external_files(tmp_path / "x.onnx") == {"hidden"}


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\xff\x01", b"\x3a", b"\x0f", b"\x3a\x02\x2a\x05"])
def test_what_is_no_graph_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        external_files(tmp_path / "x.onnx")


def test_hashes_that_cannot_be_read_are_an_error_of_the_tree(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx cannot be read"):
        opened.check_hashes(["encoder.onnx"])
    assert asdict(FileEntry.of(bundle / "source.model"))["bytes"] == (bundle / "source.model").stat().st_size
