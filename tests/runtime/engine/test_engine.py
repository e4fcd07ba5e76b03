"""The engine: whatever comes whenever, beside whatever, is what it is alone, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import (
    Engine,
    EngineClosed,
    Event,
    Handle,
    InputError,
    OptionError,
    Overloaded,
    Result,
    Token,
    TranslateOptions,
    Translation,
    Translator,
)
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.backends.device import HOST
from kvx.runtime.backends.registry import load_backends
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.backend import Backend, Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.engine.core import Core, EngineOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.waiting import MOST_OVERTAKEN
from kvx.runtime.engine.workers import GATHER_STEPS
from kvx.runtime.errors import CapacityError
from kvx.tests.poison import POISON, poison

WORDS = ["one", "two", "seven", "twelve", "thirty-one", "eighty", "hundred", "thousand", "and"]
LONG = " ".join(["ninety-nine thousand"] * 6)
ENDLESS: dict[str, Any] = {"min_new_tokens": 60, "max_new_tokens": 60}
PATIENCE = 60.0  # seconds after which a test has hung

OPTIONS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "short": {"max_new_tokens": 3},
    "shortest": {"max_new_tokens": 1},
    "ended at the limit": {"max_new_tokens": 4, "end_at_limit": True},
    "scores": {"scores": True},
    "ngrams": {"no_repeated_ngrams": 2},
    "ngrams again": {"no_repeated_ngrams": 2, "scores": True},
    "penalty": {"repetition_penalty": 1.3, "suppress": (40,)},
    "least": {"min_new_tokens": 6},
    "prefix": {"prefix": (40, 41)},
    "samples": {"samples": 2, "seed": 1, "scores": True},
    "other samples": {"samples": 1, "seed": 9, "top_k": 5},
    "two beams": {"beam_size": 2, "n_best": 2},
    "two scored beams": {"beam_size": 2, "scores": True, "no_repeated_ngrams": 3},
    "patient beams": {"beam_size": 2, "early_stopping": False, "prefix": (40,)},
    "three beams": {"beam_size": 3, "max_new_tokens": 7},
}

texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


class Watched:
    """A backend whose steps are counted, and around each of which what must not matter is poisoned."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.steps = 0
        self.pause = 0.0
        self.encoded: list[int] = []
        self.failing = threading.Event()
        self.held_at = 0  # the step that waits until it is let go
        self.let_go = threading.Event()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._backend, name)

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        self.encoded.append(len(input_ids))
        return self._backend.encode(input_ids, source_lengths)

    def bind(self, cache: KVCache) -> Step:
        step = self._backend.bind(cache)

        def watched(input_ids: IntArray) -> StepOutput:
            self.steps += 1
            if self.failing.is_set():
                self.failing.clear()
                raise OSError("the device is gone")
            time.sleep(self.pause)
            if self.steps == self.held_at:
                assert self.let_go.wait(PATIENCE)
            poison(cache, beyond=POISON, idle=np.nan)
            output = step(input_ids)
            poison(cache, beyond=-POISON, idle=POISON)
            return output

        return watched


@pytest.fixture(scope="module")
def bundle(numbers_bundle: Path) -> Bundle:
    return Bundle.open(numbers_bundle)


@pytest.fixture
def watched(bundle: Bundle) -> Watched:
    return watch(bundle)


def watch(bundle: Bundle) -> Watched:
    (backend,) = load_backends(bundle, "onnx", [HOST], threads=1, workers=None, spin=False)
    return Watched(backend)


def engine_on(bundle: Bundle, watched: Watched, **options: Any) -> Engine:  # noqa: ANN401
    return Engine(Core(LoadedModel(bundle, watched), EngineOptions(**options)))


@functools.cache
def alone(translator: Translator, text: str, name: str) -> Translation:
    return translator.translate_one(text, rows=4, workers=1, **OPTIONS[name])


@dataclass
class Asked:
    """A text that is submitted at a step, and perhaps called off some steps later."""

    text: str
    name: str
    at: int
    off_after: int | None
    events: list[Event] = field(default_factory=list)
    handle: Handle | None = None


asked = st.builds(
    Asked,
    text=texts,
    name=st.sampled_from(list(OPTIONS)),
    at=st.integers(0, 30),
    off_after=st.one_of(st.none(), st.none(), st.integers(0, 6)),
)


def play(engine: Engine, watched: Watched, requests: list[Asked]) -> None:
    """Submits and cancels everything at its step, or earlier where nothing is left to do until then."""
    moments = sorted(
        [(one.at, False, one) for one in requests]
        + [(one.at + one.off_after, True, one) for one in requests if one.off_after is not None],
        key=lambda moment: moment[:2],
    )
    for at, off, one in moments:
        until = time.monotonic() + PATIENCE
        while watched.steps < at and not all(other.handle.done for other in requests if other.handle is not None):
            assert time.monotonic() < until
            time.sleep(0.0002)
        if off and one.handle is not None:
            one.handle.cancel()
        elif one.handle is None:
            one.handle = engine.submit(one.text, **OPTIONS[one.name])
    readers = [threading.Thread(target=lambda one=one: one.events.extend(one.handle)) for one in requests]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(PATIENCE)
        assert not reader.is_alive()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(requests=st.lists(asked, min_size=1, max_size=14), rows=st.integers(3, 12), workers=st.integers(1, 2))
def test_every_result_is_that_of_the_text_alone_whenever_it_comes_and_whoever_is_beside_it(
    numbers_translator: Translator, bundle: Bundle, requests: list[Asked], rows: int, workers: int
) -> None:
    requests = [Asked(one.text, one.name, one.at, one.off_after) for one in requests]
    watched = watch(bundle)
    with engine_on(bundle, watched, rows=rows, workers=workers) as engine:
        play(engine, watched, requests)
        stats = engine.stats
    for one in requests:
        assert one.handle is not None
        found, expected = one.handle.result(0), alone(numbers_translator, one.text, one.name)
        check_events(one.events, found)
        if found.finish_reason == "cancelled" or "cancelled" in {each.finish_reason for each in found.others}:
            assert one.off_after is not None
            assert "beam_size" in OPTIONS[one.name] or found.ids == expected.ids[: len(found.ids)]
            continue
        assert [each.ids for each in found.hypotheses] == [each.ids for each in expected.hypotheses]
        assert found.text == expected.text
        for each, other in zip(found.hypotheses, expected.hypotheses, strict=True):
            assert (each.score is None) == (other.score is None)
            assert each.score == pytest.approx(other.score, abs=1e-3)
    if not any("beam_size" in OPTIONS[one.name] for one in requests):
        results = [one.handle.result(0) for one in requests if one.handle is not None]
        assert stats.row_steps == sum(len(each.ids) for found in results for each in found.hypotheses)


def check_events(events: list[Event], found: Translation) -> None:
    *tokens, last = events
    assert isinstance(last, Result)
    assert last.translation == found
    assert all(isinstance(token, Token) for token in tokens)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == found.text
    assert tuple(token.id for token in tokens if isinstance(token, Token) and token.id is not None) == found.ids
    if found.log_probabilities is not None:
        scores = [token.log_probability for token in tokens if isinstance(token, Token) and token.id is not None]
        assert scores == pytest.approx(found.log_probabilities, abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "scores", "two beams", "patient beams", "samples"])
def test_tokens_come_while_the_rest_is_still_decoded(bundle: Bundle, watched: Watched, name: str) -> None:
    with engine_on(bundle, watched) as engine:
        alone = engine.submit(LONG, **OPTIONS[name]).result(PATIENCE)
        watched.held_at = 2 * watched.steps  # the last one of the same again
        least = len(alone.ids) // 3 + 1 if "beam_size" not in OPTIONS[name] else 1
        handle = engine.submit(LONG, **OPTIONS[name])
        for number, event in enumerate(handle, 1):
            if number == least:
                assert isinstance(event, Token)
                assert not handle.done
                watched.let_go.set()
    check_events(list(handle), handle.result())


def test_a_text_that_comes_later_is_let_in_while_another_is_decoded(bundle: Bundle, watched: Watched) -> None:
    watched.pause = 0.02
    with engine_on(bundle, watched, rows=2) as engine:
        long = engine.submit(LONG, **ENDLESS)
        next(iter(long))
        short = engine.submit("one")
        assert short.result(PATIENCE).text == "eins"
        assert not long.done


def test_newcomers_are_encoded_together_and_wait_no_longer_than_they_may(bundle: Bundle, watched: Watched) -> None:
    watched.pause = 0.01
    with engine_on(bundle, watched, rows=64) as engine:
        long = engine.submit(LONG, **ENDLESS)
        next(iter(long))
        before, steps = len(watched.encoded), watched.steps
        handles = [engine.submit(text, max_new_tokens=1) for text in WORDS]
        for handle in handles:
            handle.result(PATIENCE)
        assert watched.steps - steps <= 3 * (GATHER_STEPS + 2)
        assert len(watched.encoded) - before <= 3
        long.cancel()


class TestLife:
    def test_with_ends_after_what_was_submitted(self, bundle: Bundle, watched: Watched) -> None:
        before = set(threading.enumerate())
        with engine_on(bundle, watched) as engine:
            handles = [engine.submit(text) for text in WORDS]
        assert all(handle.done for handle in handles)
        assert {handle.result().finish_reason for handle in handles} == {"end"}
        assert set(threading.enumerate()) <= before
        with pytest.raises(EngineClosed, match="Load the model again"):
            engine.submit("one")

    def test_closing_without_draining_ends_everything_as_it_is(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.01
        engine = engine_on(bundle, watched, rows=2)
        handles = [engine.submit(LONG, **ENDLESS) for _ in range(8)]
        next(iter(handles[0]))
        engine.close(drain=False)
        assert {handle.result(0).finish_reason for handle in handles} == {"cancelled"}
        engine.close()

    def test_an_error_in_with_ends_at_once(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.01
        engine = engine_on(bundle, watched)
        handle = engine.submit(LONG, **ENDLESS)
        with pytest.raises(ZeroDivisionError), engine:
            raise ZeroDivisionError
        assert handle.result(0).finish_reason == "cancelled"

    def test_a_broken_step_reaches_those_who_were_in_it_and_nobody_else(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.01
        with engine_on(bundle, watched) as engine:
            beams = engine.submit(LONG, beam_size=2, **ENDLESS)
            next(iter(beams))
            greedy = [engine.submit(text) for text in WORDS]
            watched.failing.set()
            failed = 0
            for handle in [beams, *greedy]:
                try:
                    handle.result(PATIENCE)
                except OSError as error:
                    assert str(error) == "the device is gone"  # noqa: PT017
                    failed += 1
            assert failed in (1, len(greedy))
            assert engine.submit("one").result(PATIENCE).text == "eins"

    def test_a_deadline_ends_a_text_where_it_is_and_one_that_waits_with_nothing(
        self, bundle: Bundle, watched: Watched
    ) -> None:
        watched.pause = 0.01
        with engine_on(bundle, watched, rows=1, workers=1) as engine:
            first = engine.submit(LONG, deadline=0.2, **ENDLESS)
            second = engine.submit("one", deadline=0.1)
            assert second.result(PATIENCE).finish_reason == "deadline"
            assert second.result().ids == ()
            found = first.result(PATIENCE)
        assert found.finish_reason == "deadline"
        assert 0 < len(found.ids) < 60

    @pytest.mark.parametrize("deadline", [-1, float("nan"), "soon"])
    def test_a_deadline_is_a_number_of_seconds(self, numbers_translator: Translator, deadline: Any) -> None:  # noqa: ANN401
        with pytest.raises(OptionError, match="`deadline` is"):
            numbers_translator.engine.submit("one", deadline=deadline)

    def test_more_than_may_wait_are_refused_at_once_with_a_time(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.01
        with engine_on(bundle, watched, rows=1, workers=1, max_waiting=3) as engine:
            handles = [engine.submit("seven")]
            next(iter(handles[0]))
            with pytest.raises(Overloaded, match=r"at most 3 \(`max_waiting`\)") as refused:
                handles += [engine.submit("one") for _ in range(30)]
            assert refused.value.retry_after > 0
            assert refused.value.option == "max_waiting"
            for handle in handles:
                handle.result(PATIENCE)
            assert engine.submit("one").result(PATIENCE).text == "eins"

    def test_an_idle_engine_has_no_threads_and_no_cache_and_wakes_up(self, bundle: Bundle, watched: Watched) -> None:
        before = set(threading.enumerate())
        engine = engine_on(bundle, watched, idle_seconds=0.05)
        for _ in range(2):
            assert engine.submit("one").result(PATIENCE).text == "eins"
            until = time.monotonic() + PATIENCE
            while set(threading.enumerate()) - before:
                assert time.monotonic() < until
                time.sleep(0.01)
            gc.collect()
            assert not [one for one in gc.get_objects() if type(one) is KVCache]

    def test_waiting_costs_no_time_of_the_processor(self, bundle: Bundle, watched: Watched) -> None:
        with engine_on(bundle, watched, idle_seconds=60) as engine:
            engine.submit("one").result(PATIENCE)
            time.sleep(0.1)
            before = time.process_time()
            time.sleep(0.5)
            assert time.process_time() - before < 0.1

    def test_an_engine_that_nobody_holds_goes_away(self, bundle: Bundle, watched: Watched) -> None:
        engine = engine_on(bundle, watched, idle_seconds=0.05)
        handle = engine.submit("one")
        del engine
        assert handle.result(PATIENCE).text == "eins"

    def test_warm_loads_every_graph(self, numbers_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
        with Engine.load(numbers_bundle, threads=1, warm=True) as engine, caplog.at_level("INFO", logger="kvx"):
            engine.submit("one", beam_size=2).result(PATIENCE)
            assert not [record for record in caplog.records if ".onnx" in record.getMessage()]


class TestMemory:
    def smallest(self, bundle: Bundle, watched: Watched, limit: int) -> int:
        plan, _ = LoadedModel(bundle, watched).plan(TranslateOptions(max_new_tokens=limit))
        return plan.seat_bytes(32)

    def test_a_request_that_never_fits_is_refused_with_the_numbers(self, bundle: Bundle, watched: Watched) -> None:
        with engine_on(bundle, watched, cache_bytes=2 * self.smallest(bundle, watched, 8)) as engine:
            with pytest.raises(CapacityError, match=r"takes [\d,]+ bytes\. Expected at most [\d,]+ bytes"):
                engine.submit("one", max_new_tokens=64)
            assert engine.submit("one", max_new_tokens=8).result(PATIENCE).text == "eins"

    def test_lanes_share_the_bytes_and_all_get_their_turn(
        self, numbers_translator: Translator, bundle: Bundle, watched: Watched
    ) -> None:
        budget = 4 * self.smallest(bundle, watched, 64)
        names = ["plain", "two beams", "three beams", "short", "samples"]
        with engine_on(bundle, watched, cache_bytes=budget, workers=1) as engine:
            handles = [
                (name, text, engine.submit(text, **OPTIONS[name])) for text, name in itertools.product(WORDS, names)
            ]
            for name, text, handle in handles:
                expected = alone(numbers_translator, text, name)
                assert handle.result(PATIENCE).ids == expected.ids
            assert engine.stats.cache_bytes <= budget

    def test_smaller_ones_pass_one_that_has_no_room_but_no_more_than_they_may(
        self, bundle: Bundle, watched: Watched
    ) -> None:
        """Rows of a short limit fill the memory for ever; one with a long limit needs most of it."""
        watched.pause = 0.001
        budget = self.smallest(bundle, watched, 64) + self.smallest(bundle, watched, 2)
        passed = list[int]()
        with engine_on(bundle, watched, cache_bytes=budget, workers=1, max_waiting=10_000) as engine:
            small = [engine.submit("one seven", max_new_tokens=2) for _ in range(40)]
            large = engine.submit("twelve", max_new_tokens=64)
            small += [engine.submit("one seven", max_new_tokens=2) for _ in range(1000)]
            large.add_done_callback(lambda _: passed.append(sum(one.done for one in small[40:])))
            assert large.result(PATIENCE).text == "zwölf"
            for one in small:
                one.result(PATIENCE)
        assert passed[0] <= MOST_OVERTAKEN + 200


class TestCallers:
    def test_ids_are_sources_too(self, numbers_translator: Translator) -> None:
        tokenizer = numbers_translator._model.sources.tokenizer
        for text in WORDS:
            ids = tokenizer.encode(text)
            assert numbers_translator.translate_one(ids) == numbers_translator.translate_one(text)
            assert numbers_translator.translate([np.array(ids)]) == numbers_translator.translate([text])
        assert numbers_translator.translate_one([]).text == ""
        for wrong in ([-1], [10**6], [True], [1.5]):
            with pytest.raises(InputError, match="A source has the id"):
                numbers_translator.translate_one(wrong)  # type: ignore[arg-type]

    def test_every_text_may_have_options_of_its_own(self, numbers_translator: Translator) -> None:
        names = list(OPTIONS)
        chosen = [(WORDS[number % len(WORDS)], names[number % len(names)]) for number in range(60)]
        found = numbers_translator.translate(
            [text for text, _ in chosen], [TranslateOptions(**OPTIONS[name]) for _, name in chosen]
        )
        for (text, name), one in zip(chosen, found, strict=True):
            if "samples" not in name:
                assert one.ids == alone(numbers_translator, text, name).ids
        with pytest.raises(InputError, match=r"more texts than sets of options \(1\)"):
            numbers_translator.translate(["one", "two"], [TranslateOptions()])
        with pytest.raises(OptionError, match="`rows` is not the same for all texts"):
            numbers_translator.translate(["one", "two"], [TranslateOptions(rows=3), TranslateOptions()])

    def test_an_engine_keeps_its_own_size(self, numbers_translator: Translator) -> None:
        with pytest.raises(OptionError, match="`rows` is 3, but the engine has its own"):
            numbers_translator.engine.submit("one", rows=3)

    def test_a_stream_is_the_text_in_pieces(self, numbers_translator: Translator) -> None:
        for name in ("plain", "two beams", "prefix", "short"):
            pieces = list(numbers_translator.stream(LONG, **OPTIONS[name]))
            assert "".join(pieces) == alone(numbers_translator, LONG, name).text
            assert all(pieces)
            assert len(pieces) > 1

    def test_a_stream_that_is_closed_is_cancelled(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.005
        translator = Translator(LoadedModel(bundle, watched))
        pieces = translator.stream(LONG, **ENDLESS)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        time.sleep(0.1)
        before = watched.steps
        time.sleep(0.1)
        assert watched.steps == before

    def test_progress_and_stats_are_those_of_the_call(self, numbers_translator: Translator) -> None:
        done: list[int] = []
        numbers_translator.translate(WORDS, progress=done.append)
        assert done == list(range(1, len(WORDS) + 1))
        done.clear()
        numbers_translator.score(["one", "two"], ["eins", "zwei"], progress=done.append)
        assert done == [1, 2]


class TestAsyncio:
    def test_translations_and_streams(self, numbers_translator: Translator) -> None:
        async def main(engine: Engine) -> None:
            found = await asyncio.gather(*(engine.translate(text, **OPTIONS["two beams"]) for text in WORDS))
            assert [one.text for one in found] == [alone(numbers_translator, text, "two beams").text for text in WORDS]
            events = [event async for event in engine.stream(LONG)]
            check_events(events, alone(numbers_translator, LONG, "plain"))
            with pytest.raises(InputError):
                await engine.translate(3)  # type: ignore[arg-type]

        asyncio.run(main(numbers_translator.engine))

    def test_a_cancelled_task_gives_its_seat_back(self, bundle: Bundle, watched: Watched) -> None:
        watched.pause = 0.01

        async def main(engine: Engine) -> None:
            task = asyncio.create_task(engine.translate(LONG, **ENDLESS))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async for _ in engine.stream(LONG, **ENDLESS):
                break
            assert (await engine.translate("one")).text == "eins"

        with engine_on(bundle, watched, rows=1, workers=1) as engine:
            asyncio.run(main(engine))
            assert engine.stats.row_steps < 60


class Client(threading.Thread):
    """Submits, reads and cancels in an order that its seed decides; checks all that was not called off."""

    def __init__(self, engine: Engine, expected: Mapping[tuple[str, str], Translation], seed: int) -> None:
        super().__init__(daemon=True)
        self._engine, self._expected, self._draw = engine, expected, random.Random(seed)
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(3):
                self._translate_one()
        except BaseException as error:
            self.failure = error

    def _translate_one(self) -> None:
        draw = self._draw
        text, name = draw.choice(list(self._expected))
        deadline = draw.choice([None, None, 0.001])
        handle = self._engine.submit(text, deadline=deadline, **OPTIONS[name])
        if called_off := draw.random() < 0.3:
            time.sleep(draw.random() * 0.003)
            handle.cancel()
        events = list(handle) if draw.random() < 0.5 else []
        found = handle.result(PATIENCE)
        if events:
            check_events(events, found)
        if not called_off and deadline is None:
            assert found.ids == self._expected[text, name].ids


def test_a_hundred_runs_with_random_cancels_and_deadlines_end(
    numbers_translator: Translator, bundle: Bundle, watched: Watched
) -> None:
    model = LoadedModel(bundle, watched)
    names = ["plain", "scores", "two beams", "short", "ngrams", "prefix"]
    expected = {(text, name): alone(numbers_translator, text, name) for text in WORDS for name in names}
    for seed in range(100):
        draw = random.Random(seed)
        options = EngineOptions(rows=draw.randint(2, 8), workers=draw.randint(1, 2))
        with Engine(Core(model, options)) as engine:
            clients = [Client(engine, expected, seed * 100 + number) for number in range(8)]
            for client in clients:
                client.start()
            for client in clients:
                client.join(PATIENCE)
                assert not client.is_alive()
                assert client.failure is None
