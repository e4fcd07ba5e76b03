"""Searches, on a backend without a model and against slow ones that are as plain as can be.

The fake step's logits are a function of the source and of the whole target before, both as they are found in the
cache: a row that follows the wrong parent, or loses its source, shows in what is found and in its scores.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import assume, example, given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvx import Translator
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import Capacity, KVCache
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.filters import UNFILTERED, Filters, LeastTokens
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import DecodeStats, Hypothesis, Sentence
from kvx.runtime.decoding.search import (
    BLOCK,
    BeamSearch,
    Greedy,
    Sampling,
    Search,
    best_continuations,
    largest,
    log_probabilities,
)
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import TranslateOptions, filters_of

if TYPE_CHECKING:
    from pathlib import Path

    from kvx import Translation
    from kvx.runtime.text.targets import TargetReader

BOS, EOS = 0, 1
TIE = 1e-5  # what float32 may exchange
WORDS = ["one", "two", "seven", "twelve", "thirty-one", "eighty", "hundred", "thousand", "and"]
TEXTS = [" ".join(WORDS[(number * 5 + i * 2) % len(WORDS)] for i in range(1 + number % 6)) for number in range(24)]

Ids = tuple[int, ...]
Logits = Callable[[Ids, Ids], FloatArray]


def logits_of(vocabulary: int, spread: float = 2.0) -> Logits:
    """A model without weights: (source, target so far, bos first) → logits [V], by chance but always the same."""

    @functools.cache
    def logits(source: Ids, target: Ids) -> FloatArray:
        drawn = np.random.default_rng([vocabulary, *source, 10_000, *target]).normal(scale=spread, size=vocabulary)
        return drawn.astype(np.float32)

    return logits


class FakeBackend:
    """Runs such a model on nothing but what it finds in the cache. Beyond the lengths there is nonsense."""

    name = "fake"
    decodes = 1
    query_tokens = False

    def __init__(self, vocabulary: int, *, shared: bool = False, spread: float = 2.0) -> None:
        self.vocabulary = vocabulary
        self.logits = logits_of(vocabulary, spread)
        self.cache_specs = self._specs("B")
        self.beam_cache_specs = self._specs("G" if shared else "B")

    def _specs(self, sources: str) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("past", "float32", ("B", 1, "T", 1)),
            TensorSpec("source", "float32", (sources, 1, "S", 1)),
        )

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        return {"source": input_ids.astype(np.float32)[:, None, :, None]}

    def bind_chunk(self, cache: KVCache) -> Step:
        raise NotImplementedError  # it takes one token of a row

    def bind(self, cache: KVCache) -> Step:
        def step(input_ids: IntArray) -> StepOutput:
            past, lengths = cache.buffers["past"][:, 0, :, 0], cache.lengths
            rows = []
            for row, fed in enumerate(input_ids.tolist()):
                past[row, lengths[row]] = fed
                past[row, lengths[row] + 1 :] = 999
                target = tuple(past[row, : lengths[row] + 1].astype(int).tolist())
                rows.append(self.logits(self._source(cache, row), target))
            return StepOutput(np.stack(rows))

        return step

    def _source(self, cache: KVCache, row: int) -> Ids:
        place = row // cache.capacity.beams if cache.shared_sources else row
        ids = cache.buffers["source"][place, 0, : cache.source_lengths[place], 0]
        return tuple(ids.astype(int).tolist())

    def plan(self, *, beams: int, seats: int, limit: int, group: int = 4) -> Plan:
        return Plan(
            start=(BOS,),
            eos=EOS,
            pad=0,
            rows=seats * beams,
            max_new_tokens=limit,
            source_positions=50,
            cache_bytes=2**30,
            target_bytes=Capacity(beams, 1, 0, beams).bytes(self.beam_cache_specs),
            source_bytes=Capacity(beams, 0, 1, beams).bytes(self.beam_cache_specs),
            beams=beams,
            group=group,
        )

    def run(
        self,
        sources: Sequence[Sentence],
        search: Search,
        limit: int,
        *,
        seats: int = 3,
        filters: Filters = UNFILTERED,
        scored: bool = False,
    ) -> dict[tuple[int, int], tuple[Hypothesis, ...]]:
        plan = self.plan(beams=search.beams, seats=seats, limit=limit)
        outcomes = list(decode(self, sources, search, plan, filters=filters, scored=scored))
        found = {(outcome.sentence.number, outcome.target): outcome.hypotheses for outcome in outcomes}
        assert len(found) == len(outcomes) == sum(len(source.targets) for source in sources)
        return found


NO_READER = cast("TargetReader", None)  # for options that name no piece


class TiedError(Exception):
    """What float32 may exchange would decide."""


@dataclass(frozen=True)
class Oracle:
    """The truth about a model: every target's log-probability, and a beam search without any cache or batch."""

    logits: Logits
    vocabulary: int
    limit: int
    least: int = 1
    end_gain: float = 0.0

    def log_probabilities(self, source: Ids, target: Ids) -> NDArray[np.float64]:
        logits = self.logits(source, (BOS, *target)).astype(np.float64)
        found: NDArray[np.float64] = logits - np.logaddexp.reduce(logits)
        return found

    def score(self, source: Ids, ids: Ids) -> float:
        return math.fsum(self.log_probabilities(source, ids[:at])[one] for at, one in enumerate(ids))

    def rank_score(self, source: Ids, ids: Ids, penalty: float) -> float:
        """By the length of what stands before eos, bos counted."""
        length = 1 + sum(one != EOS for one in ids)
        return self.score(source, ids) / math.pow(length, penalty)

    def all_targets(self) -> list[Ids]:
        """Everything that ends in time or comes to the limit."""
        others = [one for one in range(self.vocabulary) if one != EOS]
        ended = [
            (*ids, EOS)
            for length in range(self.least - 1, self.limit)
            for ids in itertools.product(others, repeat=length)
        ]
        return [*ended, *itertools.product(others, repeat=self.limit)]

    def beam_search(self, source: Ids, size: int, penalty: float, enough: float) -> list[tuple[float, Ids]]:
        """What is found, in words: each step takes the 2·size best continuations of all beams; eos among the first
        `size` closes a hypothesis, further down it is dropped; the first `size` others go on, until `enough`
        hypotheses are closed. At the limit the open beams are closed as they are. The `size` best of all, sorted.
        """
        beams: list[tuple[float, Ids]] = [(0.0, ())]
        closed: list[tuple[float, Ids]] = []
        for _ in range(self.limit):
            candidates = []
            for total, ids in beams:
                for one, more in enumerate(self.log_probabilities(source, ids)):
                    if one != EOS or len(ids) + 1 >= self.least:
                        gain = self.end_gain if one == EOS else 0.0
                        candidates.append((total + float(more) + gain, (*ids, one)))
            candidates.sort(reverse=True)
            if not _apart([total for total, _ in candidates[: 2 * size + 1]]):
                raise TiedError
            beams = []
            for place, (total, ids) in enumerate(candidates[: 2 * size]):
                if ids[-1] != EOS:
                    beams.append((total, ids))
                elif place < size:
                    closed.append((total / len(ids) ** penalty, ids))
            beams = beams[:size]
            if not beams or len(closed) >= enough:
                break
        else:
            closed += [(total / (len(ids) + 1) ** penalty, ids) for total, ids in beams]
        return sorted(closed, reverse=True)[:size]


def untied(oracle: Oracle, source: Ids, size: int, penalty: float, enough: float) -> list[tuple[float, Ids]]:
    """What a beam search finds, but for examples in which a tie decides."""
    try:
        found = oracle.beam_search(source, size, penalty, enough)
    except TiedError:
        reject()
    assume(_apart([score for score, _ in found]))
    return found


def _apart(falling: Sequence[float]) -> bool:
    return all(one - other > TIE for one, other in itertools.pairwise(falling))


def sources_of(seeds: Sequence[int]) -> list[Sentence]:
    return [Sentence(index, (2, *[3 + seed] * (1 + seed % 4), index + 2)) for index, seed in enumerate(seeds)]


seeds = st.lists(st.integers(0, 30), min_size=1, max_size=9)
penalties = st.sampled_from([1.0, 0.0, 0.5, 2.0, -0.7])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(2, 4),
    limit=st.integers(1, 4),
    least=st.integers(1, 4),
    seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    penalty=penalties,
    early=st.booleans(),
    shared=st.booleans(),
)
def test_beams_enough_for_every_target_find_the_best_of_all(
    vocabulary: int, limit: int, least: int, seeds: list[int], penalty: float, early: bool, shared: bool
) -> None:
    least = min(least, limit)
    backend, sources = FakeBackend(vocabulary, shared=shared), sources_of(seeds)
    search = BeamSearch(
        vocabulary**limit, length_penalty=penalty, early_stopping=early, n_best=min(3, vocabulary**limit)
    )
    filters = Filters((LeastTokens(least),) if least > 1 else ())
    found = backend.run(sources, search, limit, seats=2, filters=filters, scored=True)
    oracle = Oracle(backend.logits, vocabulary, limit, least)
    for source in sources:
        ranked = sorted(
            ((oracle.rank_score(source.ids, ids, penalty), ids) for ids in oracle.all_targets()), reverse=True
        )[:3]
        assume(_apart([score for score, _ in ranked]))
        hypotheses = found[source.number, 0]
        assert [one.ids for one in hypotheses] == [ids for _, ids in ranked]
        assert [one.rank_score for one in hypotheses] == pytest.approx([score for score, _ in ranked], abs=TIE)
        assert [one.score for one in hypotheses] == pytest.approx(
            [oracle.score(source.ids, ids) for _, ids in ranked], abs=TIE
        )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(3, 30),
    size=st.integers(1, 7),
    limit=st.integers(1, 10),
    least=st.integers(1, 4),
    seeds=seeds,
    seats=st.integers(1, 5),
    penalty=penalties,
    patience=st.sampled_from([1.0, 0.3, 1.5, 3.0]),
    shared=st.booleans(),
)
@example(vocabulary=3, size=7, limit=6, least=1, seeds=[1, 2, 3, 4, 5], seats=2, penalty=1.0, patience=1.0, shared=True)
def test_beams_are_those_of_a_plain_beam_search_whatever_the_neighbours(
    vocabulary: int,
    size: int,
    limit: int,
    least: int,
    seeds: list[int],
    seats: int,
    penalty: float,
    patience: float,
    shared: bool,
) -> None:
    least = min(least, limit)
    backend, sources = FakeBackend(vocabulary, shared=shared), sources_of(seeds)
    search = BeamSearch(size, length_penalty=penalty, patience=patience, n_best=size)
    filters = Filters((LeastTokens(least),) if least > 1 else ())
    found = backend.run(sources, search, limit, seats=seats, filters=filters, scored=True)
    oracle = Oracle(backend.logits, vocabulary, limit, least)
    for source in sources:
        expected = untied(oracle, source.ids, size, penalty, size * max(1.0, patience))  # n_best are wanted
        hypotheses = found[source.number, 0]
        assert [one.ids for one in hypotheses] == [ids for _, ids in expected]
        assert [one.rank_score for one in hypotheses] == pytest.approx([score for score, _ in expected], abs=TIE)
        assert [one.ended for one in hypotheses] == [ids[-1] == EOS for _, ids in expected]
        for one in hypotheses:
            own = [oracle.log_probabilities(source.ids, one.ids[:at])[each] for at, each in enumerate(one.ids)]
            assert one.log_probabilities == pytest.approx(own, abs=TIE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(3, 12),
    size=st.integers(1, 4),
    limit=st.integers(1, 9),
    seeds=seeds,
    penalty=penalties,
    spread=st.sampled_from([0.5, 2.0, 6.0]),
    end_penalty=st.sampled_from([None, 3.0, -3.0, -0.5]),
)
@example(vocabulary=4, size=2, limit=6, seeds=list(range(12)), penalty=1.0, spread=0.5, end_penalty=-3.0)
def test_without_early_stopping_the_best_are_those_of_a_search_that_never_stops(
    vocabulary: int,
    size: int,
    limit: int,
    seeds: list[int],
    penalty: float,
    spread: float,
    end_penalty: float | None,
) -> None:
    backend, sources = FakeBackend(vocabulary, spread=spread), sources_of(seeds)
    options = TranslateOptions(
        beam_size=size + 1, n_best=size + 1, length_penalty=penalty, early_stopping=False, end_penalty=end_penalty
    )
    size, search = options.search.beams, options.search
    found = backend.run(sources, search, limit, filters=filters_of(options, NO_READER))
    oracle = Oracle(backend.logits, vocabulary, limit, end_gain=-(end_penalty or 0.0))
    for source in sources:
        expected = untied(oracle, source.ids, size, penalty, math.inf)
        assert [one.ids for one in found[source.number, 0]] == [ids for _, ids in expected]


def test_without_early_stopping_a_search_ends_before_the_limit_where_nothing_can_get_better() -> None:
    backend, sources, limit = FakeBackend(6, spread=6.0), sources_of(range(10)), 40
    steps = {}
    for early in (True, False):
        stats = DecodeStats()
        plan = backend.plan(beams=2, seats=10, limit=limit)
        search = BeamSearch(2, early_stopping=early, length_penalty=0.0)
        assert len(list(decode(backend, sources, search, plan, stats))) == 10
        steps[early] = stats.row_steps
    assert steps[True] <= steps[False] < 10 * 2 * limit


@settings(max_examples=60, deadline=None, derandomize=True)
@given(vocabulary=st.integers(3, 12), size=st.integers(1, 5), seeds=seeds, penalty=penalties)
def test_searching_longer_never_finds_worse(vocabulary: int, size: int, seeds: list[int], penalty: float) -> None:
    backend, sources = FakeBackend(vocabulary), sources_of(seeds)
    quick = BeamSearch(size, length_penalty=penalty)
    searches = (replace(quick, patience=0.5), quick, replace(quick, patience=2.0), replace(quick, early_stopping=False))
    best = [backend.run(sources, search, 8) for search in searches]
    for source in sources:
        scores = [found[source.number, 0][0].rank_score for found in best]
        assert None not in scores
        assert scores == sorted(scores)  # type: ignore[type-var]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(vocabulary=st.integers(3, 40), limit=st.integers(1, 12), seeds=seeds, seats=st.integers(1, 5))
def test_a_single_beam_and_a_single_candidate_are_greedy(
    vocabulary: int, limit: int, seeds: list[int], seats: int
) -> None:
    backend, sources = FakeBackend(vocabulary), sources_of(seeds)
    greedy = backend.run(sources, Greedy(), limit, seats=seats, scored=True)
    beam = backend.run(sources, BeamSearch(1), limit, seats=seats, scored=True)
    one = backend.run(sources, Sampling(seed=3, top_k=1), limit, seats=seats, scored=True)
    cold = backend.run(sources, Sampling(seed=3, temperature=1e-7), limit, seats=seats, scored=True)
    assert one == cold == greedy
    assert {key: [each.ids for each in found] for key, found in beam.items()} == {
        key: [each.ids for each in found] for key, found in greedy.items()
    }
    for key, found in greedy.items():
        assert beam[key][0].log_probabilities == pytest.approx(found[0].log_probabilities)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(vocabulary=st.integers(3, 12), size=st.integers(1, 6), seeds=seeds, early=st.booleans(), data=st.data())
def test_the_best_are_sorted_distinct_and_no_more_than_asked_for(
    vocabulary: int, size: int, seeds: list[int], early: bool, data: st.DataObject
) -> None:
    n_best = data.draw(st.integers(1, size))
    backend, sources = FakeBackend(vocabulary), sources_of(seeds)
    for hypotheses in backend.run(sources, BeamSearch(size, early_stopping=early, n_best=n_best), 6).values():
        scores = [one.rank_score for one in hypotheses if one.rank_score is not None]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == len({one.ids for one in hypotheses}) == len(hypotheses)
        assert 1 <= len(hypotheses) <= n_best
        assert len(hypotheses) == n_best or vocabulary < 2 * size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(vocabulary=st.integers(3, 12), size=st.integers(2, 5), seeds=seeds, prefix=st.lists(st.just(2), max_size=3))
def test_beams_go_on_from_what_is_given_as_if_it_had_come_by_itself(
    vocabulary: int, size: int, seeds: list[int], prefix: list[int]
) -> None:
    given_ids, limit = tuple(prefix), 7
    backend = FakeBackend(vocabulary)
    sources = [replace(source, targets=(given_ids,)) for source in sources_of(seeds)]
    found = backend.run(sources, BeamSearch(size, length_penalty=0.0, n_best=size), limit, scored=True)

    def after(source: Ids, target: Ids) -> FloatArray:
        return backend.logits(source, (BOS, *given_ids, *target[1:]))

    rest = Oracle(after, vocabulary, limit - len(given_ids))
    whole = Oracle(backend.logits, vocabulary, limit)
    for source in sources:
        expected = untied(rest, source.ids, size, 0.0, size)
        assert [one.ids for one in found[source.number, 0]] == [(*given_ids, *ids) for _, ids in expected]
        for one in found[source.number, 0]:
            assert one.score == pytest.approx(whole.score(source.ids, one.ids), abs=TIE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "search", [Greedy(), Sampling(seed=2), BeamSearch(4, n_best=4)], ids=lambda one: type(one).__name__
)
def test_attention_is_that_of_each_hypothesis_own_tokens(search: Search, shared: bool) -> None:
    class Attentive(FakeBackend):
        """The weights of a step are as much its own as its logits."""

        def attention(self, source: Ids, target: Ids) -> FloatArray:
            return np.resize(self.logits(source, target), len(source))

        def bind(self, cache: KVCache) -> Step:
            step = super().bind(cache)
            weights = np.zeros((64, 50), np.float32)  # used again and again, as a graph's outputs are

            def attentive(input_ids: IntArray) -> StepOutput:
                output = step(input_ids)
                for row in range(len(input_ids)):
                    source = self._source(cache, row)
                    target = cache.buffers["past"][row, 0, : cache.lengths[row] + 1, 0].astype(int).tolist()
                    weights[row] = 999
                    weights[row, : len(source)] = self.attention(source, tuple(target))
                return output._replace(attention=weights[: len(input_ids)])

            return attentive

    backend, sources = Attentive(7, shared=shared), sources_of(range(12))
    plan = backend.plan(beams=search.beams, seats=3, limit=8)
    for outcome in decode(backend, sources, search, plan, with_attention=True):
        source = sources[outcome.sentence.number].ids
        for one in outcome.hypotheses:
            own = [backend.attention(source, (BOS, *one.ids[:at])) for at in range(len(one.ids))]
            assert one.attention is not None
            np.testing.assert_array_equal(one.attention, np.stack(own))


@pytest.mark.parametrize("given_ids", [(), (5, 6, 5)])
def test_what_beams_have_in_common_is_the_same_to_the_last_bit_in_their_caches(given_ids: Ids) -> None:
    class Marking(FakeBackend):
        """What a step writes has a fraction of its own, as if rows of the same tokens were rounded differently."""

        written, checked = 0, 0

        def bind(self, cache: KVCache) -> Step:
            step = super().bind(cache)

            def marking(input_ids: IntArray) -> StepOutput:
                self.check(cache)
                output = step(input_ids)
                for row in range(cache.active):
                    self.written += 1
                    cache.buffers["past"][row, 0, cache.lengths[row], 0] += self.written / 2**17
                return output

            return marking

        def check(self, cache: KVCache) -> None:
            """All rows are beams as soon as one token has been chosen."""
            for row, other in itertools.combinations(range(cache.active), 2):
                length = int(cache.lengths[row])
                if row // cache.capacity.beams == other // cache.capacity.beams and length > len(given_ids):
                    one, two = cache.buffers["past"][[row, other], 0, :length, 0]
                    common = int(np.cumprod(one.astype(int) == two.astype(int)).sum())
                    np.testing.assert_array_equal(one[:common], two[:common])
                    self.checked += common

    backend = Marking(40, spread=0.5)
    backend.run([replace(source, targets=(given_ids,)) for source in sources_of(range(8))], BeamSearch(4), 12)
    assert backend.checked > 0


def test_a_search_over_many_positions_keeps_its_beams_apart_while_the_cache_grows() -> None:
    backend, limit = FakeBackend(40, spread=0.5), 40
    sources = [Sentence(index, (2, *[3 + index] * (1 + 11 * (index % 4)), 4)) for index in range(6)]
    search = BeamSearch(3, n_best=3)
    stats = DecodeStats()
    outcomes = list(decode(backend, sources, search, backend.plan(beams=3, seats=2, limit=limit), stats))
    assert stats.repacks > 0
    oracle = Oracle(backend.logits, 40, limit)
    for outcome in outcomes:
        expected = oracle.beam_search(sources[outcome.sentence.number].ids, 3, 1.0, 3)
        assert [one.ids for one in outcome.hypotheses] == [ids for _, ids in expected]


def test_beams_are_those_of_eager_pytorch_without_a_cache(beams_translator: Translator, numbers_bundle: Path) -> None:
    pytest.importorskip("torch", reason="the oracle is eager PyTorch")
    from kvx.models.eager import NoCacheBackend
    from kvx.models.importers import load_checkpoint

    model = load_checkpoint(numbers_bundle / "model.pt").model
    eager = Translator(LoadedModel(Bundle.open(numbers_bundle), NoCacheBackend(model)))
    options = TranslateOptions(beam_size=4, n_best=2, rows=40)
    expected = [found_in(one) for one in eager.translate(TEXTS[:12], options)]
    assert [found_in(one) for one in beams_translator.translate(TEXTS[:12], options)] == expected
    torchscript = Translator.load(numbers_bundle, backend="torchscript")
    assert [found_in(one) for one in torchscript.translate(TEXTS[:12], options)] == expected


def test_beams_score_as_the_translator_scores_their_ids(beams_translator: Translator) -> None:
    translations = beams_translator.translate(TEXTS, beam_size=4, n_best=3, scores=True, rows=12)
    for number in range(3):
        found = [(one, *one.others)[number] for one in translations]
        scores = beams_translator.score(TEXTS, [one.ids for one in found])
        for one, score in zip(found, scores, strict=True):
            assert one.log_probabilities == pytest.approx(score.log_probabilities, abs=1e-3)


SEARCHES = {
    "beams": TranslateOptions(beam_size=4, n_best=3),
    "patient beams": TranslateOptions(beam_size=3, n_best=2, length_penalty=0.6, early_stopping=False),
    "samples": TranslateOptions(samples=3, seed=11, temperature=1.3),
    "samples of few": TranslateOptions(samples=2, seed=5, top_k=20, top_p=0.9),
}


def found_in(translation: Translation) -> list[Ids]:
    return [one.ids for one in (translation, *translation.others)]


@functools.cache
def alone(translator: Translator, name: str, text: str) -> list[Ids]:
    (translation,) = translator.translate([text], SEARCHES[name].changed(rows=SEARCHES[name].search.beams))
    return found_in(translation)


@pytest.mark.parametrize("name", SEARCHES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.sampled_from(["", *TEXTS]), min_size=1, max_size=20),
    rows=st.integers(4, 30),
    workers=st.integers(1, 3),
)
def test_neighbours_order_rows_and_workers_change_no_answer(
    beams_translator: Translator, name: str, texts: list[str], rows: int, workers: int
) -> None:
    options = replace(SEARCHES[name], rows=rows, workers=workers)
    if "samples" in name:  # those of equal texts differ
        texts = list(dict.fromkeys(texts))
    expected = [alone(beams_translator, name, text) for text in texts]
    assert [found_in(one) for one in beams_translator.translate(texts, options)] == expected
    streamed = beams_translator.translate_iter(texts, replace(options, window=5))
    assert [found_in(one) for one in streamed] == expected


def test_other_seeds_give_other_samples_and_the_same_seed_the_same(beams_translator: Translator) -> None:
    def samples(seed: int | None) -> list[list[Ids]]:
        drawn = beams_translator.translate(TEXTS[:6], samples=5, seed=seed, temperature=2.0)
        return [found_in(one) for one in drawn]

    assert samples(1) == samples(1)
    assert all(one != other for one, other in zip(samples(1), samples(2), strict=True))
    assert samples(None) != samples(None)
    assert all(len(found) == 5 and len(set(found)) > 1 for found in samples(3))


def test_the_first_samples_are_the_same_however_many_more_there_are(beams_translator: Translator) -> None:
    many = beams_translator.translate(TEXTS[:6], samples=6, seed=4)
    few = beams_translator.translate(TEXTS[:6], samples=2, seed=4)
    assert [found_in(one) for one in few] == [found_in(one)[:2] for one in many]


def test_samples_come_as_often_as_they_are_probable() -> None:
    draws, temperature = 16_000, 1.7
    logits = np.random.default_rng(0).normal(scale=1.5, size=12).astype(np.float32)
    shown = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * shown / shown.sum()
    backend = FakeBackend(12)
    backend.logits = lambda source, target: logits
    sources = [Sentence(index, (2, 3, index), ((),) * 40) for index in range(draws // 40)]
    found = backend.run(sources, Sampling(seed=1, temperature=temperature), 1, seats=500)
    counts = np.bincount([hypotheses[0].ids[0] for hypotheses in found.values()], minlength=12)
    degrees = len(logits) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * math.sqrt(2 * degrees)


def test_samples_score_as_the_model_has_them_whatever_the_temperature() -> None:
    backend, sources = FakeBackend(9), sources_of(range(8))
    oracle = Oracle(backend.logits, 9, 6)
    for sampling in (Sampling(seed=1, temperature=3.0), Sampling(seed=1, top_k=2, top_p=0.7)):
        for (index, _), (one,) in backend.run(sources, sampling, 6, scored=True).items():
            assert one.score == pytest.approx(oracle.score(sources[index].ids, one.ids), abs=TIE)


@dataclass(frozen=True)
class Allowed:
    """The ids that may be drawn, in ascending order, and their shares of the probability."""

    ids: IntArray
    shares: NDArray[np.float64]

    def drawn_by(self, uniform: NDArray[np.float64]) -> list[int | None]:
        """The id whose interval holds each number, or None where rounding might move its end."""
        ends = self.shares.cumsum()[:-1]
        places = np.searchsorted(ends, uniform, side="right")
        close = np.abs(np.append(ends, 2.0)[[places, np.maximum(places - 1, 0)]] - uniform).min(axis=0) < TIE
        return [None if near else int(self.ids[place]) for near, place in zip(close, places, strict=True)]


def allowed_by(logits: FloatArray, top_k: int | None, top_p: float) -> Allowed:
    """The definition. Raises TiedError where the nucleus ends within what rounding may move."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    masses = np.exp(logits[order].astype(np.float64))
    order, masses = order[masses > 0], masses[masses > 0]
    reached = (masses / masses.sum()).cumsum()
    if top_p < 1 and np.abs(reached - top_p).min() < TIE / 10:
        raise TiedError
    nucleus = 1 + int((reached < top_p).sum()) if top_p < 1 else len(order)
    by_id = np.argsort(order[:nucleus])
    return Allowed(order[by_id], masses[by_id] / masses[by_id].sum())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    vocabulary=st.integers(1, 200),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    top_k=st.none() | st.integers(1, 200),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05, 0.999]),
    banned=st.integers(0, 100),
)
def test_samples_are_drawn_from_exactly_the_most_probable(
    seed: int, n: int, vocabulary: int, spread: float, top_k: int | None, top_p: float, banned: int
) -> None:
    try:
        _draws_exactly(seed, n, vocabulary, spread, top_k, top_p, min(banned, vocabulary - 1))
    except TiedError:
        reject()


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (None, 0.2), (40, 1.0), (300, 0.8)])
@pytest.mark.parametrize("spread", [0.2, 2.0, 6.0])
def test_samples_are_drawn_from_exactly_the_most_probable_of_a_large_vocabulary(
    top_k: int | None, top_p: float, spread: float
) -> None:
    _draws_exactly(7, 2, 64 * 4 * BLOCK + 17, spread, top_k, top_p, 0)


def _draws_exactly(
    seed: int, n: int, vocabulary: int, spread: float, top_k: int | None, top_p: float, banned: int
) -> None:
    """Rows of different shapes side by side: the middle of each allowed id's interval gives this id, and any number
    gives one that is allowed.
    """
    chance = np.random.default_rng(seed)
    logits = (chance.normal(size=(n, vocabulary)) * spread * np.arange(1, n + 1)[:, None]).astype(np.float32)
    logits[:, chance.permutation(vocabulary)[:banned]] = -np.inf
    sampling = Sampling(seed=0, top_k=top_k, top_p=top_p)
    rows = [allowed_by(row, top_k, top_p) for row in logits]
    numbers = []
    for allowed in rows:
        middles = allowed.shares.cumsum() - allowed.shares / 2
        numbers.append(chance.permutation(np.concatenate([middles, chance.random(50), [0.0, 1 - 2**-53]]))[:300])
    for uniform in np.array([np.resize(each, max(map(len, numbers))) for each in numbers]).T:
        drawn = sampling.draw(logits, uniform).tolist()
        for one, number, allowed in zip(drawn, uniform, rows, strict=True):
            (expected,) = allowed.drawn_by(np.array([number]))
            assert one == expected or (expected is None and one in allowed.ids)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_samples_at_no_temperature_are_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(20, 50)).astype(np.float32)
    logits[:, :5] = -np.inf
    for sampling in (
        Sampling(1, temperature, seed=0),
        Sampling(1, temperature, 5, seed=0),
        Sampling(1, temperature, None, 0.9, 0),
    ):
        backend = FakeBackend(50)
        backend.logits = lambda source, target: logits[source[1]]
        found = backend.run([Sentence(index, (2, index)) for index in range(20)], sampling, 1)
        assert [found[index, 0][0].ids[0] for index in range(20)] == logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_samples_at_any_heat_are_of_what_is_allowed(temperature: float) -> None:
    logits = np.zeros(8, np.float32)
    logits[[0, 1, 4]] = -np.inf
    logits[5] = 30
    backend = FakeBackend(8)
    backend.logits = lambda source, target: logits
    sources = [Sentence(0, (2, 3), ((),) * 200)]
    found = backend.run(sources, Sampling(seed=0, temperature=temperature), 1)
    assert {hypotheses[0].ids[0] for hypotheses in found.values()} == {2, 3, 5, 6, 7}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    vocabulary=st.integers(1, 3) | st.integers(1, 5 * BLOCK * 4),
    count=st.integers(1, 6),
    levels=st.sampled_from([2, 5, 50, 2**20]),
    banned=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
)
@example(seed=0, n=2, vocabulary=4 * BLOCK + 1, count=1, levels=2, banned=0.0)
@example(seed=0, n=2, vocabulary=5 * BLOCK - 1, count=1, levels=2**20, banned=0.9)
def test_the_largest_are_those_of_a_sort(
    seed: int, n: int, vocabulary: int, count: int, levels: int, banned: float
) -> None:
    chance = np.random.default_rng(seed)
    logits = chance.integers(-levels, levels, (n, vocabulary)).astype(np.float32)
    logits[chance.random(logits.shape) < banned] = -np.inf
    count = min(count, vocabulary)
    values, ids = largest(logits, count)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=-1))
    np.testing.assert_array_equal(values, np.take_along_axis(logits, ids, axis=-1))
    assert [len(set(row)) for row in ids.tolist()] == [count] * n
    possible = values > -np.inf
    np.testing.assert_array_equal(ids[possible], expected[possible])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    seats=st.integers(1, 3),
    k=st.integers(1, 5),
    vocabulary=st.integers(1, 3) | st.integers(1, 20 * BLOCK),
    levels=st.sampled_from([1, 2, 5, 50, 2**20]),
    banned=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    idle=st.sampled_from([0.0, 0.5]),
)
@example(seed=0, seats=2, k=3, vocabulary=4 * BLOCK + 1, levels=2, banned=0.0, idle=0.5)
@example(seed=0, seats=2, k=4, vocabulary=5 * BLOCK - 1, levels=2**20, banned=0.9, idle=0.0)
def test_the_best_continuations_are_those_of_a_sort(
    seed: int, seats: int, k: int, vocabulary: int, levels: int, banned: float, idle: float
) -> None:
    chance, n = np.random.default_rng(seed), seats * k
    logits = chance.integers(-levels, levels, (n, vocabulary)).astype(np.float32)
    logits[chance.random(logits.shape) < banned] = -np.inf
    scores, normalizers = chance.integers(-2, 1, n).astype(np.float64), chance.integers(0, 2, n).astype(np.float64)
    scores[chance.random(n) < idle] = -np.inf
    parents, tokens, totals = best_continuations(logits, scores, normalizers, k)
    every = (scores[:, None] + logits - normalizers[:, None]).reshape(seats, -1)
    order = np.argsort(-every, axis=-1, kind="stable")[:, : 2 * k]  # of whole numbers, which are not rounded
    expected = np.take_along_axis(every, order, axis=-1)
    np.testing.assert_array_equal(totals, expected)
    assert (parents // k == np.arange(seats)[:, None]).all()
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    possible = expected > -np.inf
    numbers = parents % k * vocabulary + tokens
    np.testing.assert_array_equal(numbers[possible], order[possible])


def test_equal_totals_come_in_the_order_of_rows_then_of_logits_then_of_ids() -> None:
    logits = np.full((2, 20 * BLOCK), -9, np.float32)
    logits[0, [7, 9]], logits[0, 3], logits[1, 1] = 2e-20, 1e-20, 0  # beside −1 all of these are 0
    parents, tokens, totals = best_continuations(logits, np.full(2, -1.0), np.zeros(2), 2)
    assert parents.tolist() == [[0, 0, 0, 1]]
    assert tokens.tolist() == [[7, 9, 3, 1]]
    assert totals.tolist() == [[-1.0] * 4]


def test_log_probabilities_are_those_of_a_softmax_in_float64() -> None:
    logits = np.random.default_rng(0).normal(scale=8, size=(30, 500)).astype(np.float32)
    logits += np.float32(300)  # as large as an exponential in float32 could not hold
    ids = np.arange(30) * 3
    exact = logits.astype(np.float64)
    expected = exact[np.arange(30), ids] - np.logaddexp.reduce(exact, axis=-1)
    assert log_probabilities(logits, ids) == pytest.approx(expected, abs=1e-6)


def test_little_patience_never_gives_fewer_than_were_asked_for(beams_translator: Translator) -> None:
    texts = ["seven", "twelve thousand three hundred and four"]
    for found in beams_translator.translate(texts, beam_size=4, n_best=4, patience=0.25):
        assert len(found.hypotheses) == 4
