"""`kvx score`, and what measuring commands refuse before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx.tests.commands.running import invoke, refused


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two sources with two candidates each, as options."""
    (tmp_path / "source").write_text("one\ntwelve\n", encoding="utf-8")
    (tmp_path / "target").write_text("zwei\teins\nzwölf\televen\n", encoding="utf-8")
    return ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]


def test_candidates_are_ranked(numbers_bundle: Path, files: list[str]) -> None:
    found = invoke("score", "--model", str(numbers_bundle), *files, "--choices", "--by", "per_token")
    assert found.code == 0
    assert [line.split("\t")[0] for line in found.out.splitlines()] == ["eins", "zwölf"]


def test_a_rule_for_ranking_needs_candidates(numbers_bundle: Path, files: list[str]) -> None:
    refused(invoke("score", "--model", str(numbers_bundle), *files, "--by", "sum"), "--by has no effect without --choi")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    numbers_bundle: Path, tmp_path: Path, option: str
) -> None:
    place = tmp_path / "nowhere" / "figures"
    refused(invoke("bench", str(numbers_bundle), option, str(place)), f"{place} cannot be written")
