"""Models of many languages: which are taken, what is refused, and that the forced token is neither scored nor shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvx import BeamSearch, BundleError, InputError, OptionError, Translation, Translator
from kvx.runtime.options import TranslateOptions

TEXTS = ["eins zwei drei", "neun zwölf", "fünf vier drei zwei", "acht"]
FORWARDS, BACKWARDS = "fr", "nl"


def texts_of(translations: list[Translation]) -> list[str]:
    return [one.text for one in translations]


def test_the_language_decides_what_is_said(languages_translator: Translator) -> None:
    forwards, backwards = (
        texts_of(languages_translator.translate(TEXTS, source_language="de", target_language=code))
        for code in (FORWARDS, BACKWARDS)
    )
    assert forwards == TEXTS
    assert backwards == [" ".join(text.split()[::-1]) for text in TEXTS]


def test_every_text_may_have_a_language_of_its_own(languages_translator: Translator) -> None:
    codes = [FORWARDS, BACKWARDS, BACKWARDS, FORWARDS]
    mixed = languages_translator.translate(TEXTS, source_language="de", target_language=codes)
    alone = [
        languages_translator.translate([text], source_language="de", target_language=code)[0]
        for text, code in zip(TEXTS, codes, strict=True)
    ]
    assert mixed == alone
    assert len({one.text for one in mixed}) == len(TEXTS)


def test_the_forced_token_is_neither_scored_nor_shown(languages_translator: Translator) -> None:
    options = {"source_language": "de", "target_language": FORWARDS, "scores": True}
    for search in ({}, {"beam_size": 3}, {"samples": 1, "seed": 3}):
        [found] = languages_translator.translate(TEXTS[:1], **options, **search)  # type: ignore[arg-type]
        language = languages_translator.manifest.languages.target[FORWARDS]
        assert language not in found.ids
        assert FORWARDS not in found.text
        assert found.log_probabilities is not None
        assert len(found.log_probabilities) == len(found.ids)


def test_what_is_translated_is_scored_alike(languages_translator: Translator) -> None:
    options = TranslateOptions(source_language="de", target_language=BACKWARDS)
    found = languages_translator.translate(TEXTS, options, scores=True)
    scored = languages_translator.score(TEXTS, [one.ids for one in found], options)
    for one, other in zip(found, scored, strict=True):
        assert one.ids == other.ids
        assert other.log_probabilities == pytest.approx(one.log_probabilities, abs=1e-4)


def test_a_prefix_comes_after_the_forced_token(languages_translator: Translator) -> None:
    options = TranslateOptions(source_language="de", target_language=FORWARDS, prefix="zwölf")
    for search in (None, BeamSearch(3)):
        [found] = languages_translator.translate(
            TEXTS[:1], options if search is None else options.changed(search=search)
        )
        assert found.text.startswith("zwölf")
    others = languages_translator.alternatives(TEXTS[0], "eins", 3, options.changed(prefix=None))
    assert all(one.text.startswith("eins") for one in others)
    assert len({one.ids for one in others}) == 3


def test_alternatives_differ_though_translations_must_end_at_the_limit(marked_translator: Translator) -> None:
    options = TranslateOptions(target_language="fra")
    others = marked_translator.alternatives("eins zwei", "", 3, options)
    assert len({one.ids for one in others}) == 3
    assert any(one.text == "eins zwei" for one in others)


def test_one_text_has_no_languages_for_each(languages_translator: Translator) -> None:
    with pytest.raises(OptionError, match="there is one text"):
        languages_translator.alternatives("eins", "", 2, TranslateOptions(target_language=["fr", "nl"]))


def test_the_limit_does_not_count_the_forced_token(languages_translator: Translator) -> None:
    for search in ({}, {"beam_size": 2}):
        [found] = languages_translator.translate(
            TEXTS[:1],
            source_language="de",
            target_language=FORWARDS,
            max_new_tokens=1,
            **search,  # type: ignore[arg-type]
        )
        assert (len(found.ids), found.finish_reason) == (1, "length")
    most = languages_translator.manifest.most_new_tokens
    assert most == languages_translator.manifest.model["target_positions"] - 1
    with pytest.raises(OptionError, match=f"1 to {most}"):
        languages_translator.translate(TEXTS, source_language="de", target_language="fr", max_new_tokens=most + 1)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_neighbours_change_no_answer(languages_translator: Translator, rows: int) -> None:
    texts, codes = TEXTS * 5, [FORWARDS, BACKWARDS, BACKWARDS] * 6 + [FORWARDS, FORWARDS]
    together = languages_translator.translate(texts, source_language="de", target_language=codes, rows=rows)
    for text, code, found in zip(texts, codes, together, strict=True):
        assert found == languages_translator.translate([text], source_language="de", target_language=code)[0]


@pytest.mark.parametrize(
    ("source", "target", "option", "words"),
    [
        ("de", None, "target_language", "There is no `target_language`"),
        ("de", "fra", "target_language", "the nearest being fr"),
        ("DE", "fr", "source_language", "the nearest being de"),
    ],
)
def test_languages_that_are_missing_or_unknown_are_refused(
    languages_translator: Translator, source: str | None, target: str | None, option: str, words: str
) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        languages_translator.translate(TEXTS, source_language=source, target_language=target)
    assert caught.value.option == option


def test_an_unknown_language_of_one_text_is_refused_with_its_line(languages_translator: Translator) -> None:
    with pytest.raises(InputError, match="Line 2: The model has no target language 'xx'"):
        languages_translator.translate(TEXTS[:2], source_language="de", target_language=["fr", "xx"])


@pytest.mark.parametrize("codes", [["fr"], ["fr"] * 3])
def test_as_many_languages_as_texts_are_wanted(languages_translator: Translator, codes: list[str]) -> None:
    with pytest.raises(InputError, match="one language for each text"):
        languages_translator.translate(TEXTS[:2], source_language="de", target_language=codes)


def test_a_model_without_languages_takes_none(numbers_translator: Translator) -> None:
    with pytest.raises(OptionError, match="no languages of the target"):
        numbers_translator.translate(["one"], target_language="de")


def test_a_default_language_is_taken_where_none_is_named(languages_bundle: Path, tmp_path: Path) -> None:
    values = json.loads((languages_bundle / "manifest.json").read_text(encoding="utf-8"))
    values["languages"] |= {"default_source": "de", "default_target": BACKWARDS}
    translator = changed(languages_bundle, tmp_path, values)
    assert translator.translate(TEXTS[:1])[0].text == "drei zwei eins"
    assert translator.translate(TEXTS[:1], target_language=FORWARDS)[0].text == TEXTS[0]


def test_a_mark_in_the_text_says_its_target(marked_translator: Translator) -> None:
    plain = marked_translator.translate(TEXTS, target_language="fra")
    assert marked_translator.translate([f">>fra<< {text}" for text in TEXTS]) == plain
    assert texts_of(plain) == TEXTS
    mixed = marked_translator.translate([">>nld<< eins zwei", ">>fra<< eins zwei"])
    assert texts_of(mixed) == ["zwei eins", "eins zwei"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (">>nld<< eins", "fra", "is marked for 'nld', but `target_language` is 'fra'"),
        (">>xxx<< eins", None, "no target language 'xxx'"),
        ("eins", None, "There is no `target_language`"),
    ],
)
def test_a_mark_that_is_unknown_or_contradicted_is_refused(
    marked_translator: Translator, text: str, code: str | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        marked_translator.translate([text], target_language=code)


def test_what_never_comes_never_comes(marked_translator: Translator) -> None:
    framing = marked_translator.manifest.framing
    for search in ({"beam_size": 1}, {"beam_size": 1, "scores": True}, {"beam_size": 3}, {"samples": 4, "seed": 1}):
        found = marked_translator.translate(TEXTS, target_language="fra", **search)  # type: ignore[arg-type]
        assert all(set(framing.never).isdisjoint(one.ids) for each in found for one in each.hypotheses)


def changed(bundle: Path, folder: Path, values: object) -> Translator:
    """The translator of a bundle with another manifest."""
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    return Translator.load(folder)


class TestDefaults:
    """Of a checkpoint that is searched with four beams."""

    def test_are_those_of_its_generation_config(self, marked_translator: Translator) -> None:
        options = marked_translator.options()
        assert options.search == BeamSearch(4, early_stopping=False, rules="transformers")
        assert options.end_at_limit
        assert set(options.origins.values()) == {"generation_config.json"}
        assert {"beam_size", "length_penalty", "early_stopping", "beam_rules", "end_at_limit"} == set(options.origins)

    def test_give_way_to_what_is_asked_for(self, marked_translator: Translator) -> None:
        of = marked_translator.options
        assert of(beam_size=1).search.beams == 1
        assert of(beam_size=1).origins.keys() == {"end_at_limit"}
        assert of(beam_size=2).search == BeamSearch(2, early_stopping=False, rules="transformers")
        assert of(n_best=2).search == BeamSearch(4, early_stopping=False, rules="transformers", n_best=2)
        assert of(samples=3).search.samples == 3
        assert of(TranslateOptions(end_at_limit=False)).end_at_limit is False
        assert of(TranslateOptions(beam_size=1)).search.beams == 1

    def test_that_contradict_what_is_asked_for_give_way(self, marked_bundle: Path, tmp_path: Path) -> None:
        values = json.loads((marked_bundle / "manifest.json").read_text(encoding="utf-8"))
        values["defaults"]["min_new_tokens"] = {"value": 9, "origin": "generation_config.json"}
        translator = changed(marked_bundle, tmp_path, values)
        assert translator.options(max_new_tokens=5).min_new_tokens == 5
        assert translator.options(min_new_tokens=2).min_new_tokens == 2
        assert translator.options(patience=2.0).search == BeamSearch(4, patience=2.0)

    @pytest.mark.parametrize("name", ["shortlist", "prefix", "cache_bytes", "search", "window"])
    def test_of_anything_but_a_search_make_no_bundle(self, marked_bundle: Path, tmp_path: Path, name: str) -> None:
        values = json.loads((marked_bundle / "manifest.json").read_text(encoding="utf-8"))
        values["defaults"][name] = {"value": "/etc/passwd", "origin": "generation_config.json"}
        with pytest.raises(BundleError, match=rf"defaults\.{name}"):
            changed(marked_bundle, tmp_path, values)

    def test_are_what_a_translation_without_options_has(self, marked_translator: Translator) -> None:
        plain = marked_translator.translate(TEXTS, target_language="fra", scores=True)
        options = TranslateOptions(beam_size=4, early_stopping=False, beam_rules="transformers", end_at_limit=True)
        assert plain == marked_translator.translate(TEXTS, options, target_language="fra", scores=True)

    def test_a_translation_that_must_end_says_so(self, marked_translator: Translator) -> None:
        for size in (1, 4):
            [found] = marked_translator.translate(
                ["eins zwei drei vier"], target_language="fra", beam_size=size, max_new_tokens=3
            )
            eos = marked_translator.manifest.framing.eos
            assert (len(found.ids), found.ids[-1], found.finish_reason) == (3, eos, "length")
            assert len(found.tokens) == 2

    def test_bundles_without_any_search_as_ever(self, numbers_translator: Translator) -> None:
        assert numbers_translator.options() == TranslateOptions()
        assert numbers_translator.options().origins == {}
