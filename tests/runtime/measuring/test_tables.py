from __future__ import annotations

import pytest

from kvx.runtime.measuring.tables import markdown_table, mebibytes


def test_figures_are_aligned_to_the_right_and_text_to_the_left() -> None:
    assert markdown_table(("", "seconds", "note"), [("one", 1.5, "x"), ("eleven", "10", "long")], text={0, 2}) == [
        "|        | seconds | note |",
        "|--------|--------:|------|",
        "| one    |     1.5 | x    |",
        "| eleven |      10 | long |",
    ]


def test_a_table_may_have_no_rows() -> None:
    assert markdown_table(("a", "b"), []) == ["| a | b |", "|--:|--:|"]


def test_rows_of_another_length_are_a_fault() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(("a", "b"), [("1",)])


def test_what_is_not_known_is_a_question_mark() -> None:
    assert mebibytes(None) == "?"
    assert mebibytes(3 * 2**20) == "3 MiB"
