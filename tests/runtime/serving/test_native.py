"""kvx's own API: it gives what the library gives, for every option, and says what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kvx.tests.runtime.serving.serving")  # which skips where the extra serve is missing

from kvx import Translator
from kvx.runtime.engine.scoring import RankBy
from kvx.runtime.options import OPTIONS
from kvx.runtime.serving import schema
from kvx.runtime.serving.keys import Key, Keys, hashed
from kvx.testing import FakeTranslator
from kvx.tests.conftest import Seed
from kvx.tests.runtime.serving.serving import JSON, Client, Json, Reply, running, service

TRANSLATE, ALTERNATIVES, SCORE, MODELS = "/v1/translate", "/v1/alternatives", "/v1/score", "/v1/models"
PROBLEM = "application/problem+json"
GERMAN = "Ein Hund schläft auf dem Dach des Hauses."
ENGLISH = "A dog sleeps on the roof of the house."
LONG = "x" * 5000  # more than a fake has positions

NOT_ASKED = {  # with the reason
    "rows": "the engine's",
    "workers": "the engine's",
    "cache_bytes": "the engine's",
    "shortlist": "a file of the server",
}
VALUES: dict[str, Json] = {  # what each option is asked for with
    "beam_size": {"beam_size": 3},
    "n_best": {"beam_size": 3, "n_best": 2},
    "length_penalty": {"beam_size": 3, "n_best": 3, "length_penalty": 0.5},
    "early_stopping": {"beam_size": 2, "early_stopping": True},
    "patience": {"beam_size": 2, "patience": 2.0},
    "beam_rules": {"beam_size": 2, "beam_rules": "transformers"},
    "samples": {"samples": 2, "seed": 1},
    "temperature": {"samples": 1, "seed": 1, "temperature": 3.0},
    "top_k": {"samples": 1, "seed": 2, "top_k": 2},
    "top_p": {"samples": 1, "seed": 3, "top_p": 0.95},
    "seed": {"samples": 1, "seed": 4},
    "source_language": {"source_language": "de", "target_language": "fr"},
    "target_language": {"source_language": "fr", "target_language": "de"},
    "text_prefix": {"text_prefix": "say: "},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_new_tokens": {"min_new_tokens": 20},
    "prefix": {"prefix": "HAL-"},
    "suppress": {"suppress": ["<0x41>"]},
    "banned": {"banned": ["HALLO", [75, 100]]},
    "no_repeated_ngrams": {"no_repeated_ngrams": 1},
    "repetition_penalty": {"repetition_penalty": 100.0},
    "end_penalty": {"end_penalty": 50.0, "max_new_tokens": 20},
    "end_at_limit": {"end_at_limit": True, "max_new_tokens": 3},
    "on_long": {"on_long": "truncate"},
    "scores": {"scores": True},
    "align": {"align": True},
    "replace_unknown": {"replace_unknown": True},
}
NEED_ATTENTION = ("align", "replace_unknown")
WITHOUT_LANGUAGES = sorted(VALUES.keys() - {"source_language", "target_language", *NEED_ATTENTION})


@pytest.fixture(scope="module")
def translators() -> dict[str, FakeTranslator]:
    return {
        "de-en": FakeTranslator({"Hund": "dog", "a": "<b>&", "Nichts": "", "Katze": "日本 🙂"}, failing=["broken"]),
        "en-fr": FakeTranslator({"dog": "chien"}),
        "many": FakeTranslator(languages=["de", "fr", "nl"]),
        "plain": FakeTranslator(),
        "slow": FakeTranslator(step_seconds=0.01),
    }


@pytest.fixture(scope="module")
def client(translators: dict[str, FakeTranslator]) -> Iterator[Client]:
    with running(service(translators, pivot=("en",), texts=500, characters=20_000, beams=8)) as address:
        yield Client(address)


@pytest.fixture(scope="module")
def attentive(attention_bundle: Path) -> Iterator[tuple[Client, Translator]]:
    """A server of one real model that knows what it attends to, and the same model beside it."""
    with running(service({"numbers": Translator.load(attention_bundle, threads=1)})) as address:
        yield Client(address), Translator.load(attention_bundle, threads=1)


def translated(client: Client, texts: object, **fields: Any) -> list[Json]:  # noqa: ANN401
    """The translations of a request that is answered."""
    reply = client.post(TRANSLATE, {"texts": texts, **fields})
    assert (reply.status, reply.kind) == (200, JSON), reply.body
    found: list[Json] = reply.json["translations"]
    return found


def refused(reply: Reply, status: int = 400, **told: object) -> str:
    """The detail of a problem with this status, which has these members and no other option or text."""
    problem = reply.json
    assert (reply.status, reply.kind, problem.pop("status")) == (status, PROBLEM, status), reply.body
    assert problem.pop("title")
    detail: str = problem.pop("detail")
    assert problem == told
    return detail


def as_json(translations: object) -> Any:  # noqa: ANN401
    """Translations of the library as JSON has them."""
    forms = [one.to_dict() for one in translations]  # type: ignore[attr-defined]
    return json.loads(json.dumps(forms))


def own(found: list[Json]) -> list[Json]:
    """Translations of the service without what the service adds."""
    added = {"model", "source_language", "target_language", "detected", "pivot", "gaps", "sentences"}
    return [{name: value for name, value in one.items() if name not in added} for one in found]


def test_every_option_of_the_library_is_a_field() -> None:
    options = {name for name, option in OPTIONS.items() if not option.hidden} - NOT_ASKED.keys()
    fields = {"texts", "model", "format", "stream", "deadline"}
    assert set(schema.TranslateRequest.__struct_fields__) == options | fields
    assert set(schema.AlternativesRequest.__struct_fields__) == options | {"text", "count", "model"}
    of_scores = {"source_language", "target_language", "text_prefix", "on_long"}
    assert set(schema.ScoreRequest.__struct_fields__) == of_scores | {"texts", "translations", "by", "model"}
    assert set(VALUES) == options


@pytest.mark.parametrize("name", WITHOUT_LANGUAGES)
@pytest.mark.parametrize("text", ["Hallo, alle", [75, 100, 111]])
def test_an_option_does_what_it_does_in_the_library(
    client: Client, translators: dict[str, FakeTranslator], name: str, text: str | list[int]
) -> None:
    expected = translators["plain"].translate([text], **VALUES[name])
    assert own(translated(client, [text], model="plain", **VALUES[name])) == as_json(expected)


@pytest.mark.parametrize("name", ["source_language", "target_language"])
def test_languages_do_what_they_do_in_the_library(
    client: Client, translators: dict[str, FakeTranslator], name: str
) -> None:
    expected = translators["many"].translate(["Hallo"], **VALUES[name])
    found = translated(client, "Hallo", **VALUES[name])
    assert own(found) == as_json(expected)
    assert {key: found[0][key] for key in ("source_language", "target_language")} == VALUES[name]
    assert found[0]["model"] == "many"


@pytest.mark.parametrize("name", NEED_ATTENTION)
def test_attention_does_what_it_does_in_the_library(attentive: tuple[Client, Translator], name: str) -> None:
    client, translator = attentive
    texts = ["one", "twenty-one", "%"]
    assert own(translated(client, texts, **VALUES[name])) == as_json(translator.translate(texts, **VALUES[name]))


def test_attention_that_a_bundle_lacks_is_said(client: Client) -> None:
    detail = refused(client.post(TRANSLATE, {"texts": "a", "model": "plain", "align": True}), option="align")
    assert "attention" in detail


@pytest.fixture(scope="module")
def reference_client(seed_bundle: Path) -> Iterator[Client]:
    """A server of the reference model."""
    with running(service({"de-en": Translator.load(seed_bundle)}, timeout=3600.0, characters=10**6)) as address:
        yield Client(address)


@pytest.mark.parametrize("search", [{}, {"beam_size": 3}])
@pytest.mark.parametrize("lines", [48, pytest.param(1000, marks=pytest.mark.proof)])
def test_every_line_of_the_reference_model_is_the_reference(
    reference_client: Client, seed: Seed, lines: int, search: Json
) -> None:
    found = translated(reference_client, seed.sources[:lines], **search)
    assert [(one["text"], one["ids"]) for one in found] == reference(seed, search)[:lines]


def reference(seed: Seed, search: Json) -> list[tuple[object, object]]:
    return [(line["text"], line["ids"]) for line in (seed.beam3 if search else seed.greedy)]


@pytest.mark.parametrize("text", ["Hund", "", " \n", GERMAN + "\n\n" + GERMAN])
def test_a_sentence_is_translated_as_it_is(client: Client, translators: dict[str, FakeTranslator], text: str) -> None:
    assert own(translated(client, text, model="de-en")) == as_json(translators["de-en"].translate([text]))


TEXTS = [
    "",
    "\n",
    " \r\n ",
    "🙂",
    "Hund",
    "  Ein Hund. Er schläft!\r\n\r\n\t- Zwei Katzen\n***\n",
    "Katze\nKatze. Katze",
    "Nichts\n\nNichts. Hund\n",
    "a\nHund & a",
]
PAGES = [
    "<p title='a'>Hund <b>a</b> &amp; <code>Hund</code></p>\n",
    "<br>",
    "<p>Nichts</p><p>Katze</p> Hund. Nichts",
    "<script>Hund</script><img alt=Hund>",
    "<p>zwei <b>alte</b> <i>Vögel</i> da. Katze <b>Hund</b></p>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_translated_as_the_library_does(
    client: Client, translators: dict[str, FakeTranslator], text: str
) -> None:
    [found] = translated(client, text, model="de-en", format="text")
    assert found["text"] == translators["de-en"].translate_text(text)
    assert found["text"] == joined(found)


@pytest.mark.parametrize("page", [*TEXTS, *PAGES])
def test_html_is_translated_as_the_library_does(
    client: Client, translators: dict[str, FakeTranslator], page: str
) -> None:
    [found] = translated(client, page, model="de-en", format="html")
    assert found["text"] == translators["de-en"].translate_text(page, html=True)


def joined(found: Json) -> str:
    """gaps[0] + sentences[0].text + gaps[1] + …"""
    sentences = [one["text"] for one in found["sentences"]]
    gaps: list[str] = found["gaps"]
    return gaps[0] + "".join(map(str.__add__, sentences, gaps[1:]))


def test_a_translation_that_looks_like_markup_is_text(client: Client) -> None:
    [found] = translated(client, "<p>a</p>", model="de-en", format="html")
    assert found["text"] == "<p>&lt;b&gt;&amp;</p>"
    assert found["sentences"][0]["text"] == "<b>&"


def test_many_texts_keep_their_order(client: Client, translators: dict[str, FakeTranslator]) -> None:
    texts = [f"text {number} " * (1 + number % 7) for number in range(300)]
    assert own(translated(client, texts, model="plain")) == as_json(translators["plain"].translate(texts))


def test_texts_may_be_ids(client: Client, translators: dict[str, FakeTranslator]) -> None:
    texts: list[Any] = [[75, 100], "Ha", []]
    assert own(translated(client, texts, model="plain")) == as_json(translators["plain"].translate(texts))
    for form in ("text", "html"):
        assert own(translated(client, [[75, 100]], model="plain", format=form))[0]["text"] == "HA"


def test_no_texts_have_no_translations(client: Client) -> None:
    assert translated(client, [], model="plain") == []


def test_a_prefix_may_be_ids(client: Client, translators: dict[str, FakeTranslator]) -> None:
    expected = translators["plain"].translate(["Hallo"], prefix=(80, 81))
    assert own(translated(client, "Hallo", model="plain", prefix=[80, 81])) == as_json(expected)


def test_each_text_may_have_its_own_languages(client: Client, translators: dict[str, FakeTranslator]) -> None:
    sources, targets = ["de", "fr", "de", "en"], ["fr", "de", "en", "fr"]
    found = translated(client, ["x", "y", "Hund", "dog"], source_language=sources, target_language=targets)
    assert [one["text"] for one in found] == [">>fr<< X", ">>de<< Y", "dog", "chien"]
    assert [one["model"] for one in found] == ["many", "many", "de-en", "en-fr"]
    assert [(one["source_language"], one["target_language"]) for one in found] == [*zip(sources, targets, strict=True)]


def test_as_many_codes_as_texts_are_wanted(client: Client) -> None:
    form = {"texts": ["x", "y"], "source_language": ["de"], "target_language": "en"}
    assert "2 texts" in refused(client.post(TRANSLATE, form), option="source_language")


@pytest.mark.parametrize("code", ["DE", "de-DE", "de_AT", "deu", "ger"])
def test_codes_have_other_spellings(client: Client, code: str) -> None:
    [found] = translated(client, "Hund", source_language=code, target_language="EN")
    assert (found["text"], found["source_language"], found["target_language"]) == ("dog", "de", "en")


def test_the_language_of_each_text_is_found_out(client: Client) -> None:
    texts = [GERMAN, ENGLISH, "Un chien dort sur le toit de la maison."]
    found = translated(client, texts, source_language="auto", target_language="fr", format="text")
    assert [one["detected"]["language"] for one in found] == ["de", "en", "fr"]
    assert all(one["detected"]["confidence"] > 0.9 for one in found)
    assert [one["source_language"] for one in found] == ["de", "en", "fr"]
    assert [one["model"] for one in found] == ["many", "en-fr", None]


@pytest.mark.parametrize("form", ["sentence", "text", "html"])
def test_a_text_in_the_target_language_stays(client: Client, form: str) -> None:
    text = f"  {ENGLISH}\n\n{ENGLISH} &lt; <b>\n"
    [found] = translated(client, text, source_language="auto", target_language="en", format=form)
    assert (found["text"], found["model"], found["finish_reason"]) == (text, None, "end")
    assert (found["gaps"], found["sentences"]) == ([text], [])
    reply = client.post(TRANSLATE, {"texts": text, "source_language": "auto", "target_language": "en", "stream": True})
    assert streamed(reply) == {0: text}


def test_a_language_is_found_out_only_where_languages_are_known() -> None:
    with running(service({"nameless": FakeTranslator()})) as address:
        client = Client(address)
        assert translated(client, "a")[0]["source_language"] is None
        refused(client.post(TRANSLATE, {"texts": "a", "source_language": "auto"}), option="source_language")
        refused(client.post(TRANSLATE, {"texts": "a", "target_language": "en"}), option="source_language")
        assert client.get(MODELS).json["detection"] is False


def test_a_model_is_chosen_by_its_name(client: Client) -> None:
    for name in ("de-en", "plain"):
        assert translated(client, "x", model=name)[0]["model"] == name
    assert "de-en" in refused(client.post(TRANSLATE, {"texts": "x", "model": "another"}), option="model")
    refused(client.post(TRANSLATE, {"texts": "x"}), option="model")
    wrong = {"texts": "x", "model": "de-en", "source_language": "fr"}
    refused(client.post(TRANSLATE, wrong), option="source_language")


def through_english() -> dict[str, FakeTranslator]:
    return {"de-en": FakeTranslator({"Hund": "dog"}, failing=["broken"]), "en-fr": FakeTranslator({"dog": "chien"})}


def test_a_pivot_is_gone_through_and_told(translators: dict[str, FakeTranslator]) -> None:
    with running(service(through_english(), pivot=("en",))) as address:
        client = Client(address)
        asked: Json = {"source_language": "de", "target_language": "fr", "scores": True}
        for found in (
            translated(client, "Hund", **asked),
            [last_result(client.post(TRANSLATE, {"texts": "Hund", "stream": True, **asked}))],
        ):
            assert (found[0]["text"], found[0]["pivot"], found[0]["model"]) == ("chien", "en", "en-fr")
            assert own(found) == as_json(translators["en-fr"].translate(["dog"], scores=True))
        assert translated(client, "Hund\n\nHund", format="text", **asked)[0]["text"] == "chien\n\nchien"
        assert client.get(MODELS).json["pairs"] == {"de": ["en", "fr"], "en": ["fr"], "fr": []}
        for path, form in (
            (ALTERNATIVES, {"text": "Hund"}),
            (SCORE, {"texts": ["Hund"], "translations": ["chien"]}),
        ):
            languages = {"source_language": "de", "target_language": "fr"}
            assert "pivot" in refused(client.post(path, form | languages), option="target_language")


def test_an_error_before_the_pivot_names_its_text() -> None:
    with running(service(through_english(), pivot=("en",))) as address:
        client = Client(address)
        for text in "broken", LONG:
            form = {"texts": ["Hund", text], "source_language": "de", "target_language": "fr"}
            assert client.post(TRANSLATE, form).json["text"] == 1
            (name, problem) = client.post(TRANSLATE, {**form, "stream": True}).events[-1]
            assert (name, problem["status"], problem["text"]) == ("error", 400, 1)


def test_without_a_pivot_there_is_no_way() -> None:
    with running(service(through_english())) as address:
        form = {"texts": "Hund", "source_language": "de", "target_language": "fr"}
        detail = refused(Client(address).post(TRANSLATE, form), option="target_language")
        assert "from de to fr" in detail


def test_a_translation_tells_how_it_ended(client: Client) -> None:
    assert translated(client, "abc", model="plain", max_new_tokens=2)[0]["finish_reason"] == "length"
    [found] = translated(client, "abc\ndefg", model="plain", max_new_tokens=4, format="text")
    assert [one["finish_reason"] for one in found["sentences"]] == ["end", "length"]
    assert found["finish_reason"] == "length"
    [late] = translated(client, "x" * 1000, model="slow", deadline=0.5)
    assert late["finish_reason"] == "deadline"
    assert 0 < len(late["text"]) < 1000
    assert set(late["text"]) == {"X"}
    assert translated(client, "x", model="slow", deadline=0)[0]["finish_reason"] == "deadline"


def test_the_longest_translation_is_the_services() -> None:
    with running(service({"de-en": FakeTranslator()}, tokens=5)) as address:
        client = Client(address)
        for asked, length in ({}, 5), ({"max_new_tokens": 50}, 5), ({"max_new_tokens": 3}, 3):
            assert len(translated(client, "x" * 20, **asked)[0]["ids"]) == length
        assert client.post(SCORE, {"texts": ["x"], "translations": ["X" * 20]}).status == 200


def test_a_request_that_takes_too_long_is_cut_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.CRITICAL, "kvx"),
        running(service({"slow": FakeTranslator(step_seconds=0.01)}, timeout=0.2)) as address,
    ):
        client = Client(address)
        assert translated(client, "x" * 1000)[0]["finish_reason"] == "deadline"
        refused(client.post(SCORE, {"texts": ["x"], "translations": ["X" * 1000]}), 504)
        refused(client.post(ALTERNATIVES, {"text": "x" * 1000}), 504)


@pytest.mark.parametrize("form", ["sentence", "text", "html"])
@pytest.mark.parametrize("search", [{}, {"beam_size": 3}, {"scores": True}])
def test_a_stream_joins_to_the_results(client: Client, form: str, search: Json) -> None:
    texts = [*TEXTS, *(PAGES if form == "html" else [])]
    asked: Json = {"model": "de-en", "format": form, **search}
    reply = client.post(TRANSLATE, {"texts": texts, "stream": True, **asked})
    assert streamed(reply) == {number: one["text"] for number, one in enumerate(translated(client, texts, **asked))}


def streamed(reply: Reply) -> dict[int, str]:
    """The texts that the tokens of a stream join to, by their indexes, which are those of its results, in order."""
    assert reply.status == 200
    *events, end = reply.events
    assert end == ("end", {})
    found: dict[int, str] = {}
    over = 0
    for name, event in events:
        assert event["index"] == over, "one text after the other"
        if name == "token":
            found[over] = found.get(over, "") + event["text"]
        else:
            assert name == "result"
            assert found.setdefault(over, "") == event["translation"]["text"]
            over += 1
    assert over == len(found)
    return found


def last_result(reply: Reply) -> Json:
    streamed(reply)
    found: Json = reply.events[-2][1]["translation"]
    return found


def test_the_results_of_a_stream_are_those_without_one(client: Client) -> None:
    asked: Json = {"texts": ["Hund", "Katze. Hund"], "model": "de-en", "scores": True, "format": "text"}
    events = client.post(TRANSLATE, {**asked, "stream": True}).events
    results = [event["translation"] for name, event in events if name == "result"]
    assert results == client.post(TRANSLATE, asked).json["translations"]


def test_a_token_tells_its_sentence_id_and_probability(client: Client) -> None:
    asked: Json = {"texts": "Hund. Hund", "model": "de-en", "format": "text", "scores": True, "stream": True}
    events = client.post(TRANSLATE, asked).events
    result = events[-2][1]["translation"]
    tokens = [event for name, event in events if name == "token"]
    for number, sentence in enumerate(result["sentences"]):
        mine = [one for one in tokens if one["sentence"] == number]
        assert [one["id"] for one in mine] == sentence["ids"]
        assert [one["log_probability"] for one in mine] == sentence["log_probabilities"]


def test_html_with_elements_in_a_sentence_comes_at_the_end_of_a_stream(client: Client) -> None:
    page = "<p>zwei <b>alte</b> Vögel</p>"
    *events, (_, result), _ = client.post(
        TRANSLATE, {"texts": page, "model": "plain", "format": "html", "stream": True}
    ).events
    found = result["translation"]
    assert [one["text"] for _, one in events if one["text"]] == ["<p>ZWEI <b>ALTE</b> VÖGEL</p>"] == [found["text"]]
    assert [one["source"] for one in found["sentences"]] == ["zwei", "alte", "Vögel", "zwei alte Vögel"]
    assert "gaps" not in found


def test_a_character_of_several_tokens_comes_whole(client: Client) -> None:
    events = client.post(TRANSLATE, {"texts": "日本 🙂" * 4, "model": "slow", "stream": True}).events
    pieces = [event["text"] for name, event in events if name == "token" and event["text"]]
    assert "".join(pieces) == "日本 🙂" * 4
    assert len(pieces) > 4


def test_a_stream_of_no_texts_ends(client: Client) -> None:
    assert client.post(TRANSLATE, {"texts": [], "model": "plain", "stream": True}).events == [("end", {})]


@pytest.mark.parametrize(("text", "option"), [(LONG, {"option": "on_long"}), ("broken", {})])
def test_an_error_ends_a_stream(client: Client, text: str, option: Json) -> None:
    reply = client.post(TRANSLATE, {"texts": ["Hund", text, "Hund"], "model": "de-en", "stream": True})
    *_, result, (name, problem) = [event for event in reply.events if event[0] != "token"]
    assert (result[0], result[1]["index"]) == ("result", 0)
    assert name == "error"
    assert problem.pop("detail")
    assert problem == {"title": "Bad Request", "status": 400, "text": 1, **option}


def test_alternatives_are_the_librarys(client: Client, translators: dict[str, FakeTranslator]) -> None:
    translator = translators["plain"]
    for prefix, count, options in ("", 5, {}), ("HA", 3, {"scores": True}), ([75, 68], 8, {"beam_size": 2}):
        asked: Json = {"text": "Hallo", "prefix": prefix, "count": count, "model": "plain", **options}
        reply = client.post(ALTERNATIVES, asked)
        expected = translator.alternatives("Hallo", prefix, count, translator.options(**options))
        assert reply.json == {"model": "plain", "alternatives": as_json(expected)}
    assert len(client.post(ALTERNATIVES, {"text": "Hallo", "model": "plain"}).json["alternatives"]) == 5


@pytest.mark.parametrize(("count", "status"), [(0, 400), (-1, 400), (9, 413)])
def test_alternatives_have_a_number(client: Client, count: int, status: int) -> None:
    form = {"text": "a", "model": "plain", "count": count}
    refused(client.post(ALTERNATIVES, form), status, option="count")


def test_what_options_say_counts_as_text(client: Client) -> None:
    form = {"texts": "a", "model": "plain", "banned": ["x" * 30_000]}
    refused(client.post(TRANSLATE, form), 413, option="characters")
    form = {"text": "a", "model": "plain", "prefix": "x" * 30_000}
    refused(client.post(ALTERNATIVES, form), 413, option="characters")


def test_a_stream_of_many_texts_waits_for_room_in_the_engine() -> None:
    with running(service({"plain": FakeTranslator(rows=1, max_waiting=64)})) as address:
        events = Client(address).post(TRANSLATE, {"texts": ["a"] * 200, "stream": True}).events
    assert [name for name, _ in events].count("result") == 200
    assert events[-1] == ("end", {})


@pytest.mark.parametrize("by", ["sum", "per_token"])
def test_scores_are_the_librarys(client: Client, translators: dict[str, FakeTranslator], by: RankBy) -> None:
    texts: list[Any] = ["Hund", [75, 100], "Katze"]
    candidates: list[Any] = [["dog", "cat", [103, 1]], ["HA"], ["日本 🙂", "dogs"]]
    reply = client.post(SCORE, {"texts": texts, "translations": candidates, "by": by, "model": "de-en"})
    expected = [
        {
            "scores": [
                {
                    "sum": score.sum,
                    "per_token": score.per_token,
                    "tokens": score.tokens,
                    "log_probabilities": [*score.log_probabilities],
                }
                for score in ranking.scores
            ],
            "best": ranking.best,
            "margin": ranking.margin,
        }
        for ranking in translators["de-en"].rank(texts, candidates, by=by)
    ]
    assert reply.json == {"model": "de-en", "results": expected}


def test_one_translation_of_each_text_may_be_scored(client: Client) -> None:
    asked: Json = {"texts": ["Hund", "Katze"], "source_language": "de", "target_language": "en"}
    one = client.post(SCORE, {**asked, "translations": ["dog", "cat"]}).json
    assert one == client.post(SCORE, {**asked, "translations": [["dog"], ["cat"]]}).json
    assert [each["best"] for each in one["results"]] == [0, 0]


def test_a_bundle_that_has_defaults_scores(marked_bundle: Path) -> None:
    translator = Translator.load(marked_bundle, threads=1)
    with running(service({"marked": translator})) as address:
        form = {"texts": ["Hund"], "translations": ["chien"], "model": "marked", "target_language": "fr"}
        reply = Client(address).post(SCORE, form)
        [expected] = translator.score(["Hund"], ["chien"], target_language="fra")
        assert reply.json["results"][0]["scores"][0]["sum"] == pytest.approx(expected.sum)


def test_a_score_names_the_text_that_is_wrong(client: Client) -> None:
    asked: Json = {"texts": ["Hund", "Katze"], "model": "de-en"}
    refused(client.post(SCORE, {**asked, "translations": ["dog", LONG]}), text=1)
    refused(client.post(SCORE, {**asked, "translations": ["dog", []]}), text=1)
    refused(client.post(SCORE, {**asked, "translations": ["dog"]}))


def test_models_are_described(client: Client) -> None:
    found = client.get(MODELS).json
    assert [one["name"] for one in found["models"]] == ["de-en", "en-fr", "many", "plain", "slow"]
    first, _, many, plain, _ = found["models"]
    assert first["source_languages"] == [{"code": "de", "name": "German"}]
    assert first["target_languages"] == [{"code": "en", "name": "English"}]
    assert [one["code"] for one in many["source_languages"]] == ["de", "fr", "nl"]
    assert plain["source_languages"] == plain["target_languages"] == []
    assert (first["source_positions"], first["attention"], first["proof"]) == (4096, False, None)
    assert found["detection"] is True
    assert found["pairs"]["de"] == ["en", "fr", "nl"]
    assert found["limits"] == {
        "body_bytes": 2**20,
        "characters": 20_000,
        "texts": 500,
        "tokens": None,
        "beams": 8,
        "timeout": 60.0,
    }


def test_a_real_model_tells_its_proof(attentive: tuple[Client, Translator], numbers_bundle: Path) -> None:
    [found] = attentive[0].get(MODELS).json["models"]
    assert found["attention"] is True
    with running(service({"numbers": Translator.load(numbers_bundle, threads=1)})) as address:
        [proven] = Client(address).get(MODELS).json["models"]
    assert proven["proof"]["verified"] is True
    assert 0 <= proven["proof"]["max_abs_error"] < 1e-3


@pytest.mark.parametrize(("field", "near"), [("beem_size", "beam_size"), ("text", "texts"), ("n-best", "n_best")])
def test_an_unknown_field_is_told_the_nearest(client: Client, field: str, near: str) -> None:
    form = {"texts": "a", "model": "plain", field: 1}
    assert f"`{near}`" in refused(client.post(TRANSLATE, form), option=field)


@pytest.mark.parametrize("field", [*NOT_ASKED, "search", "filters", "window"])
def test_what_is_not_to_be_asked_is_no_field(client: Client, field: str) -> None:
    for path, form in (TRANSLATE, {"texts": "a"}), (ALTERNATIVES, {"text": "a"}):
        refused(client.post(path, {**form, "model": "plain", field: 1}), option=field)


@pytest.mark.parametrize(
    ("form", "option"),
    [
        ({"texts": 1}, "texts"),
        ({"texts": None}, "texts"),
        ({"texts": [["a"]]}, "texts"),
        ({"texts": ["a", {"b": 1}]}, "texts"),
        ({"texts": "a", "beam_size": "3"}, "beam_size"),
        ({"texts": "a", "beam_size": None}, "beam_size"),
        ({"texts": "a", "beam_size": 2.5}, "beam_size"),
        ({"texts": "a", "beam_size": True}, "beam_size"),
        ({"texts": "a", "scores": 1}, "scores"),
        ({"texts": "a", "stream": "yes"}, "stream"),
        ({"texts": "a", "format": "xml"}, "format"),
        ({"texts": "a", "model": 1}, "model"),
        ({"texts": "a", "suppress": "a"}, "suppress"),
        ({"texts": "a", "banned": [[["a"]]]}, "banned"),
        ({"texts": "a", "deadline": "1"}, "deadline"),
        ({"texts": "a", "deadline": True}, "deadline"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(client: Client, form: Json, option: str) -> None:
    detail = refused(client.post(TRANSLATE, {"model": "plain", **form} if option != "model" else form), option=option)
    assert option in detail
    assert detail.count("Expected") == 1


@pytest.mark.parametrize(
    ("form", "option"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"n_best": 2}, "n_best"),
        ({"temperature": 1}, "temperature"),
        ({"max_new_tokens": 10**300}, "max_new_tokens"),
        ({"max_new_tokens": 9999}, "max_new_tokens"),
        ({"suppress": ["no such piece"]}, "suppress"),
        ({"on_long": "cut"}, "on_long"),
        ({"deadline": -1}, "deadline"),
        ({"format": "text", "beam_size": 2, "n_best": 2}, "n_best"),
        ({"format": "html", "samples": 2}, "samples"),
        ({"format": "text", "prefix": "A"}, "prefix"),
    ],
)
def test_a_value_that_cannot_be_is_named(client: Client, form: Json, option: str) -> None:
    detail = refused(client.post(TRANSLATE, {"texts": "a", "model": "plain", **form}), option=option)
    assert option in detail


def test_what_says_nothing_may_be_given_for_texts(client: Client) -> None:
    asked: Json = {"beam_size": 2, "n_best": 1, "prefix": "", "max_new_tokens": None}
    assert translated(client, "a. b", model="plain", format="text", **asked)[0]["text"] == "A. B"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not JSON",
        b"[]",
        b"null",
        b'"a"',
        b'{"texts": "\xff"}',
        b'{"texts": "\\ud800"}',
        b'{"texts": "a\\udc00b"}',
        b'{"texts": "a"} {}',
        b'\xef\xbb\xbf{"texts": "a"}',
        b"[" * 100_000,
        b'{"texts": ' + b"[" * 100_000,
        b'{"texts": "a", "x": ' + b"[" * 100_000,
        b'{"texts": "a", "deadline": NaN}',
        b'{"texts": "a", "deadline": 1e999}',
        b"{" + b'"texts":{' * 50_000,
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
@pytest.mark.parametrize("path", [TRANSLATE, ALTERNATIVES, SCORE])
def test_what_is_no_request_is_refused(client: Client, path: str, body: bytes) -> None:
    reply = client.send("POST", path, body, content_type=JSON)
    assert (reply.status, reply.kind) == (400, PROBLEM)
    assert reply.json["status"] == 400
    assert len(reply.body) < 1000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_content_type_is_not_understood(client: Client, kind: str) -> None:
    headers = {"content_type": kind} if kind else {}
    assert JSON in refused(client.send("POST", TRANSLATE, b'{"texts": "a", "model": "plain"}', **headers), 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", " application/json "])
def test_content_types_have_parameters_and_no_case(client: Client, kind: str) -> None:
    assert client.send("POST", TRANSLATE, b'{"texts": "a", "model": "plain"}', content_type=kind).status == 200


def test_what_is_too_large_names_the_limit(client: Client) -> None:
    asked: Json = {"model": "plain"}
    too_many = refused(client.post(TRANSLATE, {"texts": ["a"] * 501, **asked}), 413, option="texts")
    assert "500 texts" in too_many
    too_long = refused(client.post(TRANSLATE, {"texts": "a" * 20_001, **asked}), 413, option="characters")
    assert "20,000 characters" in too_long
    refused(client.post(TRANSLATE, {"texts": [[75] * 20_001], **asked}), 413, option="characters")
    refused(client.post(ALTERNATIVES, {"text": "a" * 20_001, **asked}), 413, option="characters")
    scored = {"texts": ["a"], "translations": [["a" * 19_000, "a" * 1000]]}
    refused(client.post(SCORE, {**scored, **asked}), 413, option="characters")
    large = client.post(TRANSLATE, {"texts": "a" * 2**20, **asked})
    assert "1,048,576 bytes" in refused(large, 413, option="body_bytes")


@pytest.mark.parametrize("form", [{"beam_size": 9}, {"samples": 9}, {"beam_size": 8, "n_best": 9}])
def test_more_beams_than_the_service_allows_are_refused(client: Client, form: Json) -> None:
    option = "n_best" if "n_best" in form else next(iter(form))
    assert "8" in refused(client.post(TRANSLATE, {"texts": "a", "model": "plain", **form}), 413, option=option)
    refused(client.post(ALTERNATIVES, {"text": "a", "model": "plain", **form}), 413, option=option)


@pytest.mark.parametrize(
    ("text", "told"), [(LONG, {"option": "on_long"}), ([9999], {}), ([-1], {}), ([2**70], {}), ("broken", {})]
)
def test_an_error_names_its_text(client: Client, text: object, told: Json) -> None:
    assert refused(client.post(TRANSLATE, {"texts": ["a", "b", text, text], "model": "de-en"}), text=2, **told)


def test_a_language_that_nobody_has_is_named(client: Client) -> None:
    asked: Json = {"texts": "a", "source_language": "de", "target_language": "en"}
    for field in ("source_language", "target_language"):
        for code in ("xx", "", "no language", "\0"):
            refused(client.post(TRANSLATE, {**asked, field: code}), option=field)
        refused(client.post(TRANSLATE, {name: code for name, code in asked.items() if name != field}), option=field)


def test_other_paths_and_methods_are_problems(client: Client) -> None:
    for method, path, status in ("GET", TRANSLATE, 405), ("DELETE", MODELS, 405), ("POST", "/v1/nothing", 404):
        reply = client.send(method, path)
        assert (reply.status, reply.kind, reply.json["status"]) == (status, PROBLEM, status)
    assert client.send("GET", TRANSLATE).headers["allow"] == "POST"


def test_a_service_is_ready_whatever_it_did_before(client: Client) -> None:
    for _ in range(3):
        translated(client, "Hund", model="de-en")
        assert (client.get("/ready").status, client.get("/ready").json) == (200, {"status": "ready"})


@pytest.fixture(scope="module")
def locked() -> Iterator[Client]:
    """A server with keys."""
    keys = Keys({hashed("hers"): Key(name="alice", characters=10, texts=2), hashed("his"): Key(name="bob")})
    with running(service({"de-en": FakeTranslator()}, keys, characters=20)) as address:
        yield Client(address)


FORMS: dict[str, Json] = {
    TRANSLATE: {"texts": "a"},
    ALTERNATIVES: {"text": "a"},
    SCORE: {"texts": ["a"], "translations": ["A"]},
}


@pytest.mark.parametrize("path", list(FORMS))
def test_a_key_is_needed(locked: Client, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic hers"},
        {"authorization": "Bearer \xe4"},
        {"x_api_key": "wrong"},
    ):
        reply = locked.post(path, FORMS[path], **headers)
        refused(reply, 401)
        assert reply.headers["www-authenticate"] == "Bearer"
    for headers in {"authorization": "Bearer hers"}, {"authorization": "bearer his"}, {"x_api_key": "hers"}:
        assert locked.post(path, FORMS[path], **headers).status == 200


def test_a_body_without_a_key_is_not_even_read(locked: Client) -> None:
    refused(locked.send("POST", TRANSLATE, b"not JSON", content_type="text/plain"), 401)


def test_a_key_has_limits_of_its_own(locked: Client) -> None:
    asked: Json = {"texts": "a" * 11}
    assert "10" in refused(locked.post(TRANSLATE, asked, x_api_key="hers"), 413, option="characters")
    refused(locked.post(TRANSLATE, {"texts": ["a"] * 3}, x_api_key="hers"), 413, option="texts")
    assert locked.post(TRANSLATE, asked, x_api_key="his").status == 200
    refused(locked.post(TRANSLATE, {"texts": "a" * 21}, x_api_key="his"), 413, option="characters")


def test_a_named_model_decides_among_which_languages_a_text_is_looked_for(client: Client) -> None:
    form = {"texts": "The dog sleeps on the roof of the house.", "source_language": "auto"}
    [found] = client.post(TRANSLATE, {**form, "model": "de-en", "target_language": "en"}).json["translations"]
    assert (found["text"], found["model"], found["detected"]["language"]) == (form["texts"], None, "en")
