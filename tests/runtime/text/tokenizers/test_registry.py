"""The kinds of tokenizers by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvx.runtime.errors import BundleError, TokenizerError
from kvx.runtime.text.tokenizers.registry import KINDS, open_tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

NUMBERS = Path(__file__).resolve().parents[4] / "artifacts" / "numbers-checkpoint"


def test_sentencepiece_alone_is_a_kind() -> None:
    tokenizer = open_tokenizer("sentencepiece", {"model": NUMBERS / "source.model"})
    assert isinstance(tokenizer, SentencePiece)
    assert tokenizer.decode(tokenizer.encode("twelve")) == "twelve"


@pytest.mark.parametrize("kind", ["", "spm", "Vocabulary", None, 3, ["sentencepiece"], "x" * 10_000])
def test_an_unknown_kind_names_those_that_are_known(kind: Any, tmp_path: Path) -> None:  # noqa: ANN401
    with pytest.raises(BundleError, match=", ".join(KINDS)) as caught:
        open_tokenizer(kind, {"model": tmp_path})
    assert len(str(caught.value)) < 400


WITH_FILES = [kind for kind in KINDS if KINDS[kind].roles]


@pytest.mark.parametrize("kind", WITH_FILES)
@pytest.mark.parametrize("roles", [(), ("other",), ("model", "vocabulary", "tokenizer")])
def test_files_have_the_roles_of_the_kind(kind: str, roles: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=", ".join(KINDS[kind].roles)):
        open_tokenizer(kind, dict.fromkeys(roles, tmp_path))


def test_bytes_need_no_files(tmp_path: Path) -> None:
    tokenizer = open_tokenizer("bytes", {})
    assert tokenizer.decode(tokenizer.encode("Straße 🐸")) == "Straße 🐸"
    assert tokenizer.surfaces("a ß") == ("a", "▁", "ß", "")
    with pytest.raises(BundleError, match="no files"):
        open_tokenizer("bytes", {"model": tmp_path})


@pytest.mark.parametrize("kind", WITH_FILES)
def test_files_that_are_missing_are_errors_of_tokenizers(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nothing"):
        open_tokenizer(kind, dict.fromkeys(KINDS[kind].roles, tmp_path / "nothing"))


def test_knowing_the_kinds_loads_none_of_them() -> None:
    script = "import kvx, sys, kvx.runtime.text.tokenizers.registry; print(*sys.modules)"
    line = [sys.executable, "-c", script]
    loaded = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert not {"sentencepiece", "tokenizers", "transformers", "torch"}.intersection(loaded)
