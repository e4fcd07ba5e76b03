"""Which language a text is in: one of those that models translate from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("py3langid")

from kvx.runtime.serving.detection import Detector

GERMAN = "Der kleine Hund läuft schnell über die grüne Wiese."
ENGLISH = "The small dog runs quickly across the green meadow."
CHINESE = "小狗在绿色的草地上跑得很快。"


@pytest.fixture(scope="module")
def detector() -> Detector:
    """One for most tests: loading takes a second."""
    return Detector(["en", "de", "zh-Hans", "zh-Hant"])


def test_a_text_is_told_by_its_words(detector: Detector) -> None:
    assert [detector.detect(text).language for text in (GERMAN, ENGLISH, CHINESE)] == ["de", "en", "zh-Hans"]
    assert detector.detect(GERMAN).confidence > 0.9


def test_only_the_languages_of_models_are_found() -> None:
    assert Detector(["fr", "nl"]).detect(GERMAN).language in ("fr", "nl")


def test_probabilities_are_in_order_and_sum_up_to_one(detector: Detector) -> None:
    found = [one.confidence for one in detector.rank("in")]
    assert found == sorted(found, reverse=True)
    assert 0.9 < sum(found) <= 1.001


@pytest.mark.parametrize("text", ["", " ", "123", "\0", "\ud800", "😀" * 9, pytest.param("x" * 100_000, id="long")])
def test_any_text_is_in_some_language(detector: Detector, text: str) -> None:
    assert detector.detect(text).language in ("en", "de", "zh-Hans")


def test_languages_that_nobody_can_tell_are_no_trouble() -> None:
    assert Detector(["tlh", "en"]).detect(ENGLISH).language == "en"
    assert Detector(["tlh", "x"]).detect(ENGLISH) == ("tlh", 0.0)
    assert not Detector([]).useful


def test_threads_that_ask_first_all_get_an_answer() -> None:
    asked_first = Detector(["en", "de"])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: asked_first.detect(GERMAN).language, range(32)))
    assert set(found) == {"de"}
