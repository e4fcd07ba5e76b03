"""`kvx verify`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvx.models.importers import load_checkpoint, save_checkpoint
from kvx.runtime.bundle.manifest import Manifest
from kvx.tests.commands.running import (
    NUMBERS,
    invoke,
)


def test_a_good_bundle_is_proven(numbers_bundle: Path) -> None:
    found = invoke("verify", numbers_bundle, NUMBERS)
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("parity with eager PyTorch: passed")
    assert "FAIL" not in found.out
    for name in ("files: sizes", "model: configuration and weights", "onnx: greedy", "torchscript: greedy"):
        assert f"  ok   {name}" in found.out


def test_it_translates_a_text_too(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one\n\ntwelve\n")
    found = invoke("verify", bundle, NUMBERS, "--verify-text", tmp_path / "text")
    assert found.code == 0
    assert "greedy on the verification text: 2 of 2 sentences equal" in found.out


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_the_right_files_are_proven_and_so_are_the_files(
    bundle: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "linked").mkdir()
    for path in bundle.iterdir():
        link(path, tmp_path / "linked" / path.name)
    for folder in (tmp_path / "linked", bundle):
        found = invoke("verify", folder, NUMBERS)
        assert (found.code, found.err) == (0, ""), found.out
        assert "  ok   onnx: ONNX checker" in found.out


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.ts", "target.model"])
def test_an_altered_file_is_a_difference(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    found = invoke("verify", bundle, NUMBERS)
    assert found.code == 1
    assert f"FAIL files: sizes and sha256: {bundle / name} " in found.out


def test_other_weights_are_a_difference(numbers_bundle: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(NUMBERS)
    with torch.no_grad():
        checkpoint.model.head.weight[0, 0] += 1e-3
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    found = invoke("verify", numbers_bundle, tmp_path / "model.pt")
    assert found.code == 1
    assert "FAIL model: configuration and weights: differing in head.weight" in found.out


def test_other_weights_are_a_difference_without_the_bundles_own_checkpoint(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(bundle)
    replace(manifest, files={n: entry for n, entry in manifest.files.items() if n != "model.pt"}).write(bundle)
    checkpoint = load_checkpoint(NUMBERS)
    with torch.no_grad():
        checkpoint.model.head.weight[5] += 1e-2
    save_checkpoint(checkpoint, tmp_path / "other.pt")
    found = invoke("verify", bundle, tmp_path / "other.pt")
    assert found.code == 1
    assert re.search(r"FAIL onnx: logits .* over 0\.0001", found.out)


def test_another_model_is_a_difference(numbers_bundle: Path, tiny_checkpoint_folder: Path) -> None:
    found = invoke("verify", numbers_bundle, tiny_checkpoint_folder / "model.pt")
    assert found.code == 1
    assert "FAIL model: configuration and weights: differing in d_model" in found.out


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    found = invoke("verify", tmp_path / "nowhere", NUMBERS)
    assert (found.code, found.out) == (2, "")
    assert "nowhere" in found.err


def test_a_missing_checkpoint_is_refused(numbers_bundle: Path, tmp_path: Path) -> None:
    found = invoke("verify", numbers_bundle, tmp_path / "nowhere.pt")
    assert (found.code, found.out) == (2, "")
    assert "nowhere.pt" in found.err
