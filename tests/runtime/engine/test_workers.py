from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest

from kvx import Translator
from kvx.runtime.decoding import schedule
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats, Hypothesis, Outcome, Sentence
from kvx.runtime.engine.workers import run_in_parallel, side_by_side
from kvx.runtime.errors import CapacityError
from kvx.runtime.options import TranslateOptions

TEXTS = ["one", "", "forty-two", "nine hundred and ninety-nine", "seven thousand and eight"] * 60


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_are_in_order_and_the_same_for_any_number_of_workers(
    numbers_translator: Translator, workers: int
) -> None:
    stats = DecodeStats()
    options = TranslateOptions(rows=4, workers=workers)
    found = [result.text for result in numbers_translator.translate_iter(TEXTS, options, stats)]
    alone = {text: numbers_translator.translate([text])[0].text for text in set(TEXTS)}
    assert found == [alone[text] for text in TEXTS]
    assert stats.sentences == sum(text != "" for text in TEXTS)
    assert stats.row_steps == stats.tokens


@dataclass(frozen=True)
class Running:
    """A loop that is this function of its sentences."""

    each: Callable[[Sentence], None]

    def run(self, sentences: Iterable[Sentence], stats: DecodeStats, cancelled: Cancelled) -> Iterator[Outcome]:
        for sentence in sentences:
            self.each(sentence)
            yield Outcome(sentence, 0, (Hypothesis((), True),))


def test_all_workers_take_part() -> None:
    seen = set()
    together = threading.Barrier(3, timeout=10)

    def each(sentence: Sentence) -> None:
        if threading.current_thread() not in seen:
            seen.add(threading.current_thread())
            together.wait()

    sentences = [Sentence(index, (1,)) for index in range(300)]
    found = run_in_parallel([Running(each)] * 3, sentences, DecodeStats())
    assert sorted(outcome.sentence.number for outcome in found) == list(range(300))
    assert len(seen) == 3


def test_an_error_in_one_worker_ends_all_and_reaches_the_consumer() -> None:
    def each(sentence: Sentence) -> None:
        if sentence.number == 5:
            raise OSError("broken")

    endless = (Sentence(index, (1,)) for index in itertools.count())
    before = threading.active_count()
    with pytest.raises(OSError, match="broken"):
        list(run_in_parallel([Running(each)] * 2, endless, DecodeStats()))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_runs_out_is_an_error_that_names_what_to_lower(workers: int) -> None:
    def each(sentence: Sentence) -> None:
        raise MemoryError("Unable to allocate 3.00 GiB")

    with pytest.raises(CapacityError, match=r"not enough memory .*3.00 GiB.*`rows`") as caught:
        list(side_by_side([Running(each)] * workers, [Sentence(0, (1,))], DecodeStats()))
    assert caught.value.option == "rows"


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_limit_on_threads_is_an_error_that_names_what_to_lower(
    numbers_translator: Translator, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """Python raises this where the system gives no thread."""
    left, start, before = itertools.count(), threading.Thread.start, threading.active_count()

    def limited(thread: threading.Thread) -> None:
        if next(left) >= allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    options = TranslateOptions(rows=2, workers=2)
    with pytest.raises(CapacityError, match="no more threads") as caught:
        list(numbers_translator.translate_iter(iter(["one"] * 9), options))
    assert caught.value.option == "threads"
    with pytest.raises(CapacityError, match="no more threads"):
        numbers_translator.translate(["one"] * 9, options)
    assert threading.active_count() == before


def test_an_error_in_the_sources_reaches_the_consumer(numbers_translator: Translator) -> None:
    def texts() -> Iterator[str]:
        yield from ["one"] * 100
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(numbers_translator.translate_iter(texts(), TranslateOptions(rows=2, workers=2)))


def test_a_slow_consumer_is_not_run_away_from(numbers_translator: Translator) -> None:
    drawn = 0

    def texts() -> Iterator[str]:
        nonlocal drawn
        for drawn in itertools.count(1):  # noqa: B007
            yield "one"

    results = numbers_translator.translate_iter(texts(), TranslateOptions(rows=2, workers=2, window=8))
    for _ in range(10):
        next(results)
    time.sleep(0.3)
    assert drawn <= 10 + 2 * 8 + 2 * 2 * 16
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("end", ["exhausted", "closed", "error"])
def test_the_cache_is_released_however_a_stream_ends(
    numbers_translator: Translator, monkeypatch: pytest.MonkeyPatch, workers: int, end: str
) -> None:
    caches: list[weakref.ref[KVCache]] = []

    class Remembered(KVCache):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            caches.append(weakref.ref(self))

    monkeypatch.setattr(schedule, "KVCache", Remembered)
    before = threading.active_count()

    def texts() -> Iterator[str]:
        yield from ["one", "forty-two"] * 50
        if end == "error":
            raise OSError

    results = numbers_translator.translate_iter(texts(), TranslateOptions(rows=4, workers=workers, window=20))
    if end == "closed":
        next(results)
        results.close()  # type: ignore[attr-defined]
    elif end == "error":
        with pytest.raises(OSError, match=r"^$"):
            list(results)
    else:
        list(results)
    del results
    gc.collect()
    assert len(caches) >= workers
    assert [cache() for cache in caches] == [None] * len(caches)
    assert threading.active_count() == before
