from __future__ import annotations

import html
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.runtime.errors import InputError
from kvx.runtime.text.markup import html_passage

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

pytest.importorskip("sentencex", reason="sentences are found by the package sentencex")

ATTACK = '<script>alert("1")</script> & \'x\' &lt;b&gt; " onload="x -->'
KEPT = [
    "<!-- Kommentar -->",
    "<!doctype html>",
    "<?xml version='1.0'?>",
    "<![CDATA[ Text ]]>",
    "<script>if (a < b) 'Text' </b></script>",
    "<STYLE>p::before { content: 'Text' }</STYLE >",
    "<textarea>Text <b></textarea>",
    "<code>Text <b>fett</b></code>",
    "<pre>Text\n  Text</pre>",
    "<kbd>Strg</kbd>",
    "<samp>Text</samp>",
    "<var>n</var>",
    "<p translate=no>Text <b title='Titel'>fett</b></p>",
    '<p TRANSLATE="NO">Text</p>',
    "<p class='a notranslate b'>Text</p>",
    "<code title='Titel'>Text</code>",
    "<a href='Text.html' id=Text data-title=Text lang=de>",
    "<input type=hidden value=Text>",
    "<input value=Text>",
    "&nbsp; &mdash; &#x1F600;",
    "<p>&nbsp;\n\t</p>",
    "<a title=''>",
    "<a title>",
    "</ Text>",
    "<script>Text",
    "<!-- Text",
    "<a title='Text",
    "<a title=Text",
    "<plaintext>Text</plaintext>",
    "<script>'</\u017fcript>Text",
    "<title>a<b>c</title>",
]
PARTS = (
    "< > & / = ' \" - ! <b> </b> <p> </p> <br/> <!-- --> --!> Hund Ja. &lt; &amp &#0; &notit; <code> </code> <i/> <? "
    "<img|alt= <a|title=' <script> </script> <![CDATA[ ]]> <title> </title> <textarea> </textarea> <li> <td> 你好。 </ "
    "<p|translate=no> <i|translate=yes> <a\u3000title=' <a\x0btitle=\" </\u017fcript> \x00 | \u3000 \n <svg> </svg>"
)
SCRAPS = st.lists(st.sampled_from(PARTS.split(" ")), max_size=30).map(lambda parts: "".join(parts).replace("|", " "))
PAGES = SCRAPS | st.text()
INLINE = st.sampled_from(["b", "i", "span", "em", "code", "kbd"])
WORDS = st.text("aB .<>&\"'\n\u00e4", max_size=12)
HUGE = {
    "nested": "<b>",
    "nested, with text": "<p>a. ",
    "less-than": "<",
    "tags that do not end": "<a ",
    "end tags of nothing": "</i>",
    "end tags of other": "<b></i>",
    "comments": "<!--",
    "sections": "<![CDATA[",
    "quotes": "<a b=\"<a c='",
    "ampersands": "&",
    "entities": "&#1",
    "names": "&a;a. ",
    "titles": "<title>",
    "equals": "<a = ",
    "cells": "<td><p>a. ",
    "values": "value=a ",
}


def joined(page: str, translation: str | None = None, language: str | None = "de") -> str:
    """The page with this translation of each sentence, or each as it is."""
    found = html_passage(page, language)
    return found.joined([one if translation is None else translation for one in found.asked])


def sentences(page: str) -> tuple[str, ...]:
    return html_passage(page, "de").sentences


def trees(*pages: str) -> list[list[object]]:
    """Names, attributes and texts of a browser's tree of each page, with one space for all white space of a text."""
    parser = pytest.importorskip("selectolax.lexbor", reason="trees are compared by selectolax").LexborHTMLParser
    return [list(_nodes(parser(page).root)) for page in pages]


def _nodes(root: LexborNode) -> Iterator[object]:
    for node in root.traverse(include_text=True):
        if node.tag == "-text":
            yield " ".join((node.text_content or "").split())
        else:
            yield node.tag, {name: " ".join((value or "").split()) for name, value in node.attributes.items()}


def elements(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """An element around what the strategy gives."""
    attributes = st.sampled_from(["", " class=x", " title='Ein &quot;Hund&quot;.'", ' title="a > b"', " translate=no"])
    inside = st.lists(strategy, max_size=3).map("".join)
    return st.tuples(INLINE, attributes, inside).map(lambda parts: f"<{parts[0]}{parts[1]}>{parts[2]}</{parts[0]}>")


WELL_FORMED = st.recursive(WORDS.map(html.escape), elements, max_leaves=12).map(lambda inside: f"<div>{inside}</div>")


def test_text_nodes_and_attributes_that_people_read_are_sentences() -> None:
    page = (
        '<title>Der Titel</title><p title="Ein Hund. Eine Katze.">Das ist <b>fett</b>.</p><img alt=Bild>'
        "<a aria-label=Weg><input placeholder='Name' value=no><input type=SUBMIT value='Los'>"
        "<input type=button value=Halt>"
        "<textarea placeholder=Text></textarea>"
    )
    expected = "Der Titel|Ein Hund.|Eine Katze.|Das ist|fett|Bild|Weg|Name|Los|Halt|Text"
    assert sentences(page) == tuple(expected.split("|"))


@pytest.mark.parametrize("page", KEPT)
def test_what_is_not_translated_comes_back_as_it_is(page: str) -> None:
    assert html_passage(page).sentences == ()
    assert joined(page) == page


@pytest.mark.parametrize("page", [page for page in KEPT if page.endswith((">", ";")) and "plaintext" not in page])
def test_what_stands_behind_it_is_translated(page: str) -> None:
    assert joined(f"{page}<p>Hund</p>", "dog") == f"{page}<p>dog</p>"


def test_translate_yes_turns_translation_on_again() -> None:
    page = "<p translate=no>Nein <b translate='yes'>ja<br><i>ja</i></b> nein</p><code><b translate>ja</b> nein</code>"
    assert joined(page, "X") == page.replace("ja", "X")


@pytest.mark.parametrize(
    "page",
    [
        "<ul><li translate=no>Nein<li>ja</ul>",
        "<p translate=no>Nein<p>ja",
        "<p translate=no>Nein<div>ja</div>",
        "<dl><dt class=notranslate>Nein<dd>ja</dl>",
        "<table><tr><td translate=no>Nein<td>ja<tr><td translate=no>Nein<tr><td>ja</table>",
        "<div><code>Nein</div>ja",
        "<code class=a/>Nein</code>ja",
        "<code/>ja",
    ],
)
def test_an_element_ends_where_a_browser_ends_it(page: str) -> None:
    assert joined(page, "X") == page.replace("ja", "X")


def test_white_space_around_a_text_node_is_kept_and_within_a_sentence_is_one_space() -> None:
    found = html_passage("<p>\n  Ein\n  Hund\tschläft.\n\n  Er&nbsp;schläft. &nbsp;</p>", "de")
    assert found.sentences == ("Ein Hund schläft.", "Er\xa0schläft.")
    assert found.gaps == ("<p>\n  ", "\n\n  ", " &nbsp;</p>")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a &amp; b", "a & b"),
        ("a &AMP b", "a & b"),
        ("&lt;b&gt;", "<b>"),
        ("&#65;&#x42;", "AB"),
        ("f&uuml;r", "für"),
        ("a&notit;", "a¬it;"),
        ("a &nosuch; b", "a &nosuch; b"),
        ("a &#xD800; b", "a \ufffd b"),
        (f"a &#{'1' * 5000}; b", "a \ufffd b"),
        ("a & b &", "a & b &"),
        ("a < b", "a < b"),
        ("a <3", "a <3"),
    ],
)
def test_entities_are_decoded_for_the_model(written: str, read: str) -> None:
    assert " ".join(sentences(f"<p>{written}</p>")) == read


def test_an_old_entity_in_an_address_is_none() -> None:
    assert sentences("<a title='?a=1&copy=2&amp;c&copy'>") == ("?a=1&copy=2&c©",)


@pytest.mark.parametrize(
    "page", ["<p>Hund</p>", '<a title="Hund">', "<a title='Hund'>", "<a title=Hund>", "<title>Hund</title>"]
)
def test_a_translation_is_text_and_never_markup(page: str) -> None:
    escaped = html.escape(ATTACK)
    assert trees(joined(page, ATTACK)) == trees(page.replace("=Hund", '="Hund"').replace("Hund", escaped))


def test_text_that_spells_a_tag_stays_text() -> None:
    assert joined("<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>") == "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"


def test_a_bare_value_gets_quotes_that_nothing_in_it_ends() -> None:
    assert joined('<img alt=Ein"Hund src=x>', 'a "dog"') == '<img alt="a &quot;dog&quot;" src=x>'
    assert joined('<img alt=""" src=x>') == '<img alt=""" src=x>'


def test_sentences_of_a_script_without_spaces_get_one_within_a_text_node() -> None:
    assert html_passage("<p>你好。走！</p>", "zh").joined(["Hello.", "Go!"]) == "<p>Hello. Go!</p>"


@given(WELL_FORMED)
def test_the_tree_of_a_page_stays_what_it_is(page: str) -> None:
    assert trees(joined(page)) == trees(page)


@given(WELL_FORMED)
def test_the_elements_of_a_page_stay_whatever_the_translations(page: str) -> None:
    [before, after] = trees(page, joined(page, ATTACK))
    assert [node[0] for node in before if isinstance(node, tuple)] == [
        node[0] for node in after if isinstance(node, tuple)
    ]


@given(WELL_FORMED)
def test_well_formed_markup_stays_well_formed(page: str) -> None:
    etree = pytest.importorskip("lxml.etree", reason="well-formedness is checked by lxml")
    page = page.replace(" class=x", "").replace(" translate=no", " translate='no'")
    etree.fromstring(page)
    etree.fromstring(joined(page, ATTACK))


@given(PAGES)
def test_any_text_is_read_and_its_elements_stay(page: str) -> None:
    [before, after] = trees(page, joined(page))
    assert [node[0] for node in before if isinstance(node, tuple)] == [
        node[0] for node in after if isinstance(node, tuple)
    ]


@given(WELL_FORMED)
def test_a_page_joined_with_its_own_sentences_says_what_it_said(page: str) -> None:
    assert html.unescape(joined(page)).split() == html.unescape(page).split()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("unit", HUGE.values(), ids=HUGE.keys())
def test_a_huge_page_takes_a_time_that_grows_with_its_length(unit: str) -> None:
    def seconds(size: int) -> float:
        page, start = "<input " * unit.startswith("value") + unit * (size // len(unit)), time.process_time()
        found = html_passage(page)
        taken = time.process_time() - start
        assert len(found.gaps) == len(found.sentences) + 1
        return taken

    assert any(seconds(120_000) < 9 * seconds(30_000) + 0.1 for _ in range(3))  # 4 times is linear, 16 the square


def test_a_hundred_thousand_elements_may_be_nested() -> None:
    page = "<b>" * 100_000 + "Hund" + "</b>" * 100_000
    assert joined(page, "dog") == page.replace("Hund", "dog")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="is not a text"):
        html_passage("<p>\ud800")
