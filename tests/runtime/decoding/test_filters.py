"""Every filter against its definition row by row, and what translations are when several work together."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import InputError, OptionError, Target
from kvx.runtime.arrays import FloatArray
from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.decoding.backend import StepOutput
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.decoding.filters import (
    UNFILTERED,
    Ban,
    EndPenalty,
    Filter,
    FilterRows,
    Filters,
    LeastTokens,
    NoRepeatedNgrams,
    RepetitionPenalty,
    Suppress,
)
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.decoding.rows import Choice, Rows, Seat
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.decoding.seat_options import SeatOptions
from kvx.runtime.options import TranslateOptions, filters_of
from kvx.runtime.text.targets import TargetReader

if TYPE_CHECKING:
    from kvx import Translation, Translator

BOS, EOS = 0, 1
VOCABULARY = 6
LIMIT = 12
SPECS = (TensorSpec("past", "float32", ("B", 1, "T", 1)), TensorSpec("source", "float32", ("B", 1, "S", 1)))
TEXTS = ["one", "forty-two", "nine hundred and ninety-nine", "twelve thousand three hundred and four", "eighty and one"]
SEARCHES = {
    "greedy": TranslateOptions(),
    "beams": TranslateOptions(beam_size=4, n_best=4),
    "samples": TranslateOptions(samples=4, seed=1, temperature=1.5),
}

Ids = tuple[int, ...]


READER = cast("TargetReader", types.SimpleNamespace(pieces=lambda tokens, option: tuple(tokens)))


def seat(number: int, fixed: tuple[int, ...]) -> Seat:
    source = EncodedSource({"source": np.zeros((1, 1, 1, 1), np.float32)}, 0, 1)
    return Seat(Sentence(number, (1,), (fixed,), options=SeatOptions(Greedy(), LIMIT)), 0, source)


def rows_with(targets: Sequence[Sequence[int]], given: Sequence[Sequence[int]] | None = None) -> Rows:
    """Rows whose targets have come so far, each in a seat of its own, of which the first tokens may have been given."""
    plan = Plan(
        start=(BOS,),
        eos=EOS,
        pad=0,
        rows=len(targets),
        max_new_tokens=LIMIT,
        source_positions=4,
        cache_bytes=2**20,
        target_bytes=4,
        source_bytes=4,
    )
    rows = Rows(KVCache(SPECS, Capacity(len(targets), LIMIT, 4)), plan)
    for row, target in enumerate(targets):
        rows.take(row, seat(row, tuple(given[row]) if given else ()))
        rows.tokens[row, 1 : len(target) + 1] = target
        rows.cache.lengths[row] = len(target)
    rows.regroup()
    return rows


def logits_for(targets: Sequence[Sequence[int]], seed: int) -> FloatArray:
    return np.random.default_rng(seed).normal(scale=3, size=(len(targets), VOCABULARY)).astype(np.float32)


def suppress(ids: Ids) -> Callable[[FloatArray, Ids], FloatArray]:
    def one_row(logits: FloatArray, target: Ids) -> FloatArray:
        return np.array([-np.inf if one in ids else logit for one, logit in enumerate(logits)], np.float32)

    return one_row


def no_repeated_ngrams(size: int) -> Callable[[FloatArray, Ids], FloatArray]:
    def ngrams(ids: Ids) -> list[Ids]:
        return [ids[at : at + size] for at in range(len(ids) - size + 1)]

    def one_row(logits: FloatArray, target: Ids) -> FloatArray:
        before = ngrams(target)
        banned = [one for one in range(VOCABULARY) if set(ngrams((*target, one))[-1:]) & set(before)]
        return suppress(tuple(banned))(logits, target)

    return one_row


def repetition_penalty(penalty: float) -> Callable[[FloatArray, Ids], FloatArray]:
    def one_row(logits: FloatArray, target: Ids) -> FloatArray:
        def changed(one: int, logit: float) -> float:
            if one not in target:
                return logit
            return logit / penalty if logit > 0 else logit * penalty

        return np.array([changed(one, float(logit)) for one, logit in enumerate(logits)], np.float32)

    return one_row


def end_penalty(penalty: float) -> Callable[[FloatArray, Ids], FloatArray]:
    def one_row(logits: FloatArray, target: Ids) -> FloatArray:
        return np.array([logit - penalty * (one == EOS) for one, logit in enumerate(logits)], np.float32)

    return one_row


def least_tokens(tokens: int) -> Callable[[FloatArray, Ids], FloatArray]:
    def one_row(logits: FloatArray, target: Ids) -> FloatArray:
        others = [one for one, logit in enumerate(logits) if one != EOS and logit > -np.inf]
        return suppress((EOS,))(logits, target) if len(target) + 1 < tokens and others else logits

    return one_row


FILTERS: st.SearchStrategy[tuple[Filter, Callable[[FloatArray, Ids], FloatArray]]] = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=VOCABULARY, unique=True).map(
        lambda ids: (Suppress(tuple(ids)), suppress(tuple(ids)))
    ),
    st.integers(1, 4).map(lambda size: (NoRepeatedNgrams(size), no_repeated_ngrams(size))),
    st.sampled_from([0.5, 1.3, 4.0]).map(lambda penalty: (RepetitionPenalty(penalty), repetition_penalty(penalty))),
    st.sampled_from([-2.0, 0.7, 30.0]).map(lambda penalty: (EndPenalty(penalty), end_penalty(penalty))),
    st.integers(1, LIMIT + 1).map(lambda tokens: (LeastTokens(tokens), least_tokens(tokens))),
)
TOKENS = st.sampled_from([0, 2, 3, 4, 5])  # whatever is not eos: few, so that they come again
TARGETS = st.lists(st.lists(TOKENS, max_size=LIMIT - 1), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(targets=TARGETS, pairs=st.lists(FILTERS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_filters_do_to_each_row_what_their_definitions_say(
    targets: list[list[int]],
    pairs: list[tuple[Filter, Callable[[FloatArray, Ids], FloatArray]]],
    seed: int,
) -> None:
    logits = logits_for(targets, seed)
    before = logits.copy()
    allowed = Filters([constrain for constrain, _ in pairs])(logits, rows_with(targets))
    np.testing.assert_array_equal(logits, before)  # they are the model's own, and scores are taken from them
    for row, target in enumerate(targets):
        expected = logits[row]
        for _, one_row in pairs:
            expected = one_row(expected, tuple(target))
        np.testing.assert_allclose(allowed[row], expected, rtol=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    targets=TARGETS,
    options=st.fixed_dictionaries(
        {},
        optional={
            "min_new_tokens": st.integers(1, LIMIT),
            "no_repeated_ngrams": st.integers(1, 3),
            "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0]),
            "end_penalty": st.sampled_from([-1.0, 0.0, 5.0]),
        },
    ),
    suppressed=st.lists(TOKENS, max_size=5, unique=True),
    seed=st.integers(0, 100),
)
def test_whatever_is_asked_for_together_something_may_come_next(
    targets: list[list[int]], options: dict[str, float], suppressed: list[int], seed: int
) -> None:
    filters = filters_of(TranslateOptions(**options, suppress=tuple(suppressed)), READER)  # type: ignore[arg-type]
    allowed = filters(logits_for(targets, seed), rows_with(targets))
    assert (allowed.max(axis=-1) > -np.inf).all()
    least = int(options.get("min_new_tokens", 1))
    for row, target in enumerate(targets):
        others = np.delete(allowed[row], EOS)
        if len(target) + 1 < least and others.max() > -np.inf:
            assert allowed[row, EOS] == -np.inf
        else:
            assert allowed[row, EOS] > -np.inf


def test_without_constraints_the_logits_are_the_very_same() -> None:
    targets = [[2, 3], []]
    logits = logits_for(targets, 0)
    nothing = filters_of(TranslateOptions(min_new_tokens=1, repetition_penalty=1.0, end_penalty=0.0), READER)
    for filters in (UNFILTERED, nothing):
        assert filters(logits, rows_with(targets)) is logits
        assert filters(logits, rows_with(targets, given=[[2, 3], []])) is logits  # what was given has come


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    given_ids=st.lists(st.lists(TOKENS, max_size=4), min_size=1, max_size=5),
    lengths=st.lists(st.integers(0, 5), min_size=5, max_size=5),
    pairs=st.lists(FILTERS, max_size=3),
)
def test_what_is_given_comes_whatever_the_filters_say(
    given_ids: list[list[int]],
    lengths: list[int],
    pairs: list[tuple[Filter, Callable[[FloatArray, Ids], FloatArray]]],
) -> None:
    targets = [(*ids, *[2] * 5)[:length] for ids, length in zip(given_ids, lengths, strict=False)]
    logits = logits_for(targets, 3)
    rows = rows_with(targets, given_ids)
    allowed = Filters([constrain for constrain, _ in pairs])(logits, rows)
    chosen = Greedy().choose(StepOutput(logits), allowed, rows).ids
    for row, (target, ids) in enumerate(zip(targets, given_ids, strict=True)):
        assert chosen[row] == (ids[len(target)] if len(target) < len(ids) else allowed[row].argmax())


def test_what_is_given_belongs_to_the_target_and_moves_with_it() -> None:
    rows = rows_with([[], [], []], given=[[2], [3, 4], [5, 5, 5]])
    rows.vacate(0)
    assert [each.tolist() for each in rows.fixed_next()] == [[0, 1], [5, 3], [False, False]]
    rows.append(Choice(np.array([5, 3]), np.zeros(2, bool)), None)
    assert [each.tolist() for each in rows.fixed_next()] == [[0, 1], [5, 4], [False, False]]
    rows.take(0, seat(9, ()))
    assert [each.tolist() for each in rows.fixed_next()] == [[1], [4], [False]]


def everything(translations: Sequence[Translation]) -> list[Translation]:
    return [each for one in translations for each in (one, *one.others)]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("least", [1, 7, 32])
def test_no_translation_is_shorter_than_asked_for(beams_translator: Translator, search: str, least: int) -> None:
    found = everything(beams_translator.translate(TEXTS, SEARCHES[search], min_new_tokens=least))
    assert all(len(one.ids) >= least for one in found)
    assert beams_translator.manifest.framing.eos not in {one for each in found for one in each.ids[: least - 1]}
    if least == 1:
        assert found == everything(beams_translator.translate(TEXTS, SEARCHES[search]))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("prefix", ["acht", "neun hundert", (17, 30, 8), (40,), ""])
def test_every_translation_begins_with_the_prefix(beams_translator: Translator, search: str, prefix: str | Ids) -> None:
    tokenizer = beams_translator._model.targets.tokenizer
    ids = tuple(tokenizer.encode(prefix)) if isinstance(prefix, str) else prefix
    found = beams_translator.translate(TEXTS, SEARCHES[search], prefix=prefix, rows=9)
    assert {one.ids[: len(ids)] for one in everything(found)} == {ids}
    assert found == beams_translator.translate(TEXTS, SEARCHES[search], prefixes=[prefix] * len(TEXTS), rows=8)
    assert found == [beams_translator.translate([text], SEARCHES[search], prefix=ids)[0] for text in TEXTS]


@pytest.mark.parametrize("search", SEARCHES)
def test_each_text_may_have_a_prefix_of_its_own_or_none(beams_translator: Translator, search: str) -> None:
    prefixes: list[str | Ids | None] = [None, "acht", (17, 30, 8), "", "neun hundert zwei"]
    found = beams_translator.translate(TEXTS, SEARCHES[search], prefixes=prefixes, rows=8)
    streamed = beams_translator.translate_iter(iter(TEXTS), SEARCHES[search], prefixes=iter(prefixes))
    assert list(streamed) == found
    for text, prefix, translation in zip(TEXTS, prefixes, found, strict=True):
        assert beams_translator.translate([text], SEARCHES[search], prefix=prefix)[0] == translation


def test_going_on_from_a_beginning_of_the_greedy_translation_gives_it_again(beams_translator: Translator) -> None:
    for text, whole in zip(TEXTS, beams_translator.translate(TEXTS), strict=True):
        for length in range(len(whole.ids)):
            assert beams_translator.translate([text], prefix=whole.ids[:length]) == [whole]


def test_a_prefix_may_fill_all_but_one_of_the_tokens_allowed(beams_translator: Translator) -> None:
    for search in SEARCHES.values():
        (found,) = beams_translator.translate(["one"], search, prefix=(40, 41, 42), max_new_tokens=4)
        assert found.ids[:3] == (40, 41, 42)
        assert len(found.ids) == 4


@pytest.mark.parametrize("number", [0, 1, 4, 6, 8])
def test_prefixes_of_another_number_than_texts_are_refused(beams_translator: Translator, number: int) -> None:
    with pytest.raises(InputError, match="one prefix for each text"):
        beams_translator.translate(TEXTS, prefixes=["acht"] * number)
    streamed = beams_translator.translate_iter(TEXTS, TranslateOptions(window=1), prefixes=["acht"] * number)
    for text, _ in zip(TEXTS, range(number), strict=False):
        assert next(streamed) == beams_translator.translate([text], prefix="acht")[0]
    with pytest.raises(InputError, match="one prefix for each text"):
        next(streamed)


def test_one_str_is_no_prefixes(beams_translator: Translator) -> None:
    with pytest.raises(InputError, match="one str"):
        beams_translator.translate(["one", "two"], prefixes="ab")
    with pytest.raises(InputError, match="one str"):
        beams_translator.translate_iter(["one", "two"], prefixes="ab")


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("acht 漢字", "unknown pieces .*漢"),
        ((5, 10**6), "id 1000000"),
        ((5, -1), "id -1"),
        ((5, True), "id True"),
        ((3, 3), "holds eos"),
        (tuple(range(4, 10)), "prefix has 6 tokens"),
    ],
)
def test_prefixes_that_nothing_could_follow_are_refused(
    beams_translator: Translator, prefix: str | Ids, says: str
) -> None:
    assert beams_translator.manifest.framing.eos == 3
    with pytest.raises(InputError, match=says):
        beams_translator.translate(["one"], prefix=prefix, max_new_tokens=6)
    with pytest.raises(InputError, match=f"Line 2: .*{says}"):
        beams_translator.translate(["one", "two"], prefixes=[None, prefix], max_new_tokens=6)


@pytest.mark.parametrize("search", SEARCHES)
def test_what_is_suppressed_never_comes(beams_translator: Translator, search: str) -> None:
    free = everything(beams_translator.translate(TEXTS, SEARCHES[search]))
    tokenizer, eos = beams_translator._model.targets.tokenizer, beams_translator.manifest.framing.eos
    common = sorted({one for each in free for one in each.ids} - {eos})[::2]
    for suppressed in (tuple(common), tokenizer.pieces(common)):
        found = everything(beams_translator.translate(TEXTS, SEARCHES[search], suppress=suppressed, rows=8))
        assert not {one for each in found for one in each.ids} & set(common)


@pytest.mark.parametrize("search", SEARCHES)
def test_where_everything_else_is_suppressed_translations_end_at_once(
    beams_translator: Translator, search: str
) -> None:
    eos = beams_translator.manifest.framing.eos
    others = tuple(one for one in range(beams_translator.manifest.model["target_vocab_size"]) if one != eos)
    found = beams_translator.translate(TEXTS, SEARCHES[search], suppress=others, min_new_tokens=5, scores=True)
    assert {one.ids for one in everything(found)} == {(eos,)}
    assert all(not one.others or search == "samples" for one in found)
    scores = beams_translator.score(TEXTS, [(eos,)] * len(TEXTS))
    assert [one.score for one in found] == pytest.approx([score.sum for score in scores], abs=1e-3)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_comes_twice(beams_translator: Translator, search: str, size: int) -> None:
    found = beams_translator.translate(
        TEXTS, SEARCHES[search], no_repeated_ngrams=size, min_new_tokens=40, max_new_tokens=50
    )
    for one in everything(found):
        ngrams = list(zip(*(one.ids[at:] for at in range(size)), strict=False))
        assert len(ngrams) == len(set(ngrams))


@pytest.mark.parametrize("suppress", [("漢",), (3,), ("</s>",), (-1,), (10**6,), (True,), ("",)])
def test_what_cannot_be_suppressed_is_named(beams_translator: Translator, suppress: tuple[str | int, ...]) -> None:
    with pytest.raises(OptionError, match=f"`suppress` has {suppress[0]!r}"):
        beams_translator.translate(["one"], suppress=(5, *suppress, "e"))


CONSTRAINTS = [
    TranslateOptions(scores=True, repetition_penalty=1.5, end_penalty=2.0),
    TranslateOptions(scores=True, suppress=(7, 8, 9), no_repeated_ngrams=2, min_new_tokens=12),
    TranslateOptions(scores=True, prefix=(40, 41, 42)),
]


@pytest.mark.parametrize("search", [{}, {"beam_size": 3, "n_best": 3}, {"samples": 3, "seed": 4, "top_k": 5}])
@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_log_probabilities_stay_the_models_own(
    beams_translator: Translator, search: dict[str, int], constraints: TranslateOptions
) -> None:
    found = beams_translator.translate(TEXTS, constraints, **search)  # type: ignore[arg-type]
    for text, translation in zip(TEXTS, found, strict=True):
        each = everything([translation])
        scores = beams_translator.score([text] * len(each), [one.ids for one in each])
        for one, score in zip(each, scores, strict=True):
            assert one.log_probabilities == pytest.approx(score.log_probabilities, abs=1e-3)
            assert one.score == pytest.approx(score.sum, abs=1e-3)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_penalty_for_ending_makes_longer_and_a_negative_one_shorter(
    beams_translator: Translator, search: str
) -> None:
    lengths = [
        [len(one.ids) for one in beams_translator.translate(TEXTS, SEARCHES[search], end_penalty=penalty)]
        for penalty in (-50.0, 0.0, 50.0)
    ]
    assert set(lengths[0]) == {1}
    assert set(lengths[2]) == {beams_translator.manifest.max_new_tokens}
    assert all(1 < length < beams_translator.manifest.max_new_tokens for length in lengths[1])


def test_a_penalty_for_repetition_leads_to_fewer_of_it(beams_translator: Translator) -> None:
    def repeated(penalty: float) -> int:
        found = beams_translator.translate(TEXTS, repetition_penalty=penalty, min_new_tokens=30)
        return sum(one in each.ids[:at] for each in found for at, one in enumerate(each.ids))

    assert repeated(0.5) > repeated(1.0) > repeated(2.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    targets=st.lists(st.lists(TOKENS, max_size=LIMIT - 1), min_size=1, max_size=6),
    banned=st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_a_banned_sequence_never_comes_and_nothing_else_is_forbidden(
    targets: list[list[int]], banned: list[list[int]], seed: int
) -> None:
    logits = logits_for(targets, seed)
    allowed = Filters((Ban(tuple(map(tuple, banned))),))(logits, rows_with(targets))
    for row, target in enumerate(targets):
        for token in range(VOCABULARY):
            ends = any([*target, token][-len(one) :] == one for one in banned if len(target) + 1 >= len(one))
            assert (allowed[row, token] == -np.inf) == ends
            assert ends or allowed[row, token] == logits[row, token]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_banned_text_never_comes(beams_translator: Translator, search: str) -> None:
    plain = everything(beams_translator.translate(TEXTS, SEARCHES[search], rows=8))
    (greedy,) = beams_translator.translate(TEXTS[:1])
    banned: list[Target] = [greedy.text, *sorted({one.ids[1:3] for one in plain if len(one.ids) > 4})[:3]]
    sequences = [beams_translator._model.targets.sequence(one, "banned") for one in banned]
    assert sequences[0] == greedy.ids[:-1]
    found = everything(beams_translator.translate(TEXTS, SEARCHES[search], banned=banned, rows=8))
    for one in found:
        for sequence in sequences:
            assert all(one.ids[at : at + len(sequence)] != sequence for at in range(len(one.ids)))
    assert [one.ids for one in found] != [one.ids for one in plain]


class Prefers:
    """A user's filter: one token is worth more."""

    def __init__(self, token: int, nats: float, gain: float | None = None) -> None:
        self.token, self.nats = token, nats
        if gain is not None:
            self.gain = gain

    def __call__(self, logits: FloatArray, rows: FilterRows) -> None:
        assert len(logits) == len(rows.lengths)
        assert (rows.tokens[np.arange(len(logits)), 0] == BOS).all()
        logits[:, self.token] += self.nats


@pytest.mark.parametrize("search", SEARCHES)
def test_a_filter_of_ones_own_has_its_say(beams_translator: Translator, search: str) -> None:
    eos = beams_translator.manifest.framing.eos

    def never_five(logits: FloatArray, rows: FilterRows) -> None:
        assert rows.eos == eos
        logits[:, 5] = -np.inf

    suppressed = beams_translator.translate(TEXTS, SEARCHES[search], suppress=(5,))
    assert beams_translator.translate(TEXTS, SEARCHES[search], filters=[never_five]) == suppressed


def test_filters_add_up_what_they_may_gain() -> None:
    def unknown(logits: FloatArray, rows: FilterRows) -> None:
        """Says nothing of what it may gain."""

    assert UNFILTERED.gain == 0.0
    assert Filters((Suppress((1,)), EndPenalty(-2.0), EndPenalty(3.0), Prefers(5, 1.0, gain=1.5))).gain == 3.5
    assert Filters((RepetitionPenalty(1.2), NoRepeatedNgrams(2), LeastTokens(3), Ban(((1,),)))).gain == 0.0
    assert Filters((RepetitionPenalty(0.5),)).gain == math.inf
    assert Filters((unknown, EndPenalty(-2.0))).gain == math.inf
