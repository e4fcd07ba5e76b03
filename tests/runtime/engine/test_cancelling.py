"""What becomes of texts when a translation is cancelled: each that was read is answered, as far as it has come."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.options import TranslateOptions

if TYPE_CHECKING:
    from kvx import Translation, Translator

WORDS = ["one", "seven", "twelve", "thirty-one", "hundred", "thousand", "and"]
TEXTS = [" ".join(WORDS[(number * 3 + i) % len(WORDS)] for i in range(number % 9)) for number in range(40)]
SEARCHES = {
    "greedy": TranslateOptions(),
    "greedy with scores": TranslateOptions(scores=True),
    "greedy from a prefix": TranslateOptions(prefix=(40, 41, 42)),
    "beams": TranslateOptions(beam_size=3, n_best=2),
    "beams with scores": TranslateOptions(beam_size=2, early_stopping=False, scores=True),
    "samples": TranslateOptions(samples=3, seed=1),
    "samples with scores": TranslateOptions(samples=2, seed=1, scores=True),
}


class After:
    """Answers true from the given time on that it is asked, and remembers that it has."""

    def __init__(self, times: int) -> None:
        self._asked = itertools.count()
        self._times = times
        self.event = threading.Event()

    def __call__(self) -> bool:
        if next(self._asked) >= self._times:
            self.event.set()
        return self.event.is_set()


@functools.cache
def whole(translator: Translator, name: str) -> list[Translation]:
    """What is found where nothing is cancelled."""
    return translator.translate(TEXTS, SEARCHES[name])


def check(found: Sequence[Translation], expected: Sequence[Translation], options: TranslateOptions) -> None:
    for one, complete in zip(found, expected, strict=True):
        if one == complete:
            continue
        for each in (one, *one.others):
            assert (each.score is not None) == (each.log_probabilities is not None) == options.scores
            assert each.log_probabilities is None or len(each.log_probabilities) == len(each.ids)
            assert each.others == () or each is one
        assert "cancelled" in {each.finish_reason for each in (one, *one.others)} or options.search.beams > 1
        if options.search.beams == 1:
            assert len(one.others) == options.search.samples - 1
            for each, all_of_it in zip((one, *one.others), (complete, *complete.others), strict=True):
                same = replace(each, others=()) == replace(all_of_it, others=())
                assert same or each.finish_reason == "cancelled"
                assert each.ids == all_of_it.ids[: len(each.ids)]


@pytest.mark.parametrize("name", SEARCHES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(times=st.integers(0, 60), workers=st.integers(1, 3), rows=st.integers(3, 20), window=st.integers(1, 50))
def test_every_text_is_answered_once_and_in_order_whenever_it_is_cancelled(
    beams_translator: Translator,
    name: str,
    times: int,
    workers: int,
    rows: int,
    window: int,
) -> None:
    options = replace(SEARCHES[name], workers=workers, rows=rows)
    expected = whole(beams_translator, name)
    before = set(threading.enumerate())
    found = beams_translator.translate(TEXTS, options, cancelled=After(times))
    check(found, expected, options)
    read: list[str] = []
    after = After(times)

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    streamed = list(beams_translator.translate_iter(texts(), replace(options, window=window), cancelled=after))
    assert len(streamed) == len(read)
    assert len(read) == len(TEXTS) or after.event.is_set()
    check(streamed, expected[: len(read)], options)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_cancelled_beforehand_runs_no_step(beams_translator: Translator, name: str, workers: int) -> None:
    stats = DecodeStats()
    options = replace(SEARCHES[name], workers=workers, rows=6, window=len(TEXTS))
    found = list(beams_translator.translate_iter(TEXTS, options, stats, cancelled=lambda: True))
    assert stats.steps == 0
    assert len(found) == len(TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        assert (one.text, one.ids, one.tokens) == ("", (), ())
        assert one.finish_reason == ("cancelled" if text else "end")
        assert one.score == (0 if options.scores else None)
    assert found == beams_translator.translate(TEXTS, replace(options, window=None), cancelled=lambda: True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cancelled_stream_reads_nothing_more_and_ends(beams_translator: Translator, workers: int) -> None:
    cancel, read = threading.Event(), 0

    def endless() -> Iterator[str]:
        nonlocal read
        for text in itertools.cycle(TEXTS[1:9]):
            read += 1
            yield text

    options = TranslateOptions(rows=4, window=8, workers=workers)
    stream = beams_translator.translate_iter(endless(), options, cancelled=cancel.is_set)
    found = [next(stream) for _ in range(30)]
    cancel.set()
    before = read
    found += stream
    assert len(found) == read == before
    assert {one.finish_reason for one in found[:30]} == {"end"}


def test_what_has_ended_when_cancelled_stays_as_it_is(beams_translator: Translator) -> None:
    expected = whole(beams_translator, "greedy")
    reasons = []
    for times in range(0, 60, 4):
        options = replace(SEARCHES["greedy"], rows=4, workers=1)
        found = beams_translator.translate(TEXTS, options, cancelled=After(times))
        reasons.append([one.finish_reason for one in found].count("cancelled"))
        ended = [(one, other) for one, other in zip(found, expected, strict=True) if one.finish_reason == "end"]
        assert all(one == other for one, other in ended)
    assert reasons == sorted(reasons, reverse=True)
    assert len(set(reasons)) > 5


def test_beams_give_the_best_that_they_have_when_cancelled(beams_translator: Translator) -> None:
    text = "nine hundred and ninety-nine"
    for times in range(1, 12):
        options = TranslateOptions(beam_size=4, n_best=4, scores=True)
        (found,) = beams_translator.translate([text], options, cancelled=After(times))
        each = (found, *found.others)
        assert len({one.ids for one in each}) == len(each) == 4
        assert all(len(one.ids) == times for one in each if one.finish_reason == "cancelled")
        scores = beams_translator.score([text] * 4, [one.ids for one in each])
        assert [one.score for one in each] == pytest.approx([score.sum for score in scores], abs=1e-3)
        means = [score.sum / (1 + len(one.tokens)) for score, one in zip(scores, each, strict=True)]
        assert means == sorted(means, reverse=True)


def test_an_answer_that_was_once_true_holds_for_all_workers(numbers_translator: Translator) -> None:
    asked = itertools.count()
    texts = ["ninety-nine thousand nine hundred and ninety-nine"] * 64
    found = numbers_translator.translate(texts, rows=4, workers=2, cancelled=lambda: next(asked) == 4)
    assert len(found) == 64
    assert sum(one.finish_reason == "cancelled" for one in found) >= 64 - 2 * 4 * 2


def test_closing_ends_every_worker_at_its_next_step(numbers_translator: Translator) -> None:
    texts = [" ".join(["ninety-nine"] * 6), *["ninety-nine thousand nine hundred and ninety-nine"] * 60]
    options = TranslateOptions(rows=4, workers=2, end_penalty=50.0, window=len(texts))
    stats, threads = DecodeStats(), set(threading.enumerate())
    translations = numbers_translator.translate_iter(texts, options, stats)
    next(translations)
    translations.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= threads
    assert stats.sentences < 40
