"""What people pass by mistake is refused in a sentence, and what is meant clearly is accepted."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvx
from kvx import InputError, KvxError, OptionError, TranslateOptions, Translator
from kvx.runtime.text.sources import is_visible


def test_any_iterable_of_texts_is_accepted(numbers_translator: Translator) -> None:
    texts, targets = ["one", "twelve"], ["eins", "zwölf"]
    expected = numbers_translator.translate(texts)
    assert numbers_translator.translate(text for text in texts) == expected
    assert numbers_translator.translate(dict.fromkeys(texts)) == expected
    scores = numbers_translator.score(texts, targets)
    assert numbers_translator.score(iter(texts), iter(targets)) == scores
    assert numbers_translator.rank(iter(texts), ([one] for one in targets)) == numbers_translator.rank(
        texts, [[one] for one in targets]
    )


@pytest.mark.parametrize("texts", [None, 5, "one"])
def test_what_is_no_iterable_of_texts_is_refused(numbers_translator: Translator, texts: Any) -> None:  # noqa: ANN401
    for call in (
        lambda: numbers_translator.translate(texts),
        lambda: numbers_translator.translate_iter(texts),
        lambda: numbers_translator.score(texts, ["eins"]),
        lambda: numbers_translator.score(["one"], texts),
        lambda: numbers_translator.rank(["one"], texts),
        lambda: numbers_translator.rank(["one"], [texts]),
    ):
        with pytest.raises(InputError):
            call()


def test_ids_in_an_array_are_ids(numbers_translator: Translator) -> None:
    ids = numbers_translator.translate(["twelve"])[0].ids
    prefix = np.array(ids[:2])
    expected = numbers_translator.translate(["twelve"], prefix=ids[:2])
    assert numbers_translator.translate(["twelve"], prefix=prefix) == expected
    assert numbers_translator.translate(["twelve"], prefixes=[prefix]) == expected
    assert numbers_translator.score(["twelve"], [np.array(ids)]) == numbers_translator.score(["twelve"], [ids])


WRONG: list[dict[str, Any]] = [
    {"temperature": "0.7", "samples": 1},
    {"length_penalty": "1", "beam_size": 2},
    {"beam_size": None},
    {"suppress": 5},
    {"suppress": None},
    {"banned": "ein"},
    {"banned": None},
    {"filters": 3},
    {"filters": [3]},
    {"scores": "yes"},
    {"prefix": 5},
    {"shortlist": 5},
    {"on_long": None},
    {"rows": 2**63},
    {"samples": 2**63},
    {"window": 2**70},
    {"search": None},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_option_refuses_what_it_is_not(numbers_translator: Translator, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as raised:
        numbers_translator.translate(["one"], **wrong)
    assert raised.value.option in wrong


def test_other_arguments_are_refused_in_the_same_words(numbers_translator: Translator) -> None:
    with pytest.raises(OptionError, match="`by` is 'anything'"):
        numbers_translator.rank(["one"], [["eins"]], by="anything")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`count` is '3'"):
        numbers_translator.alternatives("one", "", count="3")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"The options are \{'beam_size': 2\}"):
        numbers_translator.translate(["one"], {"beam_size": 2})  # type: ignore[arg-type]


INVISIBLE = [
    "\u200b",
    "\u200d\u200e\u202a",
    "\ufeff",
    "\ufe0f",
    "\u0301",
    "\ufdd0",
    "\uffff",
    "\ue000",
    "\t \u2028",
    "\x00",
]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_with_nothing_to_see_is_empty(numbers_translator: Translator, text: str) -> None:
    assert not any(map(is_visible, text))
    (found,) = numbers_translator.translate([text])
    assert (found.text, found.ids) == ("", ())


@pytest.mark.parametrize("character", [*"a1.€漢", "\U0001f600", "\u0915", "\U0001fae8", "\u0378"], ids=ascii)
def test_what_can_be_seen_or_may_become_visible_is_a_text(character: str) -> None:
    assert is_visible(character)


def errors() -> list[KvxError]:
    kinds = [value for name in kvx.__all__ if isinstance(value := getattr(kvx, name), type)]
    plain = [kind for kind in kinds if issubclass(kind, KvxError)]
    return [kind("Got", expected="this", remedy="Do that.", option="rows") for kind in plain]


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_errors_pickle_and_copy(error: KvxError) -> None:
    if isinstance(error, InputError):
        error = error.at(7)
    for one in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(one) is type(error)
        assert (str(one), vars(one)) == (str(error), vars(error))


def test_results_and_options_pickle(numbers_translator: Translator) -> None:
    (found,) = numbers_translator.translate(["twelve"], beam_size=3, n_best=3, scores=True)
    (ranking,) = numbers_translator.rank(["one"], [["eins", "zwei"]])
    options = TranslateOptions(beam_size=3, suppress=("<unk>",), scores=True)
    for one in (found, ranking, ranking.scores[0], options, numbers_translator.manifest):
        assert pickle.loads(pickle.dumps(one)) == one


def test_a_translator_pickles_as_what_it_was_loaded_with(numbers_bundle: Path) -> None:
    translator = Translator.load(numbers_bundle, threads=1)
    again = pickle.loads(pickle.dumps(translator))
    assert again.translate(["twelve"]) == translator.translate(["twelve"])
    with pytest.raises(TypeError, match=r"Translator\.load"):
        pickle.dumps(Translator(translator._model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_a_translator_says_that_it_must_be_loaded(numbers_bundle: Path) -> None:
    script = (
        "import os, sys; from kvx import DeviceError, Translator\n"
        "translator = Translator.load(sys.argv[1], threads=2); translator.translate(['one'])\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "try: translator.translate(['one'])\n"
        "except DeviceError as error: print(error); os._exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, numbers_bundle], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 7
    assert "before it was forked" in done.stdout


def test_the_interpreter_ends_quietly_while_workers_are_under_way(numbers_bundle: Path) -> None:
    script = (
        "import itertools, sys; from kvx import TranslateOptions, Translator\n"
        "translator = Translator.load(sys.argv[1], threads=2, workers=2)\n"
        "texts, options = itertools.repeat('twelve thousand'), TranslateOptions(workers=2, rows=2)\n"
        "answers = translator.translate_iter(texts, options)\n"
        "print(next(answers).text)\n"
    )
    for _ in range(6):
        done = subprocess.run(
            [sys.executable, "-c", script, numbers_bundle], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "zwölftausend\n", "")


def test_equal_texts_draw_different_samples_and_a_seed_repeats_them(numbers_translator: Translator) -> None:
    texts = ["twelve thousand three hundred and four"] * 6
    wild = TranslateOptions(samples=1, temperature=3.0)
    drawn = [one.ids for one in numbers_translator.translate(texts, wild)]
    assert len(set(drawn)) > 1
    assert [one.ids for one in numbers_translator.translate(texts, wild)] != drawn
    seeded = numbers_translator.translate(texts, wild.changed(seed=3))
    assert len({one.ids for one in seeded}) > 1
    assert numbers_translator.translate(texts, wild.changed(seed=3)) == seeded
    mixed = numbers_translator.translate([texts[0], "one", texts[0], ""], wild.changed(seed=3))
    assert [mixed[0], mixed[2]] == seeded[:2]


def test_threads_never_exceed_what_was_given(numbers_bundle: Path) -> None:
    translator = Translator.load(numbers_bundle, threads=2)
    assert translator._model.plan(TranslateOptions())[1] == 1
    shared = Translator.load(numbers_bundle, threads=2, workers=2)
    assert shared._model.plan(TranslateOptions())[1] == 2
