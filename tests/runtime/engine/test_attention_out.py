"""Alignments and copied words on translations, from a bundle that gives attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvx import InputError, OptionError, Translator
from kvx.cli import app

TEXTS = ["one", "twelve thousand three hundred and four", "", "ninety-nine", "seven hundred and six"] * 3


@pytest.fixture(scope="module")
def bundle(attention_bundle: Path) -> Path:
    return attention_bundle


@pytest.fixture(scope="module")
def translator(bundle: Path) -> Translator:
    return Translator.load(bundle)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_every_hypothesis_has_the_weights_of_its_own_tokens(translator: Translator, beam_size: int) -> None:
    n_best = 2 if beam_size > 1 else None
    for text, found in zip(
        TEXTS, translator.translate(TEXTS, beam_size=beam_size, n_best=n_best, align=True), strict=True
    ):
        for one in found.hypotheses if text else ():
            assert one.attention is not None
            assert one.source_tokens is not None
            assert one.attention.shape == (len(one.ids), len(one.source_tokens) + 2)
            np.testing.assert_allclose(one.attention.sum(axis=1), 1, atol=1e-5)
            assert one.alignment == tuple(one.attention[: len(one.tokens), 1:-1].argmax(axis=1))


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}])
def test_attention_is_that_of_the_same_ids_alone(translator: Translator, options: dict[str, int]) -> None:
    together = translator.translate(TEXTS, rows=5, align=True, **options)  # type: ignore[arg-type]
    for text, found in zip(TEXTS, together, strict=True):
        if text:
            alone = translator.translate([text], align=True, prefixes=[found.ids[:-1]])[0]
            assert alone.ids == found.ids
            assert alone.attention is not None
            assert found.attention is not None
            np.testing.assert_allclose(found.attention, alone.attention, atol=1e-5)


def test_nothing_of_it_is_there_where_it_was_not_asked_for(translator: Translator) -> None:
    found = translator.translate(["one"])[0]
    assert (found.attention, found.alignment, found.source_tokens) == (None, None, None)


def test_an_unknown_token_becomes_the_source_word_it_looks_at(translator: Translator) -> None:
    unknown = translator._model.targets.tokenizer.unknown_id
    found = translator.translate(["twenty-one"], prefixes=[(unknown,)], replace_unknown=True, align=True)[0]
    assert found.ids[0] == unknown
    assert "⁇" not in found.text
    assert "twenty-one" in found.text
    plain = translator.translate(["twenty-one"], prefixes=[(unknown,)])[0]
    assert plain.ids == found.ids
    assert "⁇" in plain.text


def test_a_bundle_without_attention_is_refused_and_says_how_to_have_it(numbers_translator: Translator) -> None:
    with pytest.raises(OptionError, match="exported with attention"):
        numbers_translator.translate(["one"], align=True)


def test_the_command_prints_pairs_and_draws_a_page(bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "attention.html"
    line = ["translate", "--model", str(bundle), "--align", "--plot-attention", str(page), "twenty-one"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    text, pairs = result.stdout.strip().split("\t")
    assert text == "einundzwanzig"
    assert [int(pair.split("-")[1]) for pair in pairs.split()] == list(range(len(pairs.split())))
    assert "<svg" in page.read_text(encoding="utf-8")
    as_json = json.loads(CliRunner().invoke(app, [*line[:4], "--json", "twenty-one"]).stdout)
    assert [f"{source}-{target}" for target, source in enumerate(as_json["alignment"])] == pairs.split()


def test_a_page_of_an_empty_text_or_of_several_is_refused(bundle: Path, tmp_path: Path, translator: Translator) -> None:
    page = str(tmp_path / "attention.html")
    for texts in (["one", "two"], [" "]):
        result = CliRunner().invoke(app, ["translate", "--model", str(bundle), "--plot-attention", page, *texts])
        assert result.exit_code == 2
        assert "one text" in result.stderr or "empty text" in result.stderr
    assert not Path(page).exists()
    with pytest.raises(InputError, match="prefix"):
        translator.translate(["one"], prefixes=[])
