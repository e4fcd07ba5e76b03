from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.runtime.errors import InputError
from kvx.runtime.text.passages import LONGEST_SENTENCE, Passage, passage

pytest.importorskip("sentencex", reason="sentences are found by the package sentencex")

LANGUAGES = st.sampled_from([None, "", "de", "deu_Latn", "zh", "ja_XX", "my", "hye", "no such language"])
ODD = 'aA.!?。！？ \t\u00a0\u0085\u2028\u200b\ufeff()[]"«»“”…।።1\u3000\u202f\x00\x0b\x1c\n\r你😀\u0301'
TEXTS = st.text() | st.text(ODD) | st.text("aA. \u3000\n")
LINE_BREAKS = ["\n", "\r\n", "\r", "\n\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
QUADRATIC = ["你好。", "«A! ", '"A. B! ', "a. ", "(", "a", " ", "Dr. ", ". "]  # in sentencex 1.0.32 some are


@given(TEXTS, LANGUAGES)
def test_a_text_joined_with_its_own_sentences_is_the_text(text: str, language: str | None) -> None:
    found = passage(text, language)
    assert found.joined(found.sentences) == text
    assert len(found.gaps) == len(found.sentences) + 1


@given(TEXTS, LANGUAGES)
def test_sentences_are_words_of_one_line_without_space_around_them(text: str, language: str | None) -> None:
    for sentence in passage(text, language).sentences:
        assert sentence == sentence.strip()
        assert len(sentence.splitlines()) == 1
        assert any(character.isalnum() for character in sentence)


@given(TEXTS)
def test_what_is_in_no_sentence_has_no_letter_or_digit(text: str) -> None:
    assert not any(character.isalnum() for gap in passage(text).gaps for character in gap)


@given(st.text(ODD.replace("\n", "").replace("\r", ""), min_size=1))
def test_lines_longer_than_a_window_are_joined_to_what_they_were(part: str) -> None:
    text = part * (2 * LONGEST_SENTENCE // len(part) + 3)
    found = passage(text)
    assert found.joined(found.sentences) == text


def test_sentences_of_one_line_are_found() -> None:
    found = passage("Das ist Dr. Müller, z.B. hier.  Wie geht es? Gut!", "de")
    assert found.sentences == ("Das ist Dr. Müller, z.B. hier.", "Wie geht es?", "Gut!")
    assert found.gaps == ("", "  ", " ", "")


@pytest.mark.parametrize("code", ["de", "deu", "deu_Latn", "de_DE", "de-DE", "DE", "__de__", "ger"])
def test_the_rules_are_those_of_the_language_in_every_spelling(code: str) -> None:
    text = "Am 3. Oktober kam er. Er ging."
    assert passage(text, code).sentences == ("Am 3. Oktober kam er.", "Er ging.")
    assert passage(text, "en").sentences != passage(text, code).sentences


@pytest.mark.parametrize("line_break", LINE_BREAKS)
def test_every_line_break_ends_a_sentence_and_is_kept(line_break: str) -> None:
    found = passage(f"Ein Hund{line_break}schläft")
    assert (found.sentences, found.gaps) == (("Ein Hund", "schläft"), ("", line_break, ""))


def test_white_space_around_lines_is_kept() -> None:
    assert passage("  A.\t\r\n\r\n\u3000B. \n").joined(["X", "Y"]) == "  X\t\r\n\r\n\u3000Y \n"


@pytest.mark.parametrize("text", ["", "\n", " \t", "😀\n", "***\n---", "…", "?!"])
def test_lines_without_a_word_have_no_sentence(text: str) -> None:
    assert passage(text) == Passage((), (text,))


def test_sentences_of_scripts_without_spaces_get_one_in_another_script() -> None:
    found = passage("你好。我们走吧！", "zh")
    assert found.sentences == ("你好。", "我们走吧！")
    assert found.joined(["Hello.", "Let us go!"]) == "Hello. Let us go!"
    assert found.joined(["こんにちは。", "行こう！"]) == "こんにちは。行こう！"
    assert found.joined(["Hello. ", "Let us go!"]) == "Hello. Let us go!"
    assert found.joined(["", "Let us go!"]) == "Let us go!"


def test_spaces_of_the_source_are_kept_in_a_script_without_spaces() -> None:
    assert passage("Hello. Go!").joined(["你好。", "走！"]) == "你好。 走！"


def test_no_space_is_put_where_the_source_has_spaces_elsewhere() -> None:
    assert Passage(("A.", "B."), ("", "", "")).joined(["C.", "D."]) == "C.D."


def test_each_translation_is_written_by_its_own_escape() -> None:
    assert Passage(("a", "b"), ("<", "|", ">"), (str.upper, str.title)).joined(["xy", "xy"]) == "<XY|Xy>"


@pytest.mark.parametrize("translations", [[], ["a", "b"]])
def test_there_is_a_translation_for_each_sentence(translations: list[str]) -> None:
    with pytest.raises(InputError, match="1, one for each sentence"):
        passage("Hallo").joined(translations)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", 5, None, b"a"])
def test_what_is_no_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^[^L].* is not a text"):
        passage(text)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("unit", QUADRATIC)
def test_a_long_line_takes_a_time_that_grows_with_its_length(unit: str) -> None:
    def seconds(size: int) -> float:
        text, start = unit * (size // len(unit)), time.process_time()
        found = passage(text, "en")
        taken = time.process_time() - start
        assert found.joined(found.sentences) == text
        return taken

    assert any(seconds(120_000) < 9 * seconds(30_000) + 0.1 for _ in range(3))  # 4 times is linear, 16 the square


def test_a_line_on_which_sentencex_panics_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def segment(code: str, text: str) -> list[str]:
        raise panic

    monkeypatch.setattr("sentencex.segment", segment)
    assert passage(" Ein Hund. Er schläft.\nJa.").sentences == ("Ein Hund. Er schläft.", "Ja.")


def test_a_sentence_without_an_end_is_cut_at_white_space() -> None:
    found = passage("word " * LONGEST_SENTENCE)
    assert all(len(sentence) < LONGEST_SENTENCE for sentence in found.sentences)
    assert {word for sentence in found.sentences for word in sentence.split()} == {"word"}


@given(st.lists(st.sampled_from(["ein", "Hund,", "läuft", "und", "bellt;", "laut"]), min_size=1, max_size=60))
def test_a_sentence_that_does_not_fit_is_cut_into_several_that_do(words: list[str]) -> None:
    text = " ".join(words)
    found = passage(text, "de", lambda sentence: len(sentence) <= 12)
    assert all(len(sentence) <= 12 for sentence in found.sentences)
    assert found.joined(found.sentences) == text


def test_a_sentence_is_cut_after_a_comma_rather_than_at_other_white_space() -> None:
    text = "Ein Hund und eine Katze laufen, und viele Leute sehen ihnen dabei zu"
    found = passage(text, "de", lambda sentence: len(sentence) < 60)
    assert found.sentences == ("Ein Hund und eine Katze laufen,", "und viele Leute sehen ihnen dabei zu")


def test_a_word_that_does_not_fit_stays_whole() -> None:
    assert passage("x" * 50, "de", lambda sentence: len(sentence) < 9).sentences == ("x" * 50,)


@pytest.mark.parametrize("mark", ["- ", "* ", "  • ", "– ", "## ", "> "])
def test_the_mark_of_a_list_stays_before_its_line(mark: str) -> None:
    found = passage(f"{mark}Ein Hund.\n{mark}Eine Katze.", "de")
    assert found.sentences == ("Ein Hund.", "Eine Katze.")
    assert found.gaps == (mark, f"\n{mark}", "")
