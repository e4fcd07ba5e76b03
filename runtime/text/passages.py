"""A text as people send it → the sentences that are translated, and what stands between them."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.text.sources import refuse_other
from kvx.runtime.text.wholes import Place, Whole

Escape = Callable[[str], str]
Fits = Callable[[str], bool]  # whether a model takes a sentence as a whole
Segment = Callable[[str, str], list[str]]

LONGEST_SENTENCE = 2048  # characters; more at once takes sentencex a time that grows with their square
OTHERWISE = "en"
PANIC = "PanicException"  # of pyo3, which exports no name for it
WHITE = re.compile(r"\s")
MARKER = re.compile(r"\s*[-*+•‣◦·–—>#]+\s+")  # of a list, a heading or a quotation: it stays as it is
CLAUSE = re.compile(r"(?<=[,;:–—])\s|(?<=[，、；：])")
UNSPACED = re.compile(  # Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese, with their punctuation
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f"
    "\U00020000-\U0003ffff]"
)
TWO_LETTERS = {  # ISO 639-3, and the other codes of 639-2, of the languages that sentencex has rules for
    code: short
    for short, codes in {
        "am": "amh",
        "ar": "ara arb arz apc acm ary",
        "as": "asm",
        "be": "bel",
        "bg": "bul",
        "bn": "ben",
        "ca": "cat",
        "cs": "ces cze",
        "da": "dan",
        "de": "deu ger",
        "el": "ell gre",
        "en": "eng",
        "es": "spa",
        "et": "est ekk",
        "fa": "fas per pes",
        "fi": "fin",
        "fr": "fra fre",
        "gu": "guj",
        "he": "heb",
        "hi": "hin",
        "hr": "hrv",
        "hu": "hun",
        "hy": "hye arm",
        "id": "ind",
        "it": "ita",
        "ja": "jpn",
        "ka": "kat geo",
        "kk": "kaz",
        "kn": "kan",
        "ko": "kor",
        "lt": "lit",
        "lv": "lav lvs",
        "mk": "mkd mac",
        "ml": "mal",
        "mr": "mar",
        "my": "mya bur",
        "nl": "nld dut",
        "no": "nor nob nno nb nn",
        "or": "ory ori",
        "pa": "pan",
        "pl": "pol",
        "pt": "por",
        "ro": "ron rum",
        "ru": "rus",
        "sk": "slk slo",
        "sl": "slv",
        "sq": "sqi alb als",
        "sr": "srp",
        "sv": "swe",
        "ta": "tam",
        "te": "tel",
        "th": "tha",
        "tr": "tur",
        "uk": "ukr",
        "ur": "urd",
        "vi": "vie",
        "zh": "zho chi cmn yue",
    }.items()
    for code in codes.split()
}


def always(sentence: str) -> bool:
    """It fits."""
    return True


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as the sentences that are translated, and what stands around them: gaps[0], sentence 0, gaps[1], …,
    gaps[n].

    `gaps` are one more than `sentences`. `escapes`: how the translation of each sentence is written where the text is
    markup. There are none where it is written as it is. `wholes`: where tags cut a sentence into several, the whole
    one, in order.
    """

    sentences: tuple[str, ...]
    gaps: tuple[str, ...]
    escapes: tuple[Escape, ...] = ()
    wholes: tuple[Whole, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """What has to be translated: the sentences, and then the wholes."""
        return (*self.sentences, *(whole.text for whole in self.wholes)) if self.wholes else self.sentences

    def joined(self, translations: Sequence[str]) -> str:
        """The text with the translation of each one `asked` in its place. Where it is certain which words of a whole
        belong to its elements, it takes the place of the sentences in it.

        Chinese sentences stand together without a space, but their English translations must not. So one space is put
        into an empty gap where a sentence beside it is of a script without spaces, and neither translation is. Raises
        InputError where the counts differ.
        """
        count = len(self.sentences) + len(self.wholes)
        if len(translations) != count:
            raise InputError(
                f"There are {len(translations)} translations",
                expected=f"{count}, one for each sentence",
                remedy="Give the translation of each sentence.",
            )
        own = translations[: len(self.sentences)]
        escapes: Iterable[Escape] = self.escapes or itertools.repeat(str)
        written = [escape(translation) for translation, escape in zip(own, escapes, strict=False)]
        gaps = self.gaps_between(own)
        parts, at = list[str](), Place(0, 0)

        def between(start: Place, end: Place) -> str:
            return self._between(start, end, gaps, written)

        for whole, translation in zip(self.wholes, translations[len(own) :], strict=True):
            escape = self.escapes[whole.elements[0].number] if self.escapes else str
            placed = whole.written(translation, self.sentences, own, between, escape)
            if placed is not None:
                parts += between(at, whole.start), placed
                at = whole.end
        return "".join((*parts, between(at, Place(len(own), len(gaps[-1])))))

    def _between(self, start: Place, end: Place, gaps: Sequence[str], written: Sequence[str]) -> str:
        """What stands between two places, with these gaps and translations."""
        last = gaps[end.gap] if end.at == len(self.gaps[end.gap]) else gaps[end.gap][: end.at]
        if start.gap == end.gap:
            return last[start.at :]
        middle = zip(written[start.gap : end.gap], (*gaps[start.gap + 1 : end.gap], last), strict=True)
        return "".join((gaps[start.gap][start.at :], *itertools.chain.from_iterable(middle)))

    def gaps_between(self, translations: Sequence[str]) -> tuple[str, ...]:
        """What stands around the translations, one more than there are. See `joined`."""
        between = (
            self.gap(number, left, right) for number, (left, right) in enumerate(itertools.pairwise(translations))
        )
        return (self.gaps[0], *between, *self.gaps[len(translations) :]) if translations else self.gaps

    def gap(self, number: int, left: str, right: str) -> str:
        """What stands after the sentence of this number, from 0, where translations end and begin so. See `joined`."""
        if self.gaps[number + 1]:
            return self.gaps[number + 1]
        known = left and right and not left[-1].isspace() and not right[0].isspace()
        was_unspaced = _is_unspaced(*self.sentences[number : number + 2])
        return " " if known and was_unspaced and not _is_unspaced(left, right) else ""


def passage(text: str, language: str | None = None, fits: Fits = always) -> Passage:
    """A plain text as a Passage: `passage(text).joined(passage(text).sentences)` is the text.

    Every line break ends a sentence. White space, the mark of a list before a line, and lines and sentences without a
    letter or digit, belong to the gaps. `language` is a code such as de, deu_Latn or de-DE. Where it is unknown or
    None, the rules are those of English. A sentence that does not fit the model, or has more than 2048 characters, is
    cut into several, at white space and after a comma if possible. Raises InputError for what is not valid Unicode,
    and OptionError where the package sentencex is not installed.
    """
    refuse_other(text, None)
    edges, start = [0], 0
    for line in text.splitlines(keepends=True):
        for span in sentence_spans(line, language, fits):
            edges += (start + edge for edge in span)
        start += len(line)
    edges.append(len(text))
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    return Passage(sentences=tuple(pieces[1::2]), gaps=tuple(pieces[::2]))


@contextlib.contextmanager
def naming_sentences() -> Iterator[None]:
    """Errors of lines, where the lines are the sentences of one text, name the sentence."""
    try:
        yield
    except InputError as error:
        if error.line is None:
            raise
        raise InputError(
            f"Sentence {error.line}: {error.got}", expected=error.expected, remedy=error.remedy, option=error.option
        ) from None


def sentence_spans(line: str, language: str | None = None, fits: Fits = always) -> Iterator[tuple[int, int]]:
    """Where each sentence of one line begins and ends, without the white space around it. What has no letter or digit
    is none. See `passage` for the rest.
    """
    for start, end in _sentence_spans(line, language):
        yield from _fitting(line, start, end, fits)


def _fitting(line: str, start: int, end: int, fits: Fits) -> Iterator[tuple[int, int]]:
    """A sentence in as few halves of halves as fit; as it is where it has no place to be cut at."""
    place = -1 if fits(line[start:end]) else _place_to_cut(line[start:end])
    if place < 0:
        yield start, end
        return
    middle = start + place
    first, second = line[start:middle].rstrip(), line[middle:end].lstrip()
    for left, right in ((start, start + len(first)), (end - len(second), end)):
        if _has_words(line[left:right]):
            yield from _fitting(line, left, right, fits)


def _place_to_cut(sentence: str) -> int:
    """Where to cut a sentence in two: after the comma or the like next to its middle, else at white space; -1 where
    there is none.
    """
    middle = len(sentence) // 2
    for mark in (CLAUSE, WHITE):
        places = [found.start() for found in mark.finditer(sentence) if 0 < found.start() < len(sentence) - 1]
        near = [place for place in places if mark is WHITE or middle // 2 <= place <= middle + middle // 2]
        if near:
            return min(near, key=lambda place: abs(place - middle))
    return -1


def _sentence_spans(line: str, language: str | None) -> Iterator[tuple[int, int]]:
    """Those of the rules of a language."""
    if not _has_words(line):
        return
    marker = MARKER.match(line)
    start, segment, code = marker.end() if marker is not None else 0, _segmenter(), _code(language)
    plain = WHITE.sub(" ", line)  # sentencex 1.0.32 panics at other white space before an initial
    while start < len(line):
        window = plain[start : start + LONGEST_SENTENCE]
        found = _segmented(segment, code, window)
        if start + len(window) < len(line):
            found = found[:-1] or [_cut(window)]
        for one in found:
            end = start + len(one)
            if _has_words(one):
                yield end - len(one.lstrip()), start + len(one.rstrip())
            start = end


def _segmented(segment: Segment, code: str, window: str) -> list[str]:
    """The sentences of a window, or all of it as one where sentencex fails: a panic of Rust is no Exception."""
    try:
        return segment(code, window)
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        return [window]


def _cut(window: str) -> str:
    """As much of a sentence that does not end as ends with white space, or all."""
    return window[: window.rfind(" ") + 1] or window


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def _is_unspaced(left: str, right: str) -> bool:
    """Whether two texts that meet are, where they do, of a script without spaces."""
    return UNSPACED.match(left[-1:]) is not None or UNSPACED.match(right[:1]) is not None


def _code(language: str | None) -> str:
    """The code of sentencex for a language."""
    code = re.split(r"[-_]", (language or "").strip("_<> ").lower())[0]
    code = TWO_LETTERS.get(code, code)
    return code if code.isascii() and code.isalpha() and len(code) == len(OTHERWISE) else OTHERWISE


def _segmenter() -> Segment:
    """What cuts a line into sentences, which joined are the line. Raises OptionError."""
    try:
        from sentencex import segment  # type: ignore[import-untyped]  # an extra
    except ImportError:
        raise OptionError(
            "Texts are cut into sentences by the package sentencex, which is not installed",
            expected="the package sentencex",
            remedy="Install it with: pip install 'kvx[serve]'",
        ) from None
    return segment  # type: ignore[no-any-return]
