"""What a Translator uses is what was checked when it was loaded, for as long as it lives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvx import BundleError, Translator
from kvx.runtime.bundle.files import FileEntry, Files
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.backend import shortlisting_of

pytestmark = pytest.mark.usefixtures("plain_graphs")

WEIGHTS = "decoder_step.onnx.data"
CHANGED = r"has changed on disk since the bundle was loaded\. .* Load the bundle again\."

Use = Callable[[Translator], object]
LATE: dict[str, Use] = {
    "decoder_chunk.onnx": lambda translator: translator.score(["twelve"], ["zwölf"]),
    "decoder_beams.onnx": lambda translator: translator.translate(["twelve"], beam_size=2),
}


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


def other_weights(path: Path) -> bytes:
    return bytes(byte ^ 1 for byte in path.read_bytes())


def translated(translator: Translator) -> str:
    return translator.translate(["twelve"])[0].text


@pytest.mark.parametrize("use", LATE.values(), ids=LATE)
def test_graphs_that_are_opened_late_are_not_those_of_a_bundle_that_took_its_place(bundle: Path, use: Use) -> None:
    translator = Translator.load(bundle, threads=1)
    bundle.rename(bundle.with_name("old"))
    shutil.copytree(bundle.with_name("old"), bundle)
    (bundle / WEIGHTS).write_bytes(other_weights(bundle / WEIGHTS))
    with pytest.raises(BundleError, match=CHANGED):
        use(translator)
    assert translated(translator) == "zwölf"  # its weights are still those that were loaded


@pytest.mark.parametrize(("file", "use"), LATE.items(), ids=LATE)
def test_a_late_graph_that_is_gone_is_an_error(bundle: Path, file: str, use: Use) -> None:
    translator = Translator.load(bundle, threads=1)
    (bundle / file).unlink()
    with pytest.raises(BundleError, match=f"{file} {CHANGED}"):
        use(translator)


def test_weights_that_are_written_over_while_they_are_mapped_are_an_error(bundle: Path) -> None:
    translator = Translator.load(bundle, threads=1)
    assert translated(translator) == "zwölf"
    content = other_weights(bundle / WEIGHTS)
    with (bundle / WEIGHTS).open("r+b") as file:
        file.write(content)
    with pytest.raises(BundleError, match=f"{WEIGHTS} {CHANGED}"):
        translated(translator)


@pytest.mark.parametrize("use", LATE.values(), ids=LATE)
def test_files_that_are_touched_moved_or_replaced_by_their_equals_are_the_same(bundle: Path, use: Use) -> None:
    translator = Translator.load(bundle, threads=1)
    for path in bundle.iterdir():
        os.utime(path, (1e9, 1e9))
    use(translator)
    assert translated(translator) == "zwölf"
    translator = Translator.load(bundle, threads=1)
    bundle.rename(bundle.with_name("old"))
    shutil.copytree(bundle.with_name("old"), bundle)
    use(translator)
    assert translated(translator) == "zwölf"


@pytest.mark.parametrize("in_place", [True, False])
def test_the_output_projection_is_the_one_that_was_checked(
    shortlist_bundle: Path, tmp_path: Path, in_place: bool
) -> None:
    folder = Path(shutil.copytree(shortlist_bundle, tmp_path / "bundle"))
    shortlisting = shortlisting_of(Translator.load(folder, threads=1)._model.backend)
    assert shortlisting is not None
    content = (folder / "projection.npy").read_bytes()
    if in_place:
        assert shortlisting.projection.any()  # mapped from here on
    (folder / "projection.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=rf"projection\.npy {CHANGED}"):
        shortlisting.bind(None) if in_place else shortlisting.projection  # type: ignore[arg-type]


def test_a_tokenizer_that_changes_while_the_bundle_is_loaded_is_an_error(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "source.model").write_bytes(other_weights(bundle / "source.model"))
    with pytest.raises(BundleError, match=rf"source\.model {CHANGED}"):
        opened.files.check(["source.model"])


def test_a_folder_without_a_manifest_owns_all_that_it_holds(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    files = Files(tmp_path)
    assert ("x" in files, "y" in files) == (True, False)
    (tmp_path / "x").write_bytes(b"22")
    files.check(["x"])
    files.check_open(["x"])
    assert "x" not in Files(tmp_path, {"y": FileEntry(1, "0" * 64)})
