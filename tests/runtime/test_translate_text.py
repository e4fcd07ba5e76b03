"""`Translator.translate_text`: whole texts and HTML, sentence by sentence."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx import DecodeStats, InputError, OptionError, TranslateOptions, Translator
from kvx.testing import FakeTranslator

NEEDS = "sentences are found by the package sentencex"


def fake(**options: Any) -> FakeTranslator:  # noqa: ANN401  # those of FakeTranslator
    pytest.importorskip("sentencex", reason=NEEDS)
    return FakeTranslator(**options)


def test_sentences_are_translated_and_what_stands_between_them_stays() -> None:
    text = "  Ein Hund. Er schläft!\r\n\r\n\t- Zwei Katzen\n***\n"
    assert fake().translate_text(text) == text.upper()


def test_a_model_translates_a_paragraph(numbers_translator: Translator) -> None:
    pytest.importorskip("sentencex", reason=NEEDS)
    assert numbers_translator.translate_text("one\n\n  twelve\n") == "eins\n\n  zwölf\n"


def test_the_markup_of_html_stays() -> None:
    page = "<p title='ein hund'>ein <b>hund</b> &amp; <code>hund</code></p>"
    assert fake().translate_text(page, html=True) == "<p title='EIN HUND'>EIN <b>HUND</b> &amp; <code>hund</code></p>"


def test_a_sentence_with_an_element_in_it_is_translated_whole() -> None:
    words = {"ein": "one", "hund": "Dog.", "läuft": "walks", "ein hund läuft": "a dog runs"}
    told = list[int]()
    page = "<p>ein <b>hund</b> läuft</p>"
    assert fake(translations=words).translate_text(page, html=True, progress=told.append) == "<p>a <b>dog</b> runs</p>"
    assert told[-1] == len(words)


def test_a_translation_that_looks_like_markup_is_escaped() -> None:
    found = fake(translations={"a": "<script>"})
    assert found.translate_text("<p>a</p>", html=True) == "<p>&lt;script&gt;</p>"
    assert found.translate_text("a") == "<script>"


@pytest.mark.parametrize("text", ["", "\n", "😀", " * * * "])
def test_a_text_without_a_sentence_comes_back_as_it_is(text: str) -> None:
    assert fake().translate_text(text) == text


@given(st.text("aB.! \n\r\u3000你。", max_size=40))
def test_lines_stay_lines(text: str) -> None:
    found = fake(translations=str).translate_text(text)
    assert len(found.splitlines()) == len(text.splitlines())


@pytest.mark.parametrize("language", ["en", "de"])
def test_sentences_are_found_by_the_rules_of_the_source_language(language: str) -> None:
    told = list[int]()
    translator, options = fake(languages=["en", "de"]), TranslateOptions(source_language=language, target_language="en")
    translator.translate_text("Am 3. Oktober.", options, progress=told.append)
    assert len(told) == (1 if language == "de" else 2)


def test_the_default_language_of_the_bundle_counts_where_none_is_named() -> None:
    told = list[int]()
    fake(languages=["de", "en"]).translate_text("Am 3. Oktober.", target_language="en", progress=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("changes", [{"samples": 2}, {"beam_size": 2, "n_best": 2}])
def test_options_that_ask_for_several_translations_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="one translation") as caught:
        fake().translate_text("Hallo", **changes)  # type: ignore[arg-type]
    assert caught.value.option in changes


@pytest.mark.parametrize("name", ["source_language", "target_language"])
def test_a_language_for_each_text_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"one `{name}`"):
        fake(languages=["de"]).translate_text("Hallo", TranslateOptions(**{name: ("de",)}))  # type: ignore[arg-type]


def test_a_sentence_that_is_too_long_is_named_by_its_number() -> None:
    with pytest.raises(InputError, match=r"^Sentence 2: The text has \d+ tokens") as caught:
        fake(positions=20).translate_text("Kurz.\n" + "lang" * 9)
    assert caught.value.line is None
    assert caught.value.option == "on_long"


def test_a_sentence_that_is_cut_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvx"):
        found = fake(positions=20).translate_text("Kurz.\n" + "lang" * 9, on_long="truncate")
    assert found == "KURZ.\n" + ("LANG" * 9)[:19]
    assert "1 sentences were cut to the model's positions (numbers 2)" in caplog.text


def test_translations_that_stop_at_the_limit_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvx"):
        fake().translate_text("Lang.\n" * 12 + "a", max_new_tokens=3)
    assert "12 sentences stopped at the limit of new tokens (numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)" in caplog.text


def test_a_sentence_that_fails_is_named() -> None:
    with pytest.raises(InputError, match=r"^Sentence 2: "):
        fake(failing=["Schlecht."]).translate_text("Gut. Schlecht.")


@pytest.mark.parametrize("text", ["\ud800", 5, ["Hallo"]])
def test_what_is_no_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a text"):
        fake().translate_text(text)


def test_progress_and_stats_count_sentences() -> None:
    stats, told = DecodeStats(), list[int]()
    fake().translate_text("Eins. Zwei.\nDrei.", stats=stats, progress=told.append)
    assert told == [1, 2, 3]
    assert stats.sentences == 3


def test_a_call_that_is_cancelled_keeps_what_stands_between_sentences() -> None:
    assert fake().translate_text("Eins.\n\nZwei.", cancelled=lambda: True) == "\n\n"


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(OptionError, match=r"pip install 'kvx\[serve\]'"):
        FakeTranslator().translate_text("Hallo")


def test_a_beginning_of_every_sentence_is_refused() -> None:
    with pytest.raises(OptionError, match="several sentences") as told:
        fake().translate_text("Eins. Zwei.", prefix="XY")
    assert told.value.option == "prefix"
