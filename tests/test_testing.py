"""The fake for other people's tests: a model made in memory under the real engine."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import math
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import kvx
from kvx import Result, Token
from kvx.runtime.errors import EngineClosed, Overloaded
from kvx.testing import PROBABILITY, FakeTranslator

LONG = "x" * 2000


def reverse(text: str) -> str:
    return text[::-1]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_it_is_a_translator() -> None:
    assert isinstance(FakeTranslator(), kvx.Translator)


def test_a_mapping_gives_the_translations_in_order() -> None:
    fake = FakeTranslator({"Hallo": "Hello", "Welt": "World", "nichts": ""})
    texts = ["Welt", "nichts", "Hallo", "Welt"]
    assert [one.text for one in fake.translate(texts)] == ["World", "", "Hello", "World"]
    assert [one.text for one in fake.translate_iter(iter(texts))] == ["World", "", "Hello", "World"]


def test_what_a_mapping_does_not_have_becomes_upper_case() -> None:
    assert FakeTranslator({"Hallo": "Hello"}).translate_one("Welt").text == "WELT"
    assert FakeTranslator().translate_one("Grüße an alle").text == "GRÜSSE AN ALLE"


def test_a_function_may_translate() -> None:
    assert [one.text for one in FakeTranslator(reverse).translate(["abc", "日本"])] == ["cba", "本日"]


@pytest.mark.parametrize("text", ["naïve 日本語 🙂", "e\u0301", "\u0000\t\n", "a" * 3000, " leading and trailing "])
def test_any_text_may_be_a_translation(text: str) -> None:
    found = FakeTranslator({"source": text}).translate_one("source")
    assert (found.text, found.finish_reason) == (text, "end")


def test_a_text_without_anything_visible_has_an_empty_translation() -> None:
    fake = FakeTranslator(lambda text: text.replace("a", "b") + "!")
    assert [one.text for one in fake.translate(["", " \n", "a"])] == ["", "", "b!"]


def test_many_texts_share_rows_and_keep_their_own_translations() -> None:
    fake = FakeTranslator(reverse, rows=7)
    texts = [f"text {number}" * (1 + number % 9) for number in range(300)]
    assert [one.text for one in fake.translate(texts)] == [reverse(text) for text in texts]
    assert fake.engine.stats.occupancy > 0.5


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"samples": 2, "seed": 5}])
def test_a_stream_joins_to_the_text(options: kvx.TranslateKeywords) -> None:
    fake = FakeTranslator({"Hallo": "Hello, 日本 🙂"})
    parts = list(fake.stream("Hallo", **options))
    assert "".join(parts) == fake.translate_one("Hallo", **options).text
    assert options or parts == list("Hello, 日本 🙂")


def test_a_stream_shows_tokens_before_the_end() -> None:
    fake = FakeTranslator(step_seconds=0.002)
    stream = fake.stream(LONG)
    assert list(itertools.islice(stream, 2)) == ["X", "X"]
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    wait_until(lambda: fake.engine.stats.sentences == 1)
    assert fake.engine.stats.tokens < 1000


@pytest.mark.parametrize("text", ["hello", "日本 1?", "🙂"])
def test_each_character_has_the_same_probability(text: str) -> None:
    found = FakeTranslator().translate_one(text, scores=True)
    assert found.score == pytest.approx(len(text) * math.log(PROBABILITY))
    assert {round(math.exp(one), 6) for one in found.log_probabilities or ()} == {PROBABILITY, 1.0}


def test_scores_and_ranks_know_the_translation() -> None:
    fake = FakeTranslator({"Hallo": "Hello"})
    [score] = fake.score(["Hallo"], ["Hello"])
    assert score.sum == fake.translate_one("Hallo", scores=True).score
    [ranking] = fake.rank(["Hallo"], [["Goodbye", "Hello", "hello"]])
    assert ranking.best == 1
    assert ranking.scores[2].sum > ranking.scores[0].sum


@pytest.mark.parametrize("text", ["Hallo", "日本", "a", "123"])
@pytest.mark.parametrize("size", [2, 5, 24])
def test_beams_are_distinct_and_begin_with_the_translation(text: str, size: int) -> None:
    fake = FakeTranslator(reverse)
    found = fake.translate_one(text, beam_size=size, n_best=size, scores=True, length_penalty=0.0).hypotheses
    assert found[0].text == reverse(text)
    assert len({one.ids for one in found}) == size
    scores = [one.score or 0.0 for one in found]
    assert all(0 > one > other - 1e-6 for one, other in itertools.pairwise(scores))
    again = FakeTranslator(reverse).translate_one(text, beam_size=size, n_best=size, scores=True, length_penalty=0.0)
    assert again.hypotheses == found


def test_further_beams_look_like_the_translation() -> None:
    found = FakeTranslator().translate_one("hallo", beam_size=4, n_best=4)
    assert {one.text.upper() for one in found.hypotheses} == {"HALLO"}
    assert {one.text for one in FakeTranslator().translate_one("日本", beam_size=4, n_best=4).hypotheses} == {
        "日本",
        "?本",
        "日?",
        "??",
    }


def test_samples_vary_and_are_the_same_with_a_seed() -> None:
    options: kvx.TranslateKeywords = {"samples": 8, "seed": 3}
    found = FakeTranslator().translate_one("good morning", **options).hypotheses
    assert len({one.text for one in found}) > 2
    assert {one.text.upper().replace("?", " ") for one in found} == {"GOOD MORNING"}
    assert FakeTranslator().translate_one("good morning", **options).hypotheses == found


def test_alternatives_differ_after_the_prefix() -> None:
    found = FakeTranslator({"Hallo": "Hello"}).alternatives("Hallo", "He", 3)
    assert [one.text for one in found[:2]] == ["Hello", "HeLlo"]
    assert len({one.text[2] for one in found}) == 3


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("Hel", "Hello world"),
        ("Howdy", "Howdy world"),
        ("日", "日lo world"),
        ("much longer than it", "much longer than it"),
    ],
)
def test_a_translation_goes_on_after_a_prefix(prefix: str, expected: str) -> None:
    fake = FakeTranslator({"Hallo Welt": "Hello world"})
    assert fake.translate_one("Hallo Welt", prefix=prefix).text == expected
    assert fake.translate_one("Hallo Welt", prefix=prefix, beam_size=3).text == expected


def test_options_are_checked_and_obeyed() -> None:
    fake = FakeTranslator()
    with pytest.raises(kvx.OptionError, match="beam_size"):
        fake.translate_one("a", beam_size=0)
    cut = fake.translate_one("hello", max_new_tokens=3)
    assert (cut.text, cut.finish_reason) == ("HEL", "length")
    assert fake.translate_one("hello", min_new_tokens=8).text == "HELLO!!"
    assert "L" not in fake.translate_one("hello", banned=["L"]).text


def test_a_text_may_be_too_long() -> None:
    fake = FakeTranslator({"short": "z" * 50}, positions=20)
    assert fake.translate_one("x" * 19).text == "X" * 19
    with pytest.raises(kvx.InputError, match="20"):
        fake.translate_one("x" * 20)
    cut = fake.translate_one("x" * 20, on_long="truncate")
    assert (cut.text, cut.truncated) == ("X" * 19, True)
    assert fake.translate_one("short").finish_reason == "length"


def test_steps_take_time() -> None:
    start = time.perf_counter()
    FakeTranslator(step_seconds=0.01).translate_one("hello")
    assert time.perf_counter() - start >= 0.06


def test_a_deadline_ends_a_translation_as_far_as_it_has_come() -> None:
    found = FakeTranslator(step_seconds=0.005).engine.submit(LONG, deadline=0.1).result(10)
    assert found.finish_reason == "deadline"
    assert len(found.text) < len(LONG)
    assert set(found.text) <= {"X"}


def test_a_translation_may_be_cancelled() -> None:
    handle = FakeTranslator(step_seconds=0.005).engine.submit(LONG)
    assert isinstance(next(iter(handle)), Token)
    handle.cancel()
    assert handle.result(10).finish_reason == "cancelled"
    steps = itertools.count()
    found = FakeTranslator(step_seconds=0.001).translate(["a", LONG], cancelled=lambda: next(steps) > 20)
    assert [one.finish_reason for one in found] == ["end", "cancelled"]


def test_one_request_too_many_is_refused() -> None:
    fake = FakeTranslator(step_seconds=0.005, rows=1, max_waiting=1)
    running = fake.engine.submit(LONG)
    wait_until(lambda: fake.engine.waiting == 0)
    waiting = fake.engine.submit("hello")
    with pytest.raises(Overloaded) as caught:
        fake.engine.submit("world")
    assert caught.value.retry_after > 0
    running.cancel()
    assert waiting.result(10).text == "HELLO"


def test_a_failing_text_fails_alone() -> None:
    fake = FakeTranslator(failing=["bad"])
    with pytest.raises(kvx.InputError, match="not finite"):
        fake.translate_one("bad")
    results = fake.translate_iter(["good", "bad", "fine"])
    assert [(one.text, one.finish_reason) for one in itertools.islice(results, 3)] == [
        ("GOOD", "end"),
        ("", "failed"),
        ("FINE", "end"),
    ]
    with pytest.raises(kvx.InputError, match="Line 2"):
        next(results)
    with pytest.raises(kvx.InputError, match="not finite"):
        fake.translate_one("bad", beam_size=3)


def test_an_error_of_the_function_reaches_the_caller_and_the_next_text_is_translated() -> None:
    def translation(text: str) -> str:
        if text == "bad":
            raise ConnectionError("gone")
        return text

    fake = FakeTranslator(translation)
    with pytest.raises(ConnectionError, match="gone"):
        fake.translate_one("bad")
    assert fake.translate_one("good").text == "good"


def test_a_translation_that_is_not_a_text_is_refused() -> None:
    with pytest.raises(TypeError, match="The translation of 'a' is None"):
        FakeTranslator(lambda text: None).translate_one("a")  # type: ignore[arg-type]


def test_a_language_has_to_be_named_where_there_are_some() -> None:
    fake = FakeTranslator({">>en<< Hallo": "Hello", "Hallo": "Bonjour"}, languages=("de", "en", "fr"), failing=["bad"])
    with pytest.raises(kvx.OptionError, match="target_language"):
        fake.translate_one("Hallo")
    with pytest.raises(kvx.OptionError, match="'es'"):
        fake.translate_one("Hallo", target_language="es")
    assert fake.translate_one("Hallo", target_language="en").text == "Hello"
    assert fake.translate_one("Hallo", source_language="en", target_language="fr").text == "Bonjour"
    assert fake.translate_one("Welt", target_language="fr").text == ">>fr<< WELT"
    with pytest.raises(kvx.InputError, match="not finite"):
        fake.translate_one("bad", target_language="fr")
    assert FakeTranslator(reverse, languages=["de", "en"]).translate_one("a", target_language="en").text == "a <<ne>>"


def test_asyncio_programs_use_the_engine() -> None:
    fake = FakeTranslator({"Hallo": "Hello"}, step_seconds=0.001)

    async def use() -> tuple[list[str], str]:
        together = await asyncio.gather(*map(fake.engine.translate, ("Hallo", "welt")))
        events = [event async for event in fake.engine.stream("Hallo")]
        assert isinstance(events[-1], Result)
        assert events[-1].translation == together[0]
        task = asyncio.create_task(fake.engine.translate(LONG))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [one.text for one in together], "".join(one.text for one in events if isinstance(one, Token))

    assert asyncio.run(use()) == (["Hello", "WELT"], "Hello")
    wait_until(lambda: fake.engine.stats.sentences == 4)
    assert fake.engine.stats.tokens < 1000


def test_threads_may_share_one() -> None:
    fake = FakeTranslator(reverse, step_seconds=0.0005)
    found: dict[str, str] = {}

    def use(text: str) -> None:
        found[text] = fake.translate_one(text).text

    threads = [threading.Thread(target=use, args=(f"text {number}",)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == {f"text {number}": reverse(f"text {number}") for number in range(20)}


def test_its_engine_may_be_closed() -> None:
    fake = FakeTranslator()
    with fake.engine as engine:
        handle = engine.submit("hello")
    assert handle.result(0).text == "HELLO"
    with pytest.raises(EngineClosed):
        fake.translate_one("hello")


def test_it_is_pickled_and_copied_as_what_it_was_made_of() -> None:
    fake = FakeTranslator({"Hallo": "Hello"}, failing=["bad"], positions=10, rows=3)
    fake.translate_one("Hallo")
    for other in (pickle.loads(pickle.dumps(fake)), copy.deepcopy(fake)):
        assert type(other) is FakeTranslator
        assert other.translate_one("Hallo").text == "Hello"
        with pytest.raises(kvx.InputError, match="not finite"):
            other.translate_one("bad")
    assert pickle.loads(pickle.dumps(FakeTranslator(reverse))).translate_one("abc").text == "cba"


def test_there_is_no_bundle_to_load() -> None:
    with pytest.raises(TypeError, match=r"Make it with FakeTranslator\(…\)"):
        FakeTranslator.load("bundle", threads=2)


def test_its_manifest_says_that_it_is_a_fake() -> None:
    manifest = FakeTranslator(languages=["de"]).manifest
    assert (manifest.family, manifest.files, manifest.parity) == ("fake", {}, None)
    assert list(manifest.languages.target) == ["de"]
    json.dumps(manifest.to_dict())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step_seconds": -1}, "step_seconds"),
        ({"positions": 0}, "positions"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"rows": 0}, "rows"),
        ({"failing": "bad"}, "one str"),
        ({"languages": "de"}, "one str"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(kvx.KvxError, match=named):
        FakeTranslator(**arguments)  # type: ignore[arg-type]


def test_it_needs_no_runtime_and_no_file() -> None:
    script = """
import builtins, io, os, sys
from kvx.testing import FakeTranslator
loaded = set(sys.modules)
opened = []
def audit(event, arguments):
    if event == "open":
        opened.append(arguments[0])
fake = FakeTranslator()
fake.translate_one("warm")
sys.addaudithook(audit)
fake = FakeTranslator({"Hallo": "Hello"}, languages=["de", "en"])
print(fake.translate_one("Hallo", target_language="en", beam_size=2, scores=True).text)
print(opened)
print(*{name.split(".")[0] for name in {*loaded, *sys.modules}})
"""
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    text, opened, modules = done.stdout.splitlines()
    assert (text, opened) == ("Hello", "[]")
    assert {"kvx", "numpy"} <= set(modules.split())
    assert {"onnxruntime", "sentencepiece", "tokenizers", "torch", "onnx", "typer"}.isdisjoint(modules.split())


def test_importing_kvx_leaves_it_alone() -> None:
    line = [sys.executable, "-c", "import kvx, sys; print('kvx.testing' in sys.modules)"]
    assert subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout == "False\n"


def test_a_service_that_loads_a_translator_gets_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTranslator({"Hallo": "Hello"})
    monkeypatch.setattr(kvx.Translator, "load", lambda *_, **__: fake)
    assert kvx.Translator.load("artifacts/de-en", threads=4).translate_one("Hallo").text == "Hello"
