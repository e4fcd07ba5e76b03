from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kvx import TranslateOptions
from kvx.runtime.engine.supply import Awaited, Listed, Supply

if TYPE_CHECKING:
    from kvx import Translator


def supplies(items: list[int]) -> list[Supply[int]]:
    return [Listed(iter(items)), Awaited(iter(items))]


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("most", [1, 3, 10])
def test_items_come_in_order_and_all_of_them(count: int, most: int) -> None:
    for supply in supplies(list(range(count))):
        found: list[int] = []
        while not supply.exhausted:
            found += supply.take(most, wait=True)
        assert found == list(range(count))
        assert supply.take(most, wait=True) == []
        assert supply.error is None
        supply.rest()


def test_no_more_are_read_than_were_asked_for() -> None:
    read: list[int] = []
    supply = Awaited(read.append(number) or number for number in itertools.count())  # type: ignore[func-returns-value]
    assert supply.take(3, wait=True) == [0, 1, 2]
    assert supply.take(2, wait=False) == [3, 4]
    time.sleep(0.05)
    assert read == [0, 1, 2, 3, 4]
    supply.rest()


def test_those_at_hand_come_without_waiting_for_more() -> None:
    source: queue.Queue[int] = queue.Queue()
    supply = Awaited(iter(source.get, None))
    source.put(1)
    source.put(2)
    assert supply.take(10, wait=True) == [1, 2]
    assert supply.take(10, wait=False) == []
    assert not supply.exhausted
    source.put(3)
    assert supply.take(10, wait=True) == [3]
    supply.rest()


def test_what_came_before_an_error_comes_first() -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    for supply in (Listed(failing()), Awaited(failing())):
        found: list[int] = []
        while not supply.exhausted:
            found += supply.take(2, wait=True)
        assert found == [0, 1, 2]
        assert isinstance(supply.error, OSError)


def test_the_thread_ends_when_nothing_more_is_wanted() -> None:
    before = threading.active_count()
    supply = Awaited(itertools.count())
    supply.take(2, wait=True)
    supply.rest()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_text_is_answered_before_the_next_one_comes(numbers_translator: Translator, workers: int) -> None:
    texts: queue.Queue[str | None] = queue.Queue()
    answers = numbers_translator.translate_iter(iter(texts.get, None), TranslateOptions(workers=workers))
    for text, answer in (("one", "eins"), ("", ""), ("twelve", "zwölf")):
        texts.put(text)
        assert next(answers).text == answer
    texts.put(None)
    assert list(answers) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_results_that_are_finished_come_before_an_error_of_the_texts(
    numbers_translator: Translator, workers: int
) -> None:
    def texts() -> Iterator[str]:
        yield from ["one"] * 20
        raise OSError("the disk is gone")

    answers = numbers_translator.translate_iter(texts(), TranslateOptions(workers=workers))
    assert [next(answers).text for _ in range(20)] == ["eins"] * 20
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
