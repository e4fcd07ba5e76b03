"""The demo that comes with the project: number words from English to German, exported and right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvx import Translator

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "artifacts" / "numbers-checkpoint"
EXACT_SHARE = 0.995
LARGEST_BYTES = 5 * 10**6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_numbers", ROOT / "scripts" / "train_numbers.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where its dataclasses look for their annotations
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (2, "two", "zwei"),
        (7, "seven", "sieben"),
        (11, "eleven", "elf"),
        (12, "twelve", "zwölf"),
        (13, "thirteen", "dreizehn"),
        (15, "fifteen", "fünfzehn"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (18, "eighteen", "achtzehn"),
        (20, "twenty", "zwanzig"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (40, "forty", "vierzig"),
        (55, "fifty-five", "fünfundfünfzig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (80, "eighty", "achtzig"),
        (99, "ninety-nine", "neunundneunzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (111, "one hundred and eleven", "einhundertelf"),
        (121, "one hundred and twenty-one", "einhunderteinundzwanzig"),
        (300, "three hundred", "dreihundert"),
        (999, "nine hundred and ninety-nine", "neunhundertneunundneunzig"),
        (1000, "one thousand", "eintausend"),
        (1001, "one thousand and one", "eintausendeins"),
        (1100, "one thousand one hundred", "eintausendeinhundert"),
        (1101, "one thousand one hundred and one", "eintausendeinhunderteins"),
        (12304, "twelve thousand three hundred and four", "zwölftausenddreihundertvier"),
        (21000, "twenty-one thousand", "einundzwanzigtausend"),
        (100_000, "one hundred thousand", "einhunderttausend"),
        (101_000, "one hundred and one thousand", "einhunderteintausend"),
        (
            999_999,
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
        ),
    ],
)
def test_known_numbers_are_spelled_as_they_should_be(
    script: ModuleType, number: int, english: str, german: str
) -> None:
    assert script.english(number) == english
    assert script.german(number) == german


def test_no_two_numbers_are_spelled_alike(script: ModuleType) -> None:
    numbers = [*range(3000), *range(99_000, 103_000)]
    assert len({script.english(number) for number in numbers}) == len(numbers)
    assert len({script.german(number) for number in numbers}) == len(numbers)


def test_held_out_numbers_are_never_trained_on(script: ModuleType) -> None:
    training, held_out = script.split()
    assert len(set(held_out)) == len(held_out) == 2000
    assert len(set(training)) == len(training)
    assert set(training).isdisjoint(held_out)
    assert {len(str(number)) for number in held_out} == {1, 2, 3, 4, 5, 6}
    assert script.split() == (training, held_out)


def test_held_out_numbers_are_translated_exactly(script: ModuleType, numbers_translator: Translator) -> None:
    held_out = script.split().held_out
    translations = numbers_translator.translate([script.english(number) for number in held_out])
    right = sum(
        translation.text == script.german(number) for number, translation in zip(held_out, translations, strict=True)
    )
    assert right / len(held_out) >= EXACT_SHARE


def test_the_demo_is_small(numbers_bundle: Path) -> None:
    files = [*CHECKPOINT.iterdir(), *numbers_bundle.iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES
