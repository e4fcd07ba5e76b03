"""`kvx inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvx.runtime.bundle.manifest import Manifest
from kvx.tests.commands.running import (
    Run,
    refused,
)


def test_it_shows_graphs_limits_and_parity(run: Run, numbers_bundle: Path) -> None:
    found = run("inspect", numbers_bundle)
    assert (found.code, found.err) == (0, "")
    manifest = Manifest.read(numbers_bundle)
    for text in (
        "past_key_values.1.encoder.value      float32  [B, 4, S, 16]",
        "logits                               float32  [B, 72]",
        "source positions 64, target positions 64",
        "new tokens by default 32",
        "per source token 1,024, per target token 1,024",
        "parity with eager PyTorch: passed",
        "ok   onnx: greedy on drawn ids",
        *manifest.files,
    ):
        assert text in found.out


def test_json_is_the_manifest(run: Run, numbers_bundle: Path) -> None:
    found = run("inspect", "--json", numbers_bundle)
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out) == json.loads((numbers_bundle / "manifest.json").read_text())


def test_a_bundle_without_a_proof_says_so(run: Run, bundle: Path) -> None:
    replace(Manifest.read(bundle), parity=None).write(bundle)
    assert "parity: not proven (exported without a proof)\n" in run("inspect", bundle).out


@pytest.mark.parametrize(
    "garble",
    [
        lambda values: values.update(parity={}),
        lambda values: values["model"].pop("decoder_d_ff"),
        lambda values: values["files"].update({"a" * 300: {"bytes": 1, "sha256": "0"}}),
    ],
)
def test_a_garbled_manifest_is_refused(run: Run, bundle: Path, garble: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    garble(values)
    (bundle / "manifest.json").write_text(json.dumps(values))
    refused(run("inspect", bundle))


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_missing_bundle_is_refused(run: Run, arguments: list[str]) -> None:
    refused(run("inspect", "nowhere", *arguments), "nowhere")
