from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from kvx import Translator
from kvx.runtime.arrays import IntArray
from kvx.runtime.backends.device import HOST
from kvx.runtime.backends.registry import load_backends
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding import lane
from kvx.runtime.decoding.backend import Backend, Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.loaded import LoadedModel
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


def stepping(bundle: Path, each: Callable[[int], None]) -> Translator:
    """A translator of the bundle whose steps first call this with the number of active rows."""

    opened = Bundle.open(bundle)
    (backend,) = load_backends(opened, "onnx", [HOST], threads=1, workers=None, spin=False)

    class Stepping:
        def __getattr__(self, name: str) -> object:
            return getattr(backend, name)

        def bind(self, cache: KVCache) -> Step:
            step = backend.bind(cache)

            def watched(input_ids: IntArray) -> StepOutput:
                each(len(input_ids))
                return step(input_ids)

            return watched

    return Translator(LoadedModel(opened, cast("Backend", Stepping())))


def test_all_workers_take_part(numbers_translator: Translator, numbers_bundle: Path) -> None:
    seen = set()
    together = threading.Barrier(3, timeout=10)

    def each(_: int) -> None:
        if threading.current_thread() not in seen:
            seen.add(threading.current_thread())
            together.wait()

    found = stepping(numbers_bundle, each).translate(TEXTS, rows=4, workers=3)
    assert found == numbers_translator.translate(TEXTS)
    assert len(seen) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_one_worker_ends_all_and_reaches_the_consumer(numbers_bundle: Path, workers: int) -> None:
    steps = itertools.count()

    def each(_: int) -> None:
        if next(steps) == 5:
            raise OSError("broken")

    before = set(threading.enumerate())
    broken = stepping(numbers_bundle, each)
    with pytest.raises(OSError, match="broken"):
        list(broken.translate_iter(itertools.cycle(TEXTS), TranslateOptions(rows=4, workers=workers)))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_runs_out_is_an_error_that_names_what_to_lower(numbers_bundle: Path, workers: int) -> None:
    def each(_: int) -> None:
        raise MemoryError("Unable to allocate 3.00 GiB")

    short = stepping(numbers_bundle, each)
    with pytest.raises(CapacityError, match=r"not enough memory .*3.00 GiB.*`rows`") as caught:
        short.translate(["one"], rows=2, workers=workers)
    assert caught.value.option == "rows"


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_limit_on_threads_is_an_error_that_names_what_to_lower(
    numbers_translator: Translator, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """Python raises this where the system gives no thread."""
    left, start, before = itertools.count(), threading.Thread.start, set(threading.enumerate())

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
    assert set(threading.enumerate()) <= before


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

    monkeypatch.setattr(lane, "KVCache", Remembered)
    before = set(threading.enumerate())

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
    assert set(threading.enumerate()) <= before
