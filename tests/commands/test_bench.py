"""`kvx bench`: the load of a service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvx.tests.commands.running import invoke, refused


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    file = tmp_path / "requests"
    file.write_text("one\nforty-two\n\nnine hundred\n", encoding="utf-8")
    return file


def test_the_load_of_a_service_is_a_table_figures_and_a_page(
    numbers_bundle: Path, tmp_path: Path, requests: Path
) -> None:
    figures, page = tmp_path / "figures", tmp_path / "page"
    files = "--text", requests, "--json", figures, "--plot", page
    found = invoke("bench", numbers_bundle, *files, "--arrivals", "200,400", "--requests", "5", "--device", "cpu")
    assert found.code == 0
    assert [line.split()[1] for line in found.out.splitlines() if line.startswith("|  ")] == ["200", "400"]
    assert "ms/step" not in found.out
    values = json.loads(figures.read_text(encoding="utf-8"))
    assert [(cost["rate"], cost["requests"]) for cost in values["rates"]] == [(200, 8), (400, 8)]
    assert page.read_text(encoding="utf-8").count("<svg") == 6


@pytest.mark.parametrize("rates", ["0", "-5", "5,x", "", "nan", "9,3"])
def test_rates_that_are_not_positive_numbers_are_refused(numbers_bundle: Path, requests: Path, rates: str) -> None:
    refused(invoke("bench", numbers_bundle, "--text", requests, f"--arrivals={rates}"), "--arrivals is", "positive")


def test_arrivals_need_texts(numbers_bundle: Path) -> None:
    refused(invoke("bench", numbers_bundle, "--arrivals", "auto"), "--arrivals needs texts", "Add --text")


def test_a_file_without_a_text_is_refused(numbers_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "empty"
    for content in ("", "\n \n"):
        file.write_text(content, encoding="utf-8")
        refused(invoke("bench", numbers_bundle, "--text", file, "--arrivals", "5", "--device", "cpu"), "There is no ")


def test_options_of_the_other_measurements_have_no_effect_on_a_load(numbers_bundle: Path, requests: Path) -> None:
    found = invoke("bench", numbers_bundle, "--text", requests, "--arrivals", "5", "--rows", "4", "--tokens", "9")
    refused(found, "--rows has no effect with --arrivals", "--tokens has no effect with --arrivals")
    refused(invoke("bench", numbers_bundle, "--requests", "5"), "--requests has no effect without --arrivals")
