"""The codes of bundles as people use them: short, and found by any name for them."""

from __future__ import annotations

import pytest

pytest.importorskip("langcodes")

from kvx.runtime.bundle.framing import Languages
from kvx.runtime.errors import OptionError
from kvx.runtime.serving.languages import Pairs, Side, _nearest, name_of, public_code, standard

NLLB = ["deu_Latn", "eng_Latn", "zho_Hans", "zho_Hant", "srp_Cyrl", "arb_Arab", "ary_Arab", "nob_Latn", "nno_Latn"]
MBART = ["de_DE", "en_XX", "zh_CN", "pt_XX", "ro_RO", "sl_SI"]
M2M100 = ["de", "en", "zh", "sr", "pt"]
OPUS = ["deu", "eng", "cmn_Hans", "cmn_Hant", "nob", "pt_br", "por", "pt"]


def no_languages() -> Languages:
    return Languages()


@pytest.mark.parametrize(
    ("codes", "public"),
    [
        (NLLB, ["de", "en", "zh-Hans", "zh-Hant", "sr", "ar", "ary", "nb", "nn"]),
        (MBART, ["de", "en", "zh-CN", "pt", "ro", "sl"]),
        (M2M100, ["de", "en", "zh", "sr", "pt"]),
        (["srp_Cyrl", "srp_Latn", "deu_Latn"], ["sr-Cyrl", "sr-Latn", "de"]),
        (["de_DE", "de_AT"], ["de-DE", "de-AT"]),
    ],
)
def test_public_codes_are_as_short_as_they_can_be(codes: list[str], public: list[str]) -> None:
    side = Side.of(codes)
    assert dict(side.own) == dict(zip(public, codes, strict=True))


@pytest.mark.parametrize("codes", [NLLB, MBART, M2M100, OPUS, ["xx", "not a code", "__x__", "de", "DE"]])
def test_every_code_of_a_bundle_has_a_public_one_of_its_own(codes: list[str]) -> None:
    side = Side.of(codes)
    assert sorted(str(own) for own in side.own.values()) == sorted(codes)
    assert all(side.find(public) == public for public in side.own)


@pytest.mark.parametrize("codes", [NLLB, MBART, M2M100, ["srp_Cyrl", "srp_Latn"]])
def test_a_language_is_found_by_the_code_of_its_bundle_in_any_case(codes: list[str]) -> None:
    side = Side.of(codes)
    for public, own in side.own.items():
        assert own is not None
        for name in (own, own.upper(), own.lower(), own.replace("_", "-"), f" {own} ", public.upper(), public):
            assert side.find(name) == public


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("zh", "zh-Hans"),
        ("zh-CN", "zh-Hans"),
        ("zh-TW", "zh-Hant"),
        ("zt", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"),
        ("deu", "de"),
        ("ger", "de"),
        ("de-AT", "de"),
        ("en-US", "en"),
        ("no", "nb"),
        ("ar", "ar"),
        ("fr", None),
        ("auto", None),
        ("", None),
        ("\ud800", None),
        ("x" * 5000, None),
        ("de de", None),
        ("-", None),
    ],
)
def test_other_names_of_a_language_are_found(asked: str, found: str | None) -> None:
    assert Side.of(NLLB).find(asked) == found


def test_a_code_that_is_spelled_as_it_is_comes_first() -> None:
    side = Side.of(["pt_br", "pt_BR", "por", "pt"])
    assert dict(side.own) == {"pt-BR": "pt_br", "pt_BR": "pt_BR", "por": "por", "pt": "pt"}
    assert [side.find(code) for code in ("pt_BR", "pt-BR", "por", "pt")] == ["pt_BR", "pt-BR", "por", "pt"]


def test_codes_that_nobody_has_are_not_remembered_at_any_length() -> None:
    side = Side.of(NLLB)
    before = _nearest.cache_info().currsize
    assert [side.find("de" * length) for length in range(50, 80)] == [None] * 30
    assert _nearest.cache_info().currsize == before


def test_brazil_is_found_where_there_is_one_portuguese() -> None:
    assert Side.of(["por_Latn", "eng_Latn"]).find("pb") == "pt"
    assert Side.of(["pt_PT", "pt_BR"]).find("pb") == "pt-BR"


def test_a_bundle_without_languages_gets_those_that_are_given() -> None:
    pairs = Pairs.of(no_languages(), ("deu", "en"))
    assert (dict(pairs.source.own), dict(pairs.target.own)) == ({"de": None}, {"en": None})
    assert pairs.source.find("de-DE") == "de"
    assert Pairs.of(no_languages(), None) == Pairs()


def test_a_pair_chooses_among_the_languages_of_a_bundle() -> None:
    codes = {code: number for number, code in enumerate(NLLB)}
    languages = Languages(source=codes, target=codes, default_source=None)
    assert len(Pairs.of(languages, None).source.own) == len(NLLB)
    chosen = Pairs.of(languages, ("de", "zh-TW"))
    assert (dict(chosen.source.own), dict(chosen.target.own)) == ({"de": "deu_Latn"}, {"zh-Hant": "zho_Hant"})
    with pytest.raises(OptionError, match="fr"):
        Pairs.of(languages, ("de", "fr"))


def test_languages_have_english_names() -> None:
    names = {"de": "German", "zh-Hant": "Chinese (Traditional)", "pt-BR": "Portuguese (Brazil)"}
    assert {code: name_of(code) for code in names} == names
    assert name_of("no language") == "no language"
    assert public_code("eng_Latn") == "en"
    assert standard("<2de>") == "<2de>"
