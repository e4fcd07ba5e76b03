"""What goes wrong in an engine stays with whom it hits, nobody waits for ever, and memory stays within its bounds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kvx import Engine, Handle, InputError, OptionError
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.decoding.filters import FilterRows
from kvx.runtime.engine.core import Core, EngineOptions
from kvx.runtime.engine.waiting import MOST_OVERTAKEN
from kvx.testing import FakeTranslator

PATIENCE = 20.0
POSITION = 8  # bytes of a position of the fake model, of a source or a target


@contextmanager
def engine(fake: FakeTranslator, **options: Any) -> Iterator[Engine]:  # noqa: ANN401
    with Engine(Core(fake._model, EngineOptions(**options))) as found:
        yield found


@contextmanager
def together(found: Engine) -> Iterator[None]:
    """What is submitted within comes to the workers at once."""
    workers = found._core.workers
    with workers.lock:
        yield


def reasons(*handles: Handle) -> list[str]:
    return [handle.result(PATIENCE).finish_reason for handle in handles]


def test_a_filter_that_breaks_breaks_its_own_request_alone() -> None:
    def broken(logits: FloatArray, rows: FilterRows) -> None:
        raise ValueError("my filter")

    with engine(FakeTranslator(step_seconds=0.002)) as found:
        other = found.submit("hello world this is fine")
        next(iter(other))
        bad = found.submit("x", filters=(broken,))
        with pytest.raises(ValueError, match="my filter"):
            bad.result(PATIENCE)
        assert other.result(PATIENCE).text == "HELLO WORLD THIS IS FINE"
    with pytest.raises(ValueError, match="my filter"):
        FakeTranslator().translate(["one", "two"], filters=(broken,))


def test_sources_that_cannot_be_encoded_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTranslator(step_seconds=0.002)
    encode = fake._model.backend.encode

    def breaking(input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        if input_ids.shape[1] > 60:
            raise MemoryError("Unable to allocate")
        return encode(input_ids, source_lengths)

    monkeypatch.setattr(fake._model.backend, "encode", breaking)
    with engine(fake) as found:
        other = found.submit("hello world this is fine")
        next(iter(other))
        with pytest.raises(Exception, match="not enough memory"):
            found.submit("x" * 100).result(PATIENCE)
        assert reasons(other, found.submit("one")) == ["end", "end"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_hits_nobody(error: type[BaseException]) -> None:
    def raising(_: Handle) -> None:
        raise error

    with engine(FakeTranslator(step_seconds=0.005)) as found:
        with together(found):
            handles = [found.submit("abcdefgh"), found.submit("abcdefgi")]
        handles[0].add_done_callback(raising)
        assert reasons(*handles, found.submit("one")) == ["end"] * 3
        handles[0].add_done_callback(raising)


def test_a_callback_is_called_once() -> None:
    with engine(FakeTranslator()) as found:
        calls: list[Handle] = []
        handles = [found.submit("one") for _ in range(300)]
        for handle in handles:
            handle.add_done_callback(calls.append)
        reasons(*handles)
    assert sorted(map(id, calls)) == sorted(map(id, handles))


def test_closing_in_a_callback_lets_the_others_end() -> None:
    fake = FakeTranslator(step_seconds=0.002)
    found = Engine(Core(fake._model, EngineOptions(rows=1)))
    handles = [found.submit("abc") for _ in range(6)]
    handles[0].add_done_callback(lambda _: found.close())
    assert reasons(*handles) == ["end"] * 6
    found.close()


def test_a_worker_that_leaves_takes_no_other_with_it() -> None:
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with engine(FakeTranslator(), idle_seconds=0.0) as found:
            for number in range(300):
                assert reasons(found.submit("a" * (1 + number % 5))) == ["end"]
            assert found.stats.sentences == 300
    finally:
        sys.setswitchinterval(switching)


def test_those_that_were_encoded_together_all_get_their_turn() -> None:
    """Of two in a group only one fits at a time, and another lane holds bytes meanwhile."""
    fake = FakeTranslator(step_seconds=0.0003, positions=1000)
    with engine(fake, cache_bytes=POSITION * 1100) as found:
        with together(found):
            handles = [
                found.submit("a" * 60, max_new_tokens=80),
                found.submit("b" * 60, max_new_tokens=1000),
            ]
        handles.append(found.submit("c" * 150, beam_size=2, max_new_tokens=200))
        assert reasons(*handles) == ["end"] * 3


def test_a_lane_without_room_is_not_kept_out_for_ever() -> None:
    fake = FakeTranslator(step_seconds=0.0002, positions=500)
    with engine(fake, cache_bytes=POSITION * 1000, max_waiting=1000) as found:
        stop = threading.Event()
        served: list[Handle] = []

        def traffic() -> None:
            under_way: list[Handle] = []
            while not stop.is_set():
                under_way = [handle for handle in under_way if not handle.done]
                more = [found.submit("a" * 20, max_new_tokens=30) for _ in range(40 - len(under_way))]
                served.extend(more)
                under_way += more
                time.sleep(0.0005)

        thread = threading.Thread(target=traffic, daemon=True)
        thread.start()
        while len(served) < 100:
            time.sleep(0.001)
        before = sum(handle.done for handle in served)
        beams = found.submit("b" * 20, beam_size=4, max_new_tokens=100)
        try:
            assert beams.result(PATIENCE).text == "B" * 20
            passed = sum(handle.done for handle in served) - before
        finally:
            stop.set()
            thread.join(PATIENCE)
    assert passed <= MOST_OVERTAKEN + 40 + 64  # and those that were under way or counted later


def test_long_targets_among_many_short_ones_stay_within_the_bytes() -> None:
    fake = FakeTranslator(lambda text: "x" * (500 if len(text) == 28 else 15), step_seconds=0.0001, positions=1000)
    with engine(fake, cache_bytes=POSITION * 2000) as found:
        with together(found):
            handles = [found.submit("a" * 20, max_new_tokens=20) for _ in range(16)]
            handles += [found.submit("ab" * 14, max_new_tokens=900) for _ in range(8)]
        assert reasons(*handles) == ["end"] * 24
        assert found.stats.cache_bytes <= POSITION * 2000


@pytest.mark.parametrize(
    "sizes", [{"cache_bytes": 8000}, {"rows": 4000, "cache_bytes": POSITION * 4000 * 100}], ids=["bytes", "rows"]
)
def test_a_size_is_judged_by_what_is_asked_for(sizes: dict[str, int]) -> None:
    assert FakeTranslator(positions=2000).translate(["ab"], max_new_tokens=20, **sizes)[0].text == "AB"  # type: ignore[arg-type]


def test_beams_that_leave_room_for_fewer_workers_get_fewer() -> None:
    fake = FakeTranslator(positions=3000)
    fake._model.backend.decodes = 2  # type: ignore[misc]
    needed = 32 * POSITION * 3000 + 32 * POSITION * 40
    found = fake.translate(["ab"], beam_size=32, max_new_tokens=3000, cache_bytes=needed + needed // 2)
    assert found[0].text == "AB"


@pytest.mark.parametrize("by", ["sum", "per_token"])
def test_scoring_that_is_cancelled_is_an_error(by: Any) -> None:  # noqa: ANN401
    with pytest.raises(InputError, match="Scoring was cancelled"):
        FakeTranslator().rank(["ab", "cd"], [["AB", "XX"], ["CD"]], by=by, cancelled=lambda: True)


def test_an_error_in_with_is_not_hidden_by_the_end() -> None:
    with pytest.raises(OptionError, match="`rows` is 3"), engine(FakeTranslator()) as found:
        found.submit("one", rows=3)


def test_callers_do_not_share_a_traceback() -> None:
    fake = FakeTranslator(failing=["kaputt"])
    with engine(fake) as found:
        handle = found.submit("kaputt")
        lengths = set[int]()
        for _ in range(3):
            with pytest.raises(InputError) as caught:
                handle.result(PATIENCE)
            lengths.add(len(caught.traceback))
    assert len(lengths) == 1


def test_empty_lanes_are_given_up_while_others_run() -> None:
    fake = FakeTranslator(step_seconds=0.002)
    with engine(fake, idle_seconds=0.05) as found:
        long = found.submit("x" * 200)
        reasons(*(found.submit("ab", beam_size=size) for size in (2, 3, 4)))
        (worker,) = found._core.workers._threads.values()
        assert _until(lambda: len(worker._feeds) == 1)
        assert reasons(long) == ["end"]


def test_logits_may_be_anything_where_nothing_is_chosen() -> None:
    """A filter of one request may forbid everything: its neighbours are untouched."""

    def nothing(logits: FloatArray, rows: FilterRows) -> None:
        logits[:] = -np.inf

    with engine(FakeTranslator()) as found:
        with together(found):
            handles = [found.submit("abc"), found.submit("abc", filters=(nothing,), max_new_tokens=3)]
        assert handles[0].result(PATIENCE).text == "ABC"
        handles[1].result(PATIENCE)


def _until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()
