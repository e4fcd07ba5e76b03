"""Sentences of HTML with elements in them: translated whole, with the elements around their own words."""

from __future__ import annotations

import dataclasses
import html
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvx.runtime.errors import InputError
from kvx.runtime.text.markup import html_passage
from kvx.runtime.text.passages import passage
from kvx.runtime.text.runs import INLINE

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

pytest.importorskip("sentencex", reason="sentences are found by the package sentencex")

DOG = {
    "Ein": "A",
    "Hund": "Dog.",
    "läuft schnell.": "Runs fast.",
    "Ein Hund läuft schnell.": "A dog runs fast.",
}
PLACED = [  # page, what is translated, the result
    ("<p>Ein <b>Hund</b> läuft schnell.</p>", DOG, "<p>A <b>dog</b> runs fast.</p>"),
    (" Ein <a href='x?a=1&amp;b'>Hund</a>\n läuft schnell. ", DOG, " A <a href='x?a=1&amp;b'>dog</a> runs fast. "),
    ("<b>Ein</b> Hund läuft.", {"Ein": "a", "Ein Hund läuft.": "A dog runs."}, "<b>A</b> dog runs."),
    ("Ein Hund <b>läuft.</b>", {"läuft.": "Runs.", "Ein Hund läuft.": "A dog runs."}, "A dog <b>runs.</b>"),
    ("Ein <b>Hund!</b> Ja", {"Hund!": "Dog!", "Ein Hund!": "A dog!"}, "A <b>dog!</b> Ja"),
    ("Ein Hund <b>läuft</b>.", {"läuft": "runs.", "Ein Hund läuft.": "A dog runs."}, "A dog <b>runs</b>."),
    (
        "Das <b>rote</b> <i>Haus</i> steht.",
        {"rote": "rouge", "Haus": "maison", "Das rote Haus steht.": "La maison rouge est là."},
        "La <i>maison</i> <b>rouge</b> est là.",
    ),
    (
        "„<b>Ein</b> Hund“ sagt er.",
        {"Ein": "A", "„Ein Hund“ sagt er.": "“A dog,” he says."},
        "“<b>A</b> dog,” he says.",
    ),
    (
        "<i>Ja, <b>gut</b> so.</i>",
        {"gut": "good", "Ja, gut so.": "Yes, good & so."},
        "<i>Yes, <b>good</b> &amp; so.</i>",
    ),
    ("Gut. Er <b>ist</b> da.", {"Gut.": "Good.", "ist": "is", "Er ist da.": "He is here."}, "Good. He <b>is</b> here."),
    ("我<b>爱</b>你。", {"爱": "love", "我爱你。": "I love you."}, "I <b>love</b> you."),
    ("Der <b>alte Hund</b> da", {"alte Hund": "老狗", "Der alte Hund da": "那只老狗在那里"}, "那只<b>老狗</b>在那里"),
    ("H<sub>2</sub>O ist ein Stoff", {"H2O ist ein Stoff": "Stuff: H2O"}, "Stuff: H<sub>2</sub>O"),
    ("Ein<b> Hund </b>läuft", {"Hund": "dog", "Ein Hund läuft": "A dog runs"}, "A<b> dog </b>runs"),
    ("Ein <b>\n Hund</b>!", {"Hund": "dog", "Ein Hund!": "A dog!"}, "A <b> dog</b>!"),
    (
        "Ein <a title='Ja. Ein &amp;'>Hund</a>",
        {"Ja.": "Yes", "Ein Hund": "Hund a"},
        "<a title='Yes Ein &amp;'>Hund</a> a",
    ),
    ("<img alt=Bild>Ein <b>Hund</b>", {"Bild": "x", "Ein Hund": "Hund A"}, '<img alt="x"><b>Hund</b> A'),
    ("A &amp;&nbsp;<b>B</b>&#33;", {"A &\xa0B!": "B & A!"}, "<b>B</b> &amp; A!"),
]
APART = {  # pages whose sentences are translated in pieces: each has a whole, or none
    "the element's translation is not in the whole": ("Ein <b>Hund</b> da", {"Hund": "hound", "Ein Hund da": "A dog"}),
    "it is there twice": ("Ein <b>Hund</b> da", {"Hund": "dog", "Ein Hund da": "A dog, dog"}),
    "it overlaps itself": ("Ein <b>Hund</b> da", {"Hund": "a a", "Ein Hund da": "a a a"}),
    "it is a part of a word": ("Ein <b>Hund</b> da", {"Hund": "dog", "Ein Hund da": "A dogma"}),
    "it ends before a mark on its last letter": ("Ein <b>Hund</b> da", {"Hund": "e", "Ein Hund da": "e\u0301 a"}),
    "it has no word": ("Ein <b>Hund</b> da", {"Hund": "!", "Ein Hund da": "A ! B"}),
    "the whole is empty": ("Ein <b>Hund</b> da", {"Hund": "dog", "Ein Hund da": ""}),
    "two elements overlap": ("<b>Ein</b> <i>Hund</i>", {"Ein": "a", "Hund": "a dog", "Ein Hund": "a dog"}),
    "a letter of the same word is another one": ("<b>H</b>und da", {"Hund da": "A Hat"}),
    "an element is nested": ("Ein <b><i>Hund</i></b> da", {}),
    "an element is empty": ("Ein <b></b>Hund <i>da</i>", {}),
    "an element has no word": ("Ein <b>Hund</b> <i>!</i> da", {}),
    "an element ends in the next sentence": ("Ein <b>Hund. Eine</b> Katze.", {}),
    "an element has no end": ("Ein <b>Hund da", {}),
    "elements cross": ("Ein <b>Hund <i>ist</b> da</i>", {}),
    "there is an image": ("Ein <b>Hund</b> <img> da", {}),
    "there is a comment": ("Ein <b>Hund</b> <!-- --> da", {}),
    "there is code": ("Ein <b>Hund</b> <code>x</code> da", {}),
    "an element stays as it is": ("Ein <b>Hund</b> <i translate=no>x</i> da", {}),
    "there is an element that is not inline": ("Ein <b>Hund</b> <button>x</button> da", {}),
    "it is in a drawing": ("<svg>Ein <a>Hund</a> da</svg>", {}),
    "a paragraph ends": ("<p>Ein <b>Hund<p>läuft</b> da", {}),
}
HUGE = [
    "<b>a</b> b. ",
    "<b>a</b> ",
    "a <b>",
    "<b>a</b>b",
    "<b> a </b>",
    "a </b>",
    "<b>a</b> b. <p>",
    "<b>&amp;a</b> &Aacute ",
]
NAMES = st.sampled_from(sorted(INLINE))
TAGGED = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=4), st.none() | NAMES), max_size=9, unique_by=lambda one: one[0]
)
TEXT = st.text("abÄz .!,<&\n", max_size=10).map(html.escape)
VOID = st.sampled_from(["<br>", "<img>", "<!-- a -->", "<code>a</code>", "</p><p>", "&nbsp;", "<i>"])


def with_tags(inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Elements around what there is."""
    return st.lists(
        st.tuples(NAMES, TEXT | inside).map(lambda one: f"<{one[0]} class=x>{one[1]}</{one[0]}>") | TEXT | VOID,
        max_size=6,
    ).map("".join)


PAGES = st.recursive(TEXT, with_tags, max_leaves=10).map(lambda inside: f"<div><p>{inside}</div>")


def translated(page: str, translate: Callable[[str], str] | Mapping[str, str], language: str | None = "de") -> str:
    """The page with each translation; what is in no dictionary stays."""
    found = html_passage(page, language)
    one = translate if callable(translate) else lambda text: translate.get(text, text)
    return found.joined([one(text) for text in found.asked])


def backwards(text: str) -> str:
    return " ".join(reversed(text.split()))


def root(page: str) -> LexborNode:
    """A browser's tree of a page."""
    parser = pytest.importorskip("selectolax.lexbor", reason="trees are compared by selectolax").LexborHTMLParser
    found: LexborNode = parser(page).root
    return found


def elements(page: str) -> Counter[object]:
    """Each element, with its attributes."""
    return Counter((node.tag, *sorted(node.attributes.items())) for node in root(page).traverse(include_text=False))


def text_of(page: str) -> str:
    """All text, with one space for all white space."""
    return " ".join(root(page).text().split())


@pytest.mark.parametrize(("page", "translations", "expected"), PLACED)
def test_elements_stand_around_the_translation_of_their_own_words(
    page: str, translations: Mapping[str, str], expected: str
) -> None:
    language = "zh" if page.startswith("我") else "de"
    assert translated(page, translations, language) == expected


@pytest.mark.parametrize(("page", "translations"), APART.values(), ids=APART.keys())
def test_pieces_are_translated_apart_where(page: str, translations: Mapping[str, str]) -> None:
    found = html_passage(page, "de")
    assert len(found.wholes) == bool(translations)
    pieces = [translations.get(one, one.upper()) for one in found.sentences]
    wholes = [translations[whole.text] for whole in found.wholes]
    assert found.joined([*pieces, *wholes]) == dataclasses.replace(found, wholes=()).joined(pieces)


def test_all_that_is_asked_are_the_sentences_and_then_the_wholes() -> None:
    found = html_passage("<p>Ein <b>Hund</b>. Eine Katze.</p> <b>Ja</b>", "de")
    assert found.sentences == ("Ein", "Hund", "Eine Katze.", "Ja")
    assert found.asked == (*found.sentences, "Ein Hund.")


@pytest.mark.parametrize(
    "page", ["<p>Ein Hund.</p>", "<b>Ein Hund.</b>", "<b>Ein Hund</b>.", "<img alt='A <b>b</b> c'>"]
)
def test_a_sentence_without_tags_in_it_is_asked_once(page: str) -> None:
    found = html_passage(page, "de")
    assert found.asked == found.sentences
    assert len(found.sentences) == 1


def test_a_plain_text_is_asked_as_it_is() -> None:
    found = passage("Ein <b>Hund</b> läuft. Ja.", "de")
    assert found.asked is found.sentences


@pytest.mark.parametrize("block", ["<br>", "<p>", "</p>", "<div>", "</td><td>", "<li>", "<h1>", "<hr/>"])
def test_no_sentence_goes_across_a_block(block: str) -> None:
    assert html_passage(f"Ein <b>Hund</b>{block}läuft <i>schnell</i>", "de").asked[4:] == ("Ein Hund", "läuft schnell")


def test_a_whole_fits_the_model() -> None:
    page = "Ein <b>Hund</b> läuft <i>sehr</i> schnell, <b>und</b> eine Katze sieht ihm <i>lange</i> zu."
    found = html_passage(page, "de", lambda text: len(text) < 40)
    wholes = tuple(whole.text for whole in found.wholes)
    assert wholes == ("Ein Hund läuft sehr schnell,", "und eine Katze sieht ihm lange zu.")
    assert found.joined(found.asked) == page


def test_a_translation_of_a_whole_is_text_and_never_markup() -> None:
    assert translated("Ein <b>Hund</b>", {"Ein Hund": "<i> Hund &"}) == "&lt;i&gt; <b>Hund</b> &amp;"


def test_a_space_is_put_between_wholes_of_a_script_without_spaces() -> None:
    page, words = (
        "我<b>爱</b>你。走<b>吧</b>！",
        {"爱": "love", "吧": "go", "我爱你。": "I love you.", "走吧！": "Let us go!"},
    )
    assert translated(page, {**words, "我": "I", "你。": "you.", "走": "let"}, "zh") == (
        "I <b>love</b> you. Let us <b>go</b>!"
    )


@pytest.mark.parametrize("count", [3, 5])
def test_there_is_a_translation_for_each_one_asked(count: int) -> None:
    with pytest.raises(InputError, match="4, one for each sentence"):
        html_passage("<p>Ein <b>Hund</b> läuft.</p>", "de").joined(["a"] * count)


@given(TAGGED)
def test_elements_move_with_their_words(words: list[tuple[str, str | None]]) -> None:
    assume(len(words) > 1 and any(name for _, name in words))
    tagged = [f"<{name}>{word}</{name}>" if name else word for word, name in words]
    page, expected = (f"<p>{' '.join(order)}</p>" for order in (tagged, tagged[::-1]))
    assert translated(page, backwards) == expected


@given(PAGES)
def test_a_page_with_its_own_sentences_is_what_it_was(page: str) -> None:
    result = translated(page, str)
    assert elements(result) == elements(page)
    assert text_of(result) == text_of(page)


@given(PAGES)
def test_a_page_in_capitals_is_the_page_in_capitals(page: str) -> None:
    result = translated(page, str.upper)
    assert elements(result) == elements(page)
    assert text_of(result).upper() == text_of(page).upper()


@given(PAGES, st.sampled_from([backwards, lambda text: text[::-1], lambda text: f"{text} {text}", lambda text: ""]))
def test_every_element_stays_whatever_the_translation(page: str, translate: Callable[[str], str]) -> None:
    assert elements(translated(page, translate)) == elements(page)


@given(PAGES)
def test_words_that_change_places_are_all_there(page: str) -> None:
    def letters(text: str) -> Counter[str]:
        return Counter(text) - Counter({" ": len(text)})

    assert letters(text_of(translated(page, backwards))) == letters(text_of(page))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("unit", HUGE)
def test_a_huge_page_takes_a_time_that_grows_with_its_length(unit: str) -> None:
    def seconds(size: int) -> float:
        page, start = unit * (size // len(unit)), time.process_time()
        found = html_passage(page)
        found.joined(found.asked)
        return time.process_time() - start

    assert any(seconds(120_000) < 9 * seconds(30_000) + 0.1 for _ in range(3))  # 4 times is linear, 16 the square
