"""`kvx translate --paragraphs` and `--html`."""

from __future__ import annotations

import os
import pty
import re
from pathlib import Path

import pytest

from kvx.tests.commands.running import Converse, Outcome, Run, invoke, names_in, refused

pytest.importorskip("sentencex", reason="sentences are found by the package sentencex")

TEXT = "  one\r\n\r\n\ttwelve \n***\n"
TRANSLATED = "  eins\r\n\r\n\tzwölf \n***\n"
PAGE = "<p title=one>twelve <code>one</code>\n"
TRANSLATED_PAGE = '<p title="eins">zwölf <code>one</code>\n'
OF_LINES = [
    ("--json",),
    ("--scores",),
    ("--align",),
    ("--beam-size", "2", "--n-best", "2"),
    ("--samples", "2"),
    ("--alternatives", "2"),
    ("--plot-attention", "page.html"),
    ("--prefix-file", "in"),
    ("--from-file", "in"),
    ("--to-file", "in"),
]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_stream_comes_back_with_all_that_stands_between_its_sentences(translate: Run, end: str) -> None:
    assert translate("--paragraphs", stdin=(TEXT + end).encode()) == Outcome(0, TRANSLATED + end, "")
    assert translate("--paragraphs", stdin=f"one{end}".encode()) == Outcome(0, f"eins{end}", "")


def test_a_file_becomes_a_file_of_the_same_lines(translate: Run, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert translate("--paragraphs", "-i", "in", "-o", "out") == Outcome(0, "", "")
    assert (tmp_path / "out").read_bytes() == TRANSLATED.encode()
    assert sorted(names_in(tmp_path)) == ["in", "out"]


def test_html_keeps_its_markup(translate: Run) -> None:
    assert translate("--html", stdin=PAGE.encode()) == Outcome(0, TRANSLATED_PAGE, "")
    assert translate("--html", "--paragraphs", stdin=PAGE.encode()) == Outcome(0, TRANSLATED_PAGE, "")


def test_each_argument_is_a_text_and_ends_with_a_line_feed(translate: Run) -> None:
    assert translate("--paragraphs", "one\n\ntwelve", "one") == Outcome(0, "eins\n\nzwölf\neins\n", "")


def test_no_input_at_all(translate: Run) -> None:
    assert translate("--paragraphs") == Outcome(0, "", "")


@pytest.mark.parametrize("mode", ["--paragraphs", "--html"])
@pytest.mark.parametrize("options", OF_LINES, ids=lambda options: options[-2] if len(options) > 1 else options[0])
def test_options_of_lines_are_refused(
    numbers_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("one\n")
    found = invoke("translate", "--model", numbers_bundle, "--device", "cpu", mode, *options, "one")
    refused(found, next(option for option in options[::-1] if option.startswith("--")), mode)
    assert names_in(tmp_path) == ["in"]


def test_typed_texts_are_refused(converse: Converse, numbers_bundle: Path) -> None:
    terminal, typed = pty.openpty()
    command = ("translate", "--model", str(numbers_bundle), "--device", "cpu", "--paragraphs")
    found = converse(*command, stdin=typed).end()
    os.close(terminal)
    refused(found, "--paragraphs is given for texts that are typed")


def test_bytes_that_are_not_utf8_are_refused_and_the_output_stays(translate: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("older")
    refused(translate("--html", "-o", "out", stdin=b"one\n\xff\n"), "Byte 5 (0xff) is not UTF-8")
    assert (tmp_path / "out").read_text() == "older"


def test_a_sentence_that_is_too_long_is_named(translate: Run) -> None:
    long = "one" * 100  # a word has no place to be cut at
    refused(translate("--paragraphs", stdin=f"one\n\n{long}\n".encode()), "Sentence 2: The text has", "--on-long")
    found = translate("--paragraphs", "--on-long", "truncate", stdin=f"one\n\n{long}".encode())
    assert (found.code, found.out.splitlines()[:2]) == (0, ["eins", ""])
    assert found.err == "kvx: 1 sentences were cut to the model's positions (numbers 2)\n"


def test_translations_that_stop_at_the_limit_are_told(translate: Run) -> None:
    found = translate("--paragraphs", "--max-new-tokens", "2", stdin=b"one\ntwelve thousand\n")
    assert found.code == 0
    assert found.err == "kvx: 2 sentences stopped at the limit of new tokens (numbers 1, 2)\n"


def test_statistics_count_the_sentences_of_all_texts(translate: Run) -> None:
    found = translate("--paragraphs", "--stats", "one\ntwelve", "seven")
    assert found.out == "eins\nzwölf\nsieben\n"
    assert re.search(r"^kvx: 3 sentences in ", found.err, re.MULTILINE)
