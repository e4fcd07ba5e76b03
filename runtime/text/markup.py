"""HTML → the sentences that people read in it, and the markup between them, byte for byte.

The scanner follows the tokenizer of the HTML standard (https://html.spec.whatwg.org, 13.2.5). It only reads on, so its
time is linear, and what it cannot make sense of it keeps as it is.
"""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.entities import html5
from typing import NamedTuple

from kvx.runtime.text.passages import Escape, Fits, Passage, always, sentence_spans
from kvx.runtime.text.runs import BREAKS, INLINE, OTHER, RUN, Piece, Run, Stretch
from kvx.runtime.text.sources import refuse_other
from kvx.runtime.text.wholes import Place, Whole

KEPT = frozenset({"code", "pre", "kbd", "samp", "var", "math"})  # unless something in them has translate="yes"
RAW = frozenset({"script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes"})  # have no tags
VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"}
)
FOREIGN = ("svg", "math")  # what is in them a browser reads by other rules
READ = frozenset({"alt", "title", "placeholder", "aria-label"})  # attributes
BUTTONS = frozenset({"button", "submit", "reset"})  # inputs whose value is what people read
BLOCKS = (
    "address article aside blockquote details dialog div dl fieldset figure footer form h1 h2 h3 h4 h5 h6 header hr "
    "main menu nav ol p pre section table ul"
)
ENDED = {  # elements without an end tag that a start tag ends
    **dict.fromkeys(BLOCKS.split(), frozenset({"p"})),
    "li": frozenset({"li", "p"}),
    **dict.fromkeys(("dt", "dd"), frozenset({"dt", "dd", "p"})),
    **dict.fromkeys(("td", "th"), frozenset({"td", "th", "p"})),
    "tr": frozenset({"tr", "td", "th", "p"}),
    **dict.fromkeys(("tbody", "tfoot"), frozenset({"thead", "tbody", "tfoot", "tr", "td", "th", "p"})),
    "option": frozenset({"option"}),
}

SPACES = re.compile(r"[ \t\n\f\r]")  # what HTML calls white space
MARKUP = re.compile(r"<[a-zA-Z!?]|</.", re.DOTALL)
NAME = re.compile(r"</?([a-zA-Z][^ \t\n\f\r/>]*+)")
BETWEEN = re.compile(r"[ \t\n\f\r/]*+")
EQUALS = r"[ \t\n\f\r]*+=[ \t\n\f\r]*+"
ATTRIBUTE = re.compile(
    r"(?P<name>[^ \t\n\f\r/>][^ \t\n\f\r/>=]*+)"
    rf"(?:{EQUALS}(?:\"(?P<double>[^\"]*+)\"|'(?P<single>[^']*+)'|(?P<bare>[^ \t\n\f\r>\"'][^ \t\n\f\r>]*+)))?+"
)
UNCLOSED = re.compile(rf"{EQUALS}[\"']")
COMMENT_END = re.compile(r"-->|(?<!<!)--!>")
ENTITY = re.compile(r"&(?:#(?:[0-9]++|[xX][0-9a-fA-F]++);?|([a-zA-Z][a-zA-Z0-9]{0,40}+);?)")
LONGEST_NUMBER = 12  # characters of &#…; which is beyond Unicode where it is longer
CHARACTER = {"'": "&#x27;", '"': "&quot;"}


def html_passage(text: str, language: str | None = None, fits: Fits = always) -> Passage:
    """An HTML page or a part of one as a Passage.

    Its sentences are those of text nodes and of attributes that people read: alt, title, placeholder, aria-label, and
    the value of a button. They are decoded, and a run of white space is one space. White space around a text node and
    all markup belong to the gaps, and so does what stands in code, pre, kbd, samp, var, math, script, style, textarea,
    or an element with translate="no" or the class notranslate; translate="yes" ends that. A sentence with inline
    elements in it, such as b and a, is one of the wholes too. `joined` writes translations so that they are text and
    never markup. Any text is taken as HTML. Raises what `passage` raises.
    """
    refuse_other(text, None)
    reading = _Reading(text, language, fits)
    reading.read()
    return reading.found()


def escape_text(text: str) -> str:
    """As it is written between tags."""
    return html.escape(text, quote=False)


def escape_double(text: str) -> str:
    """As it is written between double quotes."""
    return escape_text(text).replace('"', CHARACTER['"'])


def escape_single(text: str) -> str:
    """As it is written between single quotes."""
    return escape_text(text).replace("'", CHARACTER["'"])


class _Attribute(NamedTuple):
    """The name is in lower case. The value stands at these places of the page, `quote` around it, if it has one."""

    name: str
    start: int
    end: int
    quote: str


@dataclass(frozen=True, slots=True)
class _Element:
    """An open element; `number`, from 0, where it is one of those that stand in sentences, or OTHER."""

    name: str
    is_read: bool
    number: int


class _Reading:
    """One pass over a page."""

    def __init__(self, page: str, language: str | None, fits: Fits) -> None:
        self._page = page
        self._language = language
        self._fits = fits
        self._gap: list[str] = []
        self._size = 0  # characters of the gap
        self._gaps: list[str] = []
        self._sentences: list[str] = []
        self._escapes: list[Escape] = []
        self._open: list[_Element] = []
        self._names = Counter[str]()
        self._numbers = itertools.count()
        self._run = Run()
        self._wholes: list[Whole] = []

    def found(self) -> Passage:
        gaps = (*self._gaps, "".join(self._gap))
        return Passage(tuple(self._sentences), gaps, tuple(self._escapes), tuple(self._wholes))

    def read(self) -> None:
        at = 0
        while at < len(self._page):
            markup = MARKUP.search(self._page, at)
            start = len(self._page) if markup is None else markup.start()
            self._text(at, start)
            at = start if markup is None else self._markup(start)
        self._end_run()

    def _keep(self, text: str) -> None:
        """Puts what is not translated into the gap."""
        self._gap.append(text)
        self._size += len(text)

    def _here(self) -> Place:
        return Place(len(self._gaps), self._size)

    def _mark(self, name: str, start: Place, number: int = OTHER) -> None:
        """Notes the tag from start to here: it ends a run or is part of it."""
        if name in BREAKS:
            self._end_run()
        else:
            self._run.mark(number, start, self._here())

    def _end_run(self) -> None:
        self._wholes += self._run.wholes(self._language, self._fits)
        self._run = Run()

    def _markup(self, start: int) -> int:
        """Reads what begins with this "<", and gives the place after it."""
        page, begun, closed = self._page, self._here(), ("", OTHER)
        if page.startswith("<!--", start):
            end = _after(COMMENT_END.search(page, start + 2), page)
        elif page.startswith("<![CDATA[", start):
            end = page.find("]]>", start) + 3 if page.find("]]>", start) >= 0 else len(page)
        elif (name := NAME.match(page, start)) is None:
            end = page.find(">", start) + 1 or len(page)
        elif page[start + 1] == "/":
            end, _ = self._attributes(name.end())
            closed = name[1].lower(), self._close(name[1].lower())
        else:
            return self._start_tag(start, name)
        self._keep(page[start:end])
        self._mark(closed[0], begun, closed[1])
        return end

    def _start_tag(self, start: int, matched: re.Match[str]) -> int:
        name, begun = matched[1].lower(), self._here()
        end, attributes = self._attributes(matched.end())
        if attributes is None:  # the page ends in it
            self._keep(self._page[start:])
            return end
        while self._open and self._open[-1].name in ENDED.get(name, ()):
            self._pop()
        is_read = self._is_read(name, attributes)
        is_button = name == "input" and self._named("type", attributes) in BUTTONS
        at, shown = start, READ | {"value"} if is_button else READ
        for one in attributes if is_read else ():
            if one.name in shown:
                at = self._value(at, one)
        self._keep(self._page[at:end])
        is_bare = bool(attributes) and attributes[-1].end == end - 1  # its "/", if any, belongs to the value
        is_open = name not in VOID | RAW and (is_bare or self._page[end - 2] != "/")
        may_move = is_open and is_read and name in INLINE and not any(map(self._names.__getitem__, FOREIGN))
        number = next(self._numbers) if may_move else OTHER
        self._mark(name, begun, number)
        if name in RAW:
            return self._raw(name, end, is_read=is_read)
        if name == "plaintext":
            self._keep(self._page[end:])
            return len(self._page)
        if is_open:
            self._open.append(_Element(name, is_read, number))
            self._names[name] += 1
        return end

    def _attributes(self, at: int) -> tuple[int, list[_Attribute] | None]:
        """Those of the tag whose name ends here, and the place after it. There are none where the page ends in it."""
        page, found = self._page, list[_Attribute]()
        while True:
            at = _after(BETWEEN.match(page, at), page)
            if at >= len(page):
                return len(page), None
            if page[at] == ">":
                return at + 1, found
            matched = ATTRIBUTE.match(page, at)
            assert matched is not None, "a character that no attribute begins with"
            at = matched.end()
            if matched.lastgroup == "name" and UNCLOSED.match(page, at):
                return len(page), None
            kind = matched.lastgroup or "name"
            quote = {"double": '"', "single": "'"}.get(kind, "")
            start = matched.end() if kind == "name" else matched.start(kind)
            found.append(_Attribute(matched["name"].lower(), start, matched.end() - len(quote), quote))

    def _is_read(self, name: str, attributes: list[_Attribute]) -> bool:
        """Whether what stands in this element is translated."""
        above = self._open[-1].is_read if self._open else True
        if "notranslate" in self._named("class", attributes).split():
            return False
        asked = self._named("translate", attributes, "absent")
        if asked in ("yes", "", "no"):
            return asked != "no"
        return above and name not in KEPT

    def _named(self, name: str, attributes: list[_Attribute], otherwise: str = "") -> str:
        """The value of the first attribute with this name, in lower case."""
        values = (self._page[one.start : one.end].strip().lower() for one in attributes if one.name == name)
        return next(values, otherwise)

    def _close(self, name: str) -> int:
        """Ends the innermost element of a name, if there is one, and gives its number."""
        if not self._names[name]:
            return OTHER
        while (closed := self._pop()).name != name:
            pass
        return closed.number

    def _pop(self) -> _Element:
        closed = self._open.pop()
        self._names[closed.name] -= 1
        return closed

    def _raw(self, name: str, start: int, *, is_read: bool) -> int:
        """Reads the content of an element without tags, as a text only where it is a title."""
        end = re.compile(rf"</{name}(?=[ \t\n\f\r/>])", re.IGNORECASE | re.ASCII).search(self._page, start)
        stop = len(self._page) if end is None else end.start()
        if name == "title" and is_read and "<" not in self._page[start:stop]:
            self._text(start, stop)
        else:
            self._keep(self._page[start:stop])
        return stop

    def _text(self, start: int, end: int) -> None:
        """Reads a text node."""
        if self._open and not self._open[-1].is_read:
            self._keep(self._page[start:end])
        elif start < end:
            self._run.add(*self._read(self._page[start:end], escape_text))

    def _value(self, at: int, one: _Attribute) -> int:
        """Reads the value of an attribute after what stands before it from `at`. A bare one with a sentence gets
        quotes. Gives the place after it.
        """
        raw = self._page[one.start : one.end]
        self._keep(self._page[at : one.start])
        if one.quote:
            self._read(raw, escape_single if one.quote == "'" else escape_double, in_attribute=True)
        elif any(map(str.isalnum, raw)):
            self._keep('"')
            self._read(raw.replace('"', CHARACTER['"']), escape_double, in_attribute=True)
            self._keep('"')
        else:
            self._keep(raw)
        return one.end

    def _read(self, raw: str, escape: Escape, *, in_attribute: bool = False) -> tuple[str, list[Stretch], list[Piece]]:
        """Finds the sentences of a text that is written with entities. Gives what the run is told of a text node."""
        shown, places = _decoded(raw, in_attribute=in_attribute) if "&" in raw else (raw, None)
        line, at, done, base = SPACES.sub(" ", shown), 0, 0, self._run.size
        stretches, pieces = list[Stretch](), list[Piece]()
        for start, end in sentence_spans(line, self._language, self._fits):
            before, after = (start, end) if places is None else (places[start], places[end])
            stretches.append(Stretch(base + done, base + start, self._here(), at, base, places))
            pieces.append(Piece(len(self._sentences), base + start, base + end))
            self._gaps.append("".join((*self._gap, raw[at:before])))
            self._sentences.append(RUN.sub(" ", line[start:end]))
            self._escapes.append(escape)
            self._gap, self._size, at, done = [], 0, after, end
        stretches.append(Stretch(base + done, base + len(line), self._here(), at, base, places))
        self._keep(raw[at:])
        return line, stretches, pieces


def _after(matched: re.Match[str] | None, page: str) -> int:
    return len(page) if matched is None else matched.end()


def _decoded(raw: str, *, in_attribute: bool) -> tuple[str, list[int]]:
    """What a text with entities says, and where in it each character begins, and the last ends."""
    parts, places, at = list[str](), list[int](), 0
    for text, start, end in _entities(raw, in_attribute=in_attribute):
        parts += raw[at:start], text
        places += itertools.chain(range(at, start), itertools.repeat(start, len(text)))
        at = end
    parts.append(raw[at:])
    places += range(at, len(raw) + 1)
    return "".join(parts), places


def _entities(raw: str, *, in_attribute: bool) -> Iterator[tuple[str, int, int]]:
    """What each entity stands for, and where it begins and ends. A name without its semicolon is one where it is an old
    one, and no letter, digit or "=" follows it in an attribute, such as the address of a link.
    """
    for matched in ENTITY.finditer(raw):
        (start, end), name = matched.span(), matched[1]
        if name is None:
            yield html.unescape(matched[0]) if end - start <= LONGEST_NUMBER else "\ufffd", start, end
        elif matched[0][-1] == ";" and f"{name};" in html5:
            yield html5[f"{name};"], start, end
        else:
            known = next((name[:size] for size in range(len(name), 1, -1) if name[:size] in html5), None)
            following = raw[start + 1 + len(known or "") :][:1]
            if known and not (in_attribute and (following.isalnum() or following == "=")):
                yield html5[known], start, start + 1 + len(known)
