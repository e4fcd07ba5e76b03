from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kvx import BundleError, DeviceError, TokenizerError, Translator
from kvx.runtime.bundle.folder import Bundle, newest_bundle
from kvx.runtime.bundle.manifest import FORMAT_VERSION, LARGEST_MANIFEST, FileEntry, Manifest
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, cache_specs, encoder_signature, step_signature
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

pytestmark = pytest.mark.usefixtures("plain_graphs")

MODEL_SIZES = [
    "source_vocab_size",
    "target_vocab_size",
    "d_model",
    "encoder_layers",
    "encoder_heads",
    "encoder_head_width",
    "encoder_d_ff",
    "decoder_layers",
    "decoder_heads",
    "decoder_head_width",
    "decoder_d_ff",
    "source_positions",
    "target_positions",
]
FIELDS = [
    "format_version",
    "created",
    "kvx_version",
    "model",
    "precision",
    "lowering",
    "opset",
    "formats",
    "max_new_tokens",
    "framing",
    "languages",
    "tokenizers",
    "family",
    "defaults",
    "files",
    "parity",
    "features",
    "limits",
    "graphs",
]
ESCAPES = ["../x", "/etc/passwd", "a/b", "a\\b", "C:x", "..", ".", "", "./x", "a/../x", "\\\\host\\x", "a" * 300, "x\0"]


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


def values_of(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return values


def write(bundle: Path, values: object) -> None:
    (bundle / "manifest.json").write_text(json.dumps(values))


def derive(values: dict[str, Any]) -> None:
    """Makes the manifest's derived fields agree with its model, whatever that is."""
    dimensions = Dimensions.of_model(values["model"])
    graphs = {
        "encoder": encoder_signature(dimensions),
        "decoder_step": step_signature(dimensions, StepFeatures(**values["features"])),
        "decoder_chunk": step_signature(dimensions, StepFeatures(query_tokens=True)),
        "decoder_beams": step_signature(dimensions, StepFeatures(**values["features"]).beams),
    }
    if "decoder_kernels.onnx" in values["files"]:
        graphs["decoder_kernels"] = graphs["decoder_beams"]
    values["graphs"] = {
        name: {
            side: [{"name": spec.name, "type": spec.dtype, "axes": list(spec.axes)} for spec in getattr(graph, side)]
            for side in ("inputs", "outputs")
        }
        for name, graph in graphs.items()
    }
    specs = cache_specs(dimensions)
    values["limits"] = {
        "source_positions": values["model"]["source_positions"],
        "target_positions": values["model"]["target_positions"],
        "cache_bytes_per_source_token": Capacity(1, 0, 1).bytes(specs),
        "cache_bytes_per_target_token": Capacity(1, 1, 0).bytes(specs),
    }


def accept(bundle: Path) -> None:
    """Makes the manifest agree with the files as they are now."""
    values = values_of(bundle)
    for name in values["files"]:
        values["files"][name] = asdict(FileEntry.of(bundle / name))
    write(bundle, values)


def refused(action: Callable[[], object], *mentions: str) -> None:
    """A BundleError that says what was got, what was expected and what to do."""
    with pytest.raises(BundleError) as raised:
        action()
    error = raised.value
    assert all(part.strip() for part in (error.got, error.expected, error.remedy))
    for mention in mentions:
        assert mention in str(error)


def test_a_bundle_opens_as_it_was_written(numbers_bundle: Path) -> None:
    opened = Bundle.open(numbers_bundle)
    opened.check_hashes()
    assert {path.name for path in numbers_bundle.iterdir()} == {"manifest.json", *opened.manifest.files}


def test_a_bundle_moves_as_a_folder(bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "elsewhere")
    assert Translator.load(moved).translate(["twelve"])[0].text == "zwölf"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    refused(lambda: Bundle.open(tmp_path / "x"), str(tmp_path / "x"), "manifest.json", "kvx export")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_manifest_that_is_no_json_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refused(lambda: Bundle.open(bundle), str(bundle / "manifest.json"), "cannot be read")


@pytest.mark.parametrize("values", [None, [], 1, "manifest", True])
def test_a_manifest_of_another_type_is_refused(bundle: Path, values: object) -> None:
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "not an object")


def test_a_manifest_that_is_a_folder_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()
    refused(lambda: Bundle.open(bundle), "cannot be read")


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    with (bundle / "manifest.json").open("ab") as file:
        file.write(b" " * LARGEST_MANIFEST)
    refused(lambda: Bundle.open(bundle), f"larger than {LARGEST_MANIFEST} bytes")


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_without_one_of_its_fields_is_refused(bundle: Path, field: str) -> None:
    values = values_of(bundle)
    del values[field]
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "manifest.json", field)


@pytest.mark.parametrize("field", MODEL_SIZES)
def test_a_manifest_without_one_of_the_models_sizes_is_refused(bundle: Path, field: str) -> None:
    values = values_of(bundle)
    del values["model"][field]
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "manifest.json", field)


def test_deriving_a_manifest_anew_changes_nothing(bundle: Path) -> None:
    values = values_of(bundle)
    derive(values)
    assert values == values_of(bundle)


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("field", MODEL_SIZES)
def test_sizes_below_one_are_refused_though_the_manifest_agrees_with_itself(
    bundle: Path, field: str, size: int
) -> None:
    values = values_of(bundle)
    values["model"][field] = size
    if values["model"].get("decoder_heads"):  # else nothing can be derived
        derive(values)
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "manifest.json")


@pytest.mark.parametrize("size", [-1, 0, 65, None])
def test_a_default_limit_that_the_model_cannot_have_is_refused(bundle: Path, size: object) -> None:
    write(bundle, values_of(bundle) | {"max_new_tokens": size})
    refused(lambda: Bundle.open(bundle), "manifest.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("opset", float("inf")),
        ("opset", "x"),
        ("model", None),
        ("model", []),
        ("formats", 5),
        ("formats", "onnx"),
        ("created", "yesterday"),  # the newest bundle is found by it
        ("framing", {"pad": 0}),
        ("features", None),
        ("features", {"unknown": True}),
        ("files", []),
        ("files", {"encoder.onnx": 1}),
        ("files", {"encoder.onnx": {"bytes": 1}}),
        ("parity", "fine"),
        ("parity", {}),
    ],
)
def test_a_garbled_field_is_refused(bundle: Path, field: str, value: object) -> None:
    write(bundle, values_of(bundle) | {field: value})
    refused(lambda: Bundle.open(bundle), "manifest.json")


def test_a_hash_that_is_no_text_is_refused(bundle: Path) -> None:
    values = values_of(bundle)
    values["files"]["encoder.onnx"]["sha256"] = 5
    write(bundle, values)
    refused(lambda: Bundle.open(bundle).check_hashes())


@pytest.mark.parametrize(
    "path", ["limits.source_positions", "limits.cache_bytes_per_target_token", "model.decoder_head_width"]
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle: Path, path: str) -> None:
    values = values_of(bundle)
    part, name = path.split(".")
    values[part][name] *= 2
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "contradicts itself in", "limits")


def test_a_manifest_whose_graphs_are_not_the_models_is_refused(bundle: Path) -> None:
    values = values_of(bundle)
    values["graphs"]["decoder_step"]["inputs"].pop()
    write(bundle, values)
    refused(lambda: Bundle.open(bundle), "contradicts itself in graphs")


def test_absurdly_many_layers_are_refused_at_once(bundle: Path) -> None:
    values = values_of(bundle)
    values["model"]["decoder_layers"] = 10**12
    write(bundle, values)
    script = (
        "import resource, sys; from pathlib import Path; from kvx.runtime.bundle.folder import Bundle, BundleError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: Bundle.open(Path(sys.argv[1]))\n"
        "except BundleError: print('refused')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout == "refused\n", run.stderr[-300:]


def test_a_newer_format_version_is_refused_with_the_remedy(bundle: Path) -> None:
    write(bundle, {"format_version": FORMAT_VERSION + 1})
    refused(lambda: Bundle.open(bundle), f"format version {FORMAT_VERSION + 1}", "Upgrade kvx")


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.ts", "target.model"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(lambda: Bundle.open(bundle), name, "not there")


@pytest.mark.parametrize("name", ["encoder.onnx", "model.pt", "target.model"])
def test_a_file_of_another_size_is_named(bundle: Path, name: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    refused(lambda: Bundle.open(bundle), name, f"{size - 1} bytes", f"{size} bytes")


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.onnx", "source.model", "target.model"])
def test_an_altered_file_of_equal_size_is_named_when_loading(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    refused(lambda: Translator.load(bundle), name, "sha256", hashlib.sha256(content).hexdigest()[:12])


def test_an_altered_torchscript_file_is_named_when_loading(bundle: Path) -> None:
    pytest.importorskip("torch")
    content = bytearray((bundle / "decoder_step.ts").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "decoder_step.ts").write_bytes(content)
    refused(lambda: Translator.load(bundle, backend="torchscript"), "decoder_step.ts", "sha256")


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name)[:12])
def test_names_that_are_no_plain_file_names_are_refused_though_such_a_file_is_there(bundle: Path, name: str) -> None:
    (bundle / "a").mkdir()
    with contextlib.suppress(OSError, ValueError):  # some of them no file can have
        if not (bundle / name).exists():
            (bundle / name).write_bytes(b"secret")
    values = values_of(bundle)
    values["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    if name.startswith("/etc"):
        values["files"][name] = asdict(FileEntry.of(Path(name)))
    write(bundle, values)
    refused(lambda: Bundle.open(bundle))


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.onnx", "source.model", "target.model"])
def test_a_file_that_is_not_in_the_manifest_is_never_used(bundle: Path, name: str) -> None:
    values = values_of(bundle)
    del values["files"][name]
    write(bundle, values)
    refused(lambda: Translator.load(bundle), name)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.onnx"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, None])
def test_a_garbled_graph_with_the_right_hash_is_refused(bundle: Path, name: str, content: bytes | None) -> None:
    original = (bundle / name).read_bytes()
    (bundle / name).write_bytes(original[: len(original) // 2] if content is None else content)
    accept(bundle)
    refused(lambda: Translator.load(bundle), name, "Export the bundle again")


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_a_garbled_torchscript_module_with_the_right_hash_is_refused(bundle: Path, content: bytes) -> None:
    pytest.importorskip("torch")
    (bundle / "encoder.ts").write_bytes(content)
    accept(bundle)
    refused(lambda: Translator.load(bundle, backend="torchscript"), "encoder.ts", "Export the bundle again")


@pytest.mark.parametrize(
    ("backend", "encoder", "step"),
    [("onnx", "encoder.onnx", "decoder_step.onnx"), ("torchscript", "encoder.ts", "decoder_step.ts")],
)
def test_a_swapped_graph_with_the_right_hash_is_refused(bundle: Path, backend: str, encoder: str, step: str) -> None:
    if backend == "torchscript":
        pytest.importorskip("torch")
    shutil.copyfile(bundle / encoder, bundle / step)
    accept(bundle)
    refused(lambda: Translator.load(bundle, backend=backend), step, "inputs", "Export the bundle again")


def test_a_graph_of_another_model_with_the_right_hash_is_refused(bundle: Path, tiny_bundle: Path) -> None:
    shutil.copyfile(tiny_bundle / "decoder_step.onnx", bundle / "decoder_step.onnx")
    accept(bundle)
    refused(lambda: Translator.load(bundle), "decoder_step.onnx", "past_key_values.0.decoder.key")


def use_external_data(path: Path, location: str) -> bytes:
    """Has the graph's largest tensor read from `location`, and returns what belongs there."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    data = bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return data


@pytest.mark.parametrize("graph", ["encoder.onnx", "decoder_step.onnx"])
@pytest.mark.parametrize("escape", ["../weights", "sub/../../weights", "absolute"])
def test_external_data_outside_of_the_folder_is_refused_unread(bundle: Path, graph: str, escape: str) -> None:
    outside = bundle.parent / "weights"
    data = use_external_data(bundle / graph, str(outside) if escape == "absolute" else escape)
    accept(bundle)
    messages = []
    for content in (data, b"garbage", None):  # what is there makes no difference
        outside.unlink(missing_ok=True)
        if content is not None:
            outside.write_bytes(content)
        with pytest.raises(BundleError, match=graph) as raised:
            Translator.load(bundle)
        messages.append(str(raised.value))
    assert len(set(messages)) == 1


def test_external_data_behind_a_link_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "weights"
    outside.write_bytes(use_external_data(bundle / "encoder.onnx", "weights"))
    (bundle / "weights").symlink_to(outside)
    accept(bundle)
    refused(lambda: Translator.load(bundle), "encoder.onnx")


def test_external_data_in_the_manifest_is_loaded_and_hashed(bundle: Path) -> None:
    data = bundle / "encoder.onnx.data"
    data.write_bytes(use_external_data(bundle / "encoder.onnx", data.name))
    values = values_of(bundle)
    values["files"][data.name] = {}
    write(bundle, values)
    accept(bundle)
    assert Translator.load(bundle).translate(["twelve"])[0].text == "zwölf"
    data.write_bytes(bytes(data.stat().st_size))
    refused(lambda: Translator.load(bundle), data.name, "sha256")


def test_a_tokenizer_that_is_not_the_manifests_is_refused(bundle: Path) -> None:
    shutil.copyfile(bundle / "source.model", bundle / "target.model")
    accept(bundle)
    with pytest.raises(TokenizerError, match=r"target\.model has 64 pieces.* 72 pieces"):
        Translator.load(bundle)


def test_special_ids_that_are_not_the_tokenizers_are_refused(bundle: Path) -> None:
    values = values_of(bundle)
    values["framing"]["eos"] = 5
    write(bundle, values)
    with pytest.raises(TokenizerError, match=r"Expected \(2, 5\)"):
        Translator.load(bundle)


def test_a_garbled_tokenizer_is_refused(bundle: Path) -> None:
    (bundle / "source.model").write_bytes(b"garbage")
    accept(bundle)
    with pytest.raises(TokenizerError, match=r"source\.model"):
        Translator.load(bundle)


def test_a_backend_that_the_bundle_has_no_files_for_is_refused(bundle: Path) -> None:
    pytest.importorskip("torch")
    values = values_of(bundle)
    values["formats"] = ["onnx"]
    for name in ("encoder.ts", "decoder_step.ts", "model.pt"):
        (bundle / name).unlink()
        del values["files"][name]
    write(bundle, values)
    assert Translator.load(bundle).translate(["one"])[0].text == "eins"
    refused(lambda: Translator.load(bundle, backend="torchscript"), "encoder.ts", "formats it has: onnx", "`format`")


def test_an_unknown_backend_is_refused(numbers_bundle: Path) -> None:
    with pytest.raises(DeviceError, match=r"tensorrt.* Expected onnx"):
        Translator.load(numbers_bundle, backend="tensorrt")


class TestNewestBundle:
    @pytest.fixture
    def artifacts(self, numbers_bundle: Path, tmp_path: Path) -> Path:
        """Three bundles: the newest is neither first nor last by name, and the oldest file."""
        manifest = Manifest.read(numbers_bundle)
        for age, (name, day) in enumerate([("b", 3), ("c", 2), ("a", 1)]):
            folder = tmp_path / "artifacts" / name
            folder.mkdir(parents=True)
            replace(manifest, created=f"2025-01-0{day}T00:00:00.000000+00:00").write(folder)
            os.utime(folder / "manifest.json", (1e9 + age, 1e9 + age))
            os.utime(folder, (1e9 + age, 1e9 + age))
        return tmp_path / "artifacts"

    def test_is_the_one_created_last(self, artifacts: Path) -> None:
        assert newest_bundle(artifacts) == artifacts / "b"

    def test_is_no_hidden_folder_of_an_export_that_has_not_ended(self, artifacts: Path) -> None:
        partial = artifacts / ".a.123.partial"
        partial.mkdir()
        replace(Manifest.read(artifacts / "a"), created="2026-01-01T00:00:00.000000+00:00").write(partial)
        assert newest_bundle(artifacts) == artifacts / "b"

    def test_is_no_damaged_or_foreign_folder(self, artifacts: Path) -> None:
        (artifacts / "d").mkdir()
        (artifacts / "d" / "manifest.json").write_text('{"created": "2030"}')
        (artifacts / "e").mkdir()
        (artifacts / "f").touch()
        assert newest_bundle(artifacts) == artifacts / "b"

    @pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
    def test_is_an_error_where_there_is_none(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        make(tmp_path / "artifacts")
        refused(lambda: newest_bundle(tmp_path / "artifacts"), "no bundle below", "`model`")


@pytest.mark.parametrize(("name", "piece"), [("source.model", b"\x03one\x15"), ("target.model", b"\x03und\x15")])
def test_a_tokenizer_whose_pieces_are_no_text_is_an_error_when_they_are_met(
    bundle: Path, name: str, piece: bytes
) -> None:
    content = (bundle / name).read_bytes()
    assert content.count(piece) == 1
    (bundle / name).write_bytes(content.replace(piece, b"\x03\xff\xfe\xfd\x15"))
    accept(bundle)
    tokenizer = SentencePiece(bundle / name)
    with pytest.raises(TokenizerError, match=rf"{name} .*pieces are text"):
        tokenizer.pieces(range(len(tokenizer)))
    if name == "target.model":
        with pytest.raises(TokenizerError, match=rf"{name} .*pieces are text"):
            Translator.load(bundle, threads=1).translate(["twenty-one"])
