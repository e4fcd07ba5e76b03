from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvx import InputError, OptionError
from kvx.runtime.options import TranslateOptions

if TYPE_CHECKING:
    from kvx import Translator

TEXTS = ["one", "nine hundred and ninety-nine", "twelve thousand three hundred and four"]
SEARCHES = {
    "greedy": TranslateOptions(),
    "scores": TranslateOptions(scores=True),
    "beams": TranslateOptions(beam_size=3, n_best=2, scores=True),
    "samples": TranslateOptions(samples=2, seed=3),
    "short": TranslateOptions(max_new_tokens=5),
    "few rows": TranslateOptions(rows=2, workers=2),
    "suppressed": TranslateOptions(suppress=(5, 6, 7, 8, 9, 10, 11, 12)),
}

Ids = tuple[int, ...]


def most_probable(translator: Translator, text: str, prefix: Ids, without: Ids = ()) -> list[int]:
    """Every token by its probability after the prefix, as scoring has it."""
    vocabulary = [one for one in range(translator.manifest.model["target_vocab_size"]) if one not in without]
    scores = translator.score([text] * len(vocabulary), [(*prefix, one) for one in vocabulary])
    last = {one: score.log_probabilities[-1] for one, score in zip(vocabulary, scores, strict=True)}
    return sorted(vocabulary, key=lambda one: -last[one])


def beginnings(translator: Translator, text: str, lengths: tuple[int, ...] = (0, 1, 3)) -> list[Ids]:
    (whole,) = translator.translate([text])
    return [whole.ids[:length] for length in lengths if length < len(whole.ids)] + [whole.ids[:-1], (40, 41)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("count", [1, 2, 5, 72, 100])
def test_alternatives_begin_with_the_most_probable_tokens_in_order(
    beams_translator: Translator, text: str, count: int
) -> None:
    for prefix in beginnings(beams_translator, text):
        found = beams_translator.alternatives(text, prefix, count)
        expected = most_probable(beams_translator, text, prefix)[:count]
        assert [one.ids[: len(prefix) + 1] for one in found] == [(*prefix, token) for token in expected]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("text", TEXTS)
def test_each_alternative_goes_on_as_from_a_prefix(beams_translator: Translator, text: str, name: str) -> None:
    options, eos = SEARCHES[name], beams_translator.manifest.framing.eos
    limit = options.max_new_tokens or beams_translator.manifest.max_new_tokens
    for prefix in beginnings(beams_translator, text):
        if len(prefix) >= limit:
            continue
        tokens = most_probable(beams_translator, text, prefix, tuple(map(int, options.suppress)))[:8]
        for token, one in zip(tokens, beams_translator.alternatives(text, prefix, 8, options), strict=True):
            begun = (*prefix, token)
            if token == eos or len(begun) == limit:
                assert one.ids == begun
                assert one.finish_reason == ("end" if token == eos else "length")
                assert one.others == ()
                assert one.text == beams_translator._model.targets.tokenizer.decode(
                    [each for each in begun if each != eos]
                )
                if options.scores:
                    assert one.score == pytest.approx(beams_translator.score([text], [begun])[0].sum, abs=1e-3)
                else:
                    assert one.score is None
            else:
                (expected,) = beams_translator.translate([text], options, prefix=begun)
                assert one == expected


def test_the_first_alternative_of_greedy_is_the_translation(beams_translator: Translator) -> None:
    for text in TEXTS:
        (whole,) = beams_translator.translate([text])
        for length in range(len(whole.ids)):
            assert beams_translator.alternatives(text, whole.ids[:length], 3)[0] == whole


def test_ending_is_an_alternative_like_any_other(beams_translator: Translator) -> None:
    eos = beams_translator.manifest.framing.eos
    (whole,) = beams_translator.translate(["nine hundred and ninety-nine"])
    found = beams_translator.alternatives("nine hundred and ninety-nine", whole.ids[:-1], 4)
    assert (found[0].ids, found[0].finish_reason, found[0].others) == (whole.ids, "end", ())
    assert [eos in one.ids[: len(whole.ids)] for one in found] == [True, False, False, False]


def test_a_beginning_may_be_a_text(beams_translator: Translator) -> None:
    ids = tuple(beams_translator._model.targets.tokenizer.encode("neun"))
    found = beams_translator.alternatives("nine hundred", "neun", 4)
    assert found == beams_translator.alternatives("nine hundred", ids, 4)
    assert all(one.text.startswith("neun") for one in found)


def test_a_text_too_long_has_alternatives_where_it_is_cut(beams_translator: Translator) -> None:
    long = " ".join(["one"] * 100)
    with pytest.raises(InputError, match="102 tokens"):
        beams_translator.alternatives(long, "", 3)
    found = beams_translator.alternatives(long, "", 3, TranslateOptions(on_long="truncate"))
    assert [one.truncated for one in found] == [True] * 3
    assert found == [beams_translator.translate([long], on_long="truncate", prefix=one.ids[:1])[0] for one in found]


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize("count", [1, 3])
def test_an_empty_text_has_but_its_empty_translation(beams_translator: Translator, text: str, count: int) -> None:
    for options in SEARCHES.values():
        assert beams_translator.alternatives(text, "", count, options) == beams_translator.translate([text], options)


@pytest.mark.parametrize("count", [0, -1])
def test_no_alternatives_cannot_be_asked_for(beams_translator: Translator, count: int) -> None:
    with pytest.raises(OptionError, match=f"`count` is {count}"):
        beams_translator.alternatives("one", "", count)


def test_what_nothing_could_follow_has_no_alternatives(beams_translator: Translator) -> None:
    eos = beams_translator.manifest.framing.eos
    with pytest.raises(InputError, match="holds eos"):
        beams_translator.alternatives("one", (5, eos))
    with pytest.raises(InputError, match="prefix has 4 tokens"):
        beams_translator.alternatives("one", (5, 5, 5, 5), 3, TranslateOptions(max_new_tokens=4))
    with pytest.raises(InputError, match="unknown pieces '漢'"):
        beams_translator.alternatives("one", "漢")


def test_alternatives_keep_within_the_bytes_of_the_cache(beams_translator: Translator) -> None:
    options = TranslateOptions(cache_bytes=1000)
    with pytest.raises(Exception, match="at most 1,000 bytes"):
        beams_translator.alternatives("one", "", 3, options)


def test_the_token_that_differs_keeps_the_constraints_too(numbers_translator: Translator) -> None:
    text, least = "twelve thousand three hundred and four", 25
    whole = numbers_translator.translate([text])[0].ids[:-1]
    options = TranslateOptions(min_new_tokens=least, max_new_tokens=30)
    found = numbers_translator.alternatives(text, whole, 3, options)
    assert len(found) == 3
    assert all(len(one.ids) >= least for one in found)
    once = numbers_translator.alternatives(text, whole, 4, TranslateOptions(no_repeated_ngrams=1))
    assert all(len(set(one.ids)) == len(one.ids) for one in once)


def test_an_error_names_the_text_only_where_it_has_a_number(numbers_translator: Translator) -> None:
    text = " ".join(["one"] * 3000)
    for number, said in ((None, r"^The text has \d+ tokens"), (7, r"^Line 7: The text has \d+ tokens")):
        with pytest.raises(InputError, match=said):
            numbers_translator.alternatives(text, "ein", 2, number=number)
