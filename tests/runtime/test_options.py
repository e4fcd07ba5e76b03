from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import InputError, OptionError
from kvx.runtime import options as module
from kvx.runtime.decoding.search import LARGEST_SEED, BeamSearch, Greedy, Sampling
from kvx.runtime.options import OPTIONS, TranslateKeywords, TranslateOptions, filters_of

if TYPE_CHECKING:
    from kvx import Translator
    from kvx.runtime.text.targets import TargetReader

COUNTS = [
    "max_new_tokens",
    "min_new_tokens",
    "rows",
    "workers",
    "cache_bytes",
    "window",
    "beam_size",
    "n_best",
    "samples",
    "top_k",
    "no_repeated_ngrams",
]
NO_READER = cast("TargetReader", None)  # for options that name no piece
OUT_OF_RANGE: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in (0, -1)),
    *((name, value) for name in ("temperature", "repetition_penalty", "patience") for value in (0, -1.0, math.nan)),
    *((name, math.inf) for name in ("temperature", "repetition_penalty", "patience", "length_penalty", "end_penalty")),
    *((name, math.nan) for name in ("length_penalty", "end_penalty", "top_p")),
    *(("top_p", value) for value in (0, 0.0, -0.1, 1.0001, 2)),
    *(("seed", value) for value in (-1, 2**64)),
    ("on_long", "skip"),
]
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "`seed` is 1, but nothing is sampled"),
    ({"seed": 0}, "`seed` is 0, but nothing is sampled"),
    ({"temperature": 0.5}, "`temperature` is 0.5, but nothing is sampled"),
    ({"top_k": 3}, "`top_k` is 3, but nothing is sampled"),
    ({"top_p": 0.9, "beam_size": 4}, "`top_p` is 0.9, but nothing is sampled"),
    ({"n_best": 2}, "`n_best` is 2, but there are no beams"),
    ({"length_penalty": 0.0}, "`length_penalty` is 0.0, but there are no beams"),
    ({"early_stopping": False}, "`early_stopping` is False, but there are no beams"),
    ({"patience": 2.0, "samples": 3}, "`patience` is 2.0, but there are no beams"),
    ({"samples": 2, "beam_size": 3}, "`samples` is 2 and `beam_size` is 3"),
    ({"n_best": 4, "beam_size": 3}, "`n_best` is 4, more than `beam_size` (3)"),
    ({"rows": 3, "beam_size": 4}, "`beam_size` is 4, more than `rows` (3)"),
    ({"min_new_tokens": 6, "max_new_tokens": 5}, "`min_new_tokens` is 6, more than `max_new_tokens` (5)"),
    ({"patience": 2.0, "early_stopping": False, "beam_size": 2}, "`patience` is 2, but `early_stopping` is off"),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError) as raised:
        TranslateOptions(**{name: value})  # type: ignore[arg-type]
    assert f"`{name}` is {value!r}" in raised.value.got
    assert name in raised.value.expected
    assert raised.value.option == name


@pytest.mark.parametrize(("options", "says"), CONTRADICTIONS)
def test_contradictions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as raised:
        TranslateOptions(**options)
    assert says in raised.value.got.split(". ")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    wrong=st.dictionaries(
        st.sampled_from([name for name, _ in OUT_OF_RANGE]), st.just(-7) | st.just(math.nan), min_size=1
    ).map(lambda found: {name: "skip" if name == "on_long" else value for name, value in found.items()})
)
def test_everything_out_of_range_is_named_at_once(wrong: dict[str, Any]) -> None:
    unbounded = {name for name, value in wrong.items() if name in ("length_penalty", "end_penalty") and value == -7}
    wrong = {name: -7 if name in (*COUNTS, "seed") else value for name, value in wrong.items() if name not in unbounded}
    if not wrong:
        return
    with pytest.raises(OptionError) as raised:
        TranslateOptions(**wrong)
    for name, value in wrong.items():
        assert f"`{name}` is {value!r}" in raised.value.got


def test_all_contradictions_are_named_at_once_each_with_what_was_expected() -> None:
    with pytest.raises(OptionError) as raised:
        TranslateOptions(seed=1, top_p=0.5, beam_size=4, n_best=5, temperature=2)
    for name in ("seed", "top_p", "n_best", "temperature"):
        assert f"`{name}` is " in raised.value.got
    for expected in ("`seed` only with `samples`", "`n_best` up to `beam_size`"):
        assert expected in raised.value.expected


@pytest.mark.parametrize("suppress", ["ab", ""])
def test_one_str_is_nothing_to_suppress(suppress: str) -> None:
    with pytest.raises(OptionError, match="suppress"):
        TranslateOptions(suppress=suppress)


def test_the_keywords_are_the_options_but_for_the_window() -> None:
    assert set(typing.get_type_hints(TranslateKeywords)) == OPTIONS.keys()
    assert TranslateKeywords.__required_keys__ == frozenset()


def test_keywords_have_the_types_of_the_options() -> None:
    keywords, hints = typing.get_type_hints(TranslateKeywords), typing.get_type_hints(TranslateOptions, vars(module))
    for field in dataclasses.fields(TranslateOptions):
        if not str(hints[field.name]).startswith("tuple"):
            assert keywords[field.name] == hints[field.name]


def test_every_option_has_a_rule_and_a_sentence() -> None:
    for option in OPTIONS.values():
        assert option.help[0].isupper()
        assert option.help.endswith(".")
        assert option.rule.expected


def test_what_is_left_out_is_greedy_search_without_filters() -> None:
    options = TranslateOptions()
    assert options.search == Greedy()
    assert filters_of(options, NO_READER).filters == ()
    assert not options.with_attention


def test_keywords_make_a_search() -> None:
    beams = TranslateOptions(beam_size=5, n_best=3, length_penalty=0.0, early_stopping=True, patience=2.0, scores=True)
    assert beams.search == BeamSearch(5, length_penalty=0.0, early_stopping=True, n_best=3, patience=2.0)
    assert TranslateOptions(beam_size=2).search == BeamSearch(2)
    assert TranslateOptions(beam_size=2, early_stopping=False).search == BeamSearch(2, early_stopping=False)
    samples = TranslateOptions(samples=4, temperature=0.5, top_k=7, top_p=0.9, seed=0)
    assert samples.search == Sampling(4, temperature=0.5, top_k=7, top_p=0.9, seed=0)
    assert TranslateOptions(beam_size=1).search == Greedy()


def test_a_search_may_be_given_and_keywords_change_it() -> None:
    beams = BeamSearch(4, length_penalty=0.6)
    assert TranslateOptions(search=beams).search is beams
    assert TranslateOptions(search=beams, n_best=2).search == BeamSearch(4, length_penalty=0.6, n_best=2)
    assert TranslateOptions(search=beams, length_penalty=None).search == BeamSearch(4)
    assert TranslateOptions(search=beams).changed(beam_size=2).search == BeamSearch(2, length_penalty=0.6)
    assert TranslateOptions(search=beams).changed(beam_size=1).search == Greedy()
    assert TranslateOptions(search=Sampling(3, seed=1)).changed(seed=2).search == Sampling(3, seed=2)
    assert dataclasses.replace(TranslateOptions(search=beams), scores=True) == TranslateOptions(
        beam_size=4, length_penalty=0.6, scores=True
    )
    with pytest.raises(OptionError, match="`search`"):
        TranslateOptions(search="beams")  # type: ignore[arg-type]


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    for unknown, nearest in (
        ("num_beams", "beam_size"),
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
    ):
        with pytest.raises(OptionError, match=f"no option `{unknown}`.*`{nearest}`"):
            TranslateOptions(**{unknown: 1})  # type: ignore[arg-type]


def test_without_a_seed_each_search_has_one_of_its_own() -> None:
    seeds = {Sampling().seeded().seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(seed is not None and 0 <= seed <= LARGEST_SEED for seed in seeds)
    assert Sampling(seed=7).seeded() == Sampling(seed=7)


EXTREMES: list[Mapping[str, Any]] = [
    {"beam_size": 3, "length_penalty": 1e3},
    {"beam_size": 3, "length_penalty": -1e3},
    {"beam_size": 3, "length_penalty": 50.0, "early_stopping": False},
    {"beam_size": 3, "length_penalty": -50.0, "early_stopping": False},
    {"beam_size": 2, "patience": 1e300},
    {"beam_size": 3, "end_penalty": 1e300},
    {"samples": 2, "end_penalty": -1e300},
    {"samples": 2, "end_penalty": -1e6, "seed": LARGEST_SEED},
    {"end_penalty": 1e6, "no_repeated_ngrams": 1, "suppress": tuple(range(4, 70))},
    {"repetition_penalty": 1e300},
    {"samples": 2, "repetition_penalty": 1e-300, "top_p": 0.5},
    {"samples": 2, "repetition_penalty": 1e-6, "top_k": 5},
    {"beam_size": 4, "repetition_penalty": 1e6},
    {"samples": 2, "temperature": 1e-300},
    {"samples": 2, "temperature": 1e300, "suppress": (4, 5, 6)},
    {"samples": 2, "top_p": 1e-300},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extreme_options_are_refused_or_work(beams_translator: Translator, options: Mapping[str, Any]) -> None:
    try:
        wanted = TranslateOptions(scores=True, **options)
    except OptionError:
        return
    for one in beams_translator.translate(["one", "seven hundred and twelve"], wanted):
        for each in (one, *one.others):
            assert 1 <= len(each.ids) <= beams_translator.manifest.max_new_tokens
            assert not set(each.ids) & set(wanted.suppress)
            assert each.score is not None
            assert math.isfinite(each.score)


IMPOSSIBLE: list[tuple[Mapping[str, Any], str]] = [
    ({"beam_size": 10_000}, "`beam_size` is 10000. Expected `beam_size` up to "),
    ({"samples": 1, "top_k": 10_000}, "`top_k` is 10000. Expected `top_k` up to "),
    ({"align": True}, "a bundle that was exported with attention"),
    ({"replace_unknown": True}, "a bundle that was exported with attention"),
    ({"min_new_tokens": 33}, "`min_new_tokens` is 33. Expected at most 32"),
    ({"max_new_tokens": 65}, "`max_new_tokens` is 65. Expected 1 to 64"),
    ({"suppress": ("漢", "</s>")}, "`suppress` has '漢', '</s>'. Expected pieces"),
    ({"banned": ("漢",)}, "`banned` has the unknown pieces '漢'. Expected pieces"),
    ({"banned": ("",)}, "`banned` has an empty text"),
    ({"banned": ((5, 10_000),)}, "`banned` has 10000. Expected pieces"),
]


@pytest.mark.parametrize(("options", "says"), IMPOSSIBLE, ids=str)
def test_what_the_bundle_cannot_do_is_refused(
    beams_translator: Translator, options: Mapping[str, Any], says: str
) -> None:
    with pytest.raises((OptionError, InputError)) as raised:
        beams_translator.translate(["one"], **options)
    assert says in str(raised.value)


@pytest.mark.parametrize(("options", "says"), IMPOSSIBLE, ids=str)
def test_streams_refuse_what_the_bundle_cannot_do_before_they_read(
    beams_translator: Translator, options: Mapping[str, Any], says: str
) -> None:
    read: list[str] = []
    texts = (read.append(text) or text for text in ["one", "two"])  # type: ignore[func-returns-value]
    with pytest.raises((OptionError, InputError)):
        next(beams_translator.translate_iter(texts, TranslateOptions(**options)))
    assert read == []


def test_all_that_the_bundle_cannot_do_is_named_at_once(beams_translator: Translator) -> None:
    with pytest.raises(OptionError) as raised:
        beams_translator.translate(["one"], beam_size=9_999, align=True, min_new_tokens=50)
    for problem in ("`beam_size` is 9999", "align", "`min_new_tokens` is 50"):
        assert problem in raised.value.got


def test_as_many_beams_as_pieces_are_possible_and_one_more_are_not(beams_translator: Translator) -> None:
    vocabulary = beams_translator.manifest.model["target_vocab_size"]
    (found,) = beams_translator.translate(["one"], beam_size=vocabulary, n_best=3, max_new_tokens=2)
    assert len({one.ids for one in (found, *found.others)}) == 3
    with pytest.raises(OptionError):
        beams_translator.translate(["one"], beam_size=vocabulary + 1)


def test_changes_are_checked_with_the_options_that_they_change(beams_translator: Translator) -> None:
    with pytest.raises(OptionError, match=r"`n_best` is 3, more than `beam_size` \(2\)"):
        beams_translator.translate(["one"], TranslateOptions(beam_size=3, n_best=3), beam_size=2)


def test_a_prefix_for_all_is_refused_without_a_line(beams_translator: Translator) -> None:
    with pytest.raises(InputError) as raised:
        beams_translator.translate(["one", "two"], prefix="漢")
    assert raised.value.line is None
    assert "'漢'" in raised.value.got


@pytest.mark.parametrize("wrong", [{"beam_size": 2.5}, {"beam_size": "2"}, {"max_new_tokens": 3.5}, {"rows": True}])
def test_counts_that_are_no_whole_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"`{next(iter(wrong))}` is "):
        TranslateOptions(**wrong)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda options: pickle.loads(pickle.dumps(options))])
def test_copies_remember_what_was_set(copied: Callable[[TranslateOptions], TranslateOptions]) -> None:
    options = TranslateOptions(beam_size=3, scores=True)
    again = copied(options)
    assert again == options
    assert again.given == options.given == {"beam_size", "scores"}
    assert again.resolved({}).search == options.search


def test_what_dataclasses_replace_gives_is_not_all_set_by_somebody() -> None:
    options = dataclasses.replace(TranslateOptions(beam_size=3), rows=7)
    assert options.given == {"search", "rows"}
