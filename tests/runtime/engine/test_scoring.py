from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx import InputError, OptionError, Translator
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.framing import LanguageIds
from kvx.runtime.decoding import decode
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.results import DecodeStats, Sentence
from kvx.runtime.options import TranslateOptions

if TYPE_CHECKING:
    from pathlib import Path

    from kvx.models.importers import Checkpoint
    from kvx.models.transformer import Transformer
    from kvx.tests.conftest import Seed

SOURCES = ["one", "ninety-nine", "twelve thousand three hundred and four", "seven", ""]
TARGETS = ["eins", "neunundneunzig", "zwölftausenddreihundertvier", "acht", "null"]


@pytest.fixture(scope="module")
def model(numbers_bundle: Path) -> Transformer:
    pytest.importorskip("torch", reason="the oracle is eager PyTorch")
    from kvx.models.importers import load_checkpoint

    return load_checkpoint(numbers_bundle / "model.pt").model


def _teacher_forced(model: Transformer, source: tuple[int, ...], target: tuple[int, ...], bos: int) -> list[float]:
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[bos, *target[:-1]]]))[0]
    chosen = logits.double().log_softmax(-1).gather(-1, torch.tensor(target)[:, None])[:, 0]
    return chosen.tolist()  # type: ignore[no-any-return]


def _source_ids(translator: Translator, text: str) -> tuple[int, ...]:
    read = translator._model.sources.read_one(text, 1)
    return read.ids or translator.manifest.framing.source_ids((), LanguageIds())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.lists(st.sampled_from(TARGETS), min_size=1, max_size=5))),
    rows=st.integers(1, 9),
    workers=st.integers(1, 2),
)
def test_scores_are_the_teacher_forced_log_probabilities_whatever_the_mix_and_the_order(
    numbers_translator: Translator,
    model: Transformer,
    pairs: list[tuple[int, list[str]]],
    rows: int,
    workers: int,
) -> None:
    sources = [SOURCES[index] for index, _ in pairs]
    options = TranslateOptions(rows=rows, workers=workers)
    rankings = numbers_translator.rank(sources, [candidates for _, candidates in pairs], options=options)
    bos = numbers_translator.manifest.framing.start_ids(LanguageIds())[0]
    for source, (_, candidates), ranking in zip(sources, pairs, rankings, strict=True):
        assert len(ranking.scores) == len(candidates)
        for score in ranking.scores:
            expected = _teacher_forced(model, _source_ids(numbers_translator, source), score.ids, bos)
            assert score.log_probabilities == pytest.approx(expected, abs=1e-3)
            assert score.tokens == len(expected)
            assert score.sum == pytest.approx(sum(expected), abs=1e-3)
            assert score.per_token == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_greedys_own_score_is_the_score_of_its_output(numbers_translator: Translator) -> None:
    translations = numbers_translator.translate(SOURCES[:4], scores=True)
    scores = numbers_translator.score(SOURCES[:4], [translation.ids for translation in translations])
    assert [score.sum for score in scores] == pytest.approx([one.score for one in translations], abs=1e-4)


def test_the_right_translation_is_ranked_best_with_its_lead(numbers_translator: Translator) -> None:
    candidates = [["zwei", "eins"], ["neunundneunzig", "neun", "neunzig"], ["eins"]]
    rankings = numbers_translator.rank(["one", "ninety-nine", "one"], candidates)
    assert [ranking.best for ranking in rankings] == [1, 0, 0]
    assert rankings[0].margin == pytest.approx(rankings[0].scores[1].sum - rankings[0].scores[0].sum)
    assert rankings[2].margin is None


def test_candidates_may_be_ranked_by_their_mean(numbers_translator: Translator) -> None:
    (ranking,) = numbers_translator.rank(["one"], [["zwei", "zweihundertzwei"]], by="per_token")
    means = [score.per_token for score in ranking.scores]
    assert ranking.best == means.index(max(means))
    assert ranking.margin == pytest.approx(max(means) - min(means))


def test_each_source_is_encoded_once_for_all_its_candidates(
    numbers_translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = numbers_translator._model.backend.encode

    def counted(ids: IntArray, lengths: IntArray) -> Tensors:
        encoded.append(len(ids))
        return encode(ids, lengths)

    monkeypatch.setattr(numbers_translator._model.backend, "encode", counted)
    numbers_translator.rank(["one", "two"], [["eins"] * 5, ["zwei"] * 7])
    assert sum(encoded) == 2


def test_a_target_with_eos_in_its_middle_is_scored_to_its_end(numbers_translator: Translator) -> None:
    eos = numbers_translator.manifest.framing.eos
    (score,) = numbers_translator.score(["one"], [(eos, 5, eos, 6)])
    assert score.ids == (eos, 5, eos, 6)
    assert score.tokens == 4


@pytest.mark.parametrize(
    ("sources", "candidates", "says"),
    [
        (["one"], [["eins"], ["zwei"]], "1 sources and 2 targets"),
        (["one", "two"], [["eins"], []], "Line 2: The source has no candidates"),
        (["one"], ["eins"], "Line 1: The candidates are"),
        (["one"], [[[]]], "Line 1: A target has 0 ids"),
        (["one"], [[[1] * 65]], "Line 1: A target has 65 ids"),
        (["one"], [[[10_000]]], "Line 1: A target has the id 10000"),
        (["one two " * 40], [["eins"]], "Line 1: "),
    ],
)
def test_what_cannot_be_scored_is_refused(
    numbers_translator: Translator, sources: list[str], candidates: list[list[str]], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        numbers_translator.rank(sources, candidates)


def test_scores_of_the_reference_are_those_of_the_original_code(seed_translator: Translator, seed: Seed) -> None:
    lines = list(zip(seed.sources, seed.greedy, strict=True))
    random.Random(0).shuffle(lines)
    scores = seed_translator.score([source for source, _ in lines], [line["ids"] for _, line in lines])  # type: ignore[misc]
    assert [score.sum for score in scores] == pytest.approx([line["logprob"] for _, line in lines], abs=1e-3)


def test_scores_of_references_equal_the_oracles(
    seed_translator: Translator, seed_checkpoint: Checkpoint, seed: Seed
) -> None:
    sources, references = seed.sources[:20], seed.references[:20]
    bos = seed_translator.manifest.framing.start_ids(LanguageIds())[0]
    for source, score in zip(sources, seed_translator.score(sources, references), strict=True):
        expected = _teacher_forced(seed_checkpoint.model, _source_ids(seed_translator, source), score.ids, bos)
        assert score.log_probabilities == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("target", [[3.5], ["a"], [True], [-1], "\ud800"])
def test_a_target_that_is_neither_text_nor_ids_is_refused(numbers_translator: Translator, target: object) -> None:
    with pytest.raises(InputError, match="Line 2: "):
        numbers_translator.score(["one", "two"], ["eins", target])  # type: ignore[list-item]


def test_few_targets_are_scored_several_tokens_at_a_time(numbers_translator: Translator) -> None:
    backend, eos = numbers_translator._model.backend, numbers_translator.manifest.framing.eos
    plan, _ = numbers_translator._model.plan(TranslateOptions(rows=4, workers=1))
    sources = [
        Sentence(index, (2, 5 + index, 3), ((7, 8, 9, 10 + index) * (1 + index) + (eos,),)) for index in range(6)
    ]
    stats = DecodeStats()
    found = {one.sentence.number: one for one in decode.score(backend, plan, sources, stats)}
    assert stats.steps < stats.tokens / 4
    assert stats.tokens == sum(len(source.targets[0]) for source in sources)

    class OneByOne:
        def __getattr__(self, name: str) -> object:
            return False if name == "query_tokens" else getattr(backend, name)

    alone: Backend = OneByOne()  # type: ignore[assignment]
    for one in decode.score(alone, plan, sources):
        assert found[one.sentence.number].best.ids == one.best.ids
        assert found[one.sentence.number].best.log_probabilities == pytest.approx(one.best.log_probabilities, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"beam_size": 4}, {"samples": 2}, {"prefix": "ein"}, {"max_new_tokens": 3}, {"scores": True}]
)
def test_what_is_no_matter_of_scoring_is_refused_by_name(
    numbers_translator: Translator, options: dict[str, int]
) -> None:
    with pytest.raises(OptionError, match=f"`{next(iter(options))}` is .*, but translations are scored"):
        numbers_translator.score(["one"], ["eins"], TranslateOptions(**options))  # type: ignore[arg-type]
