"""Which languages a text is translated from and to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from kvx.runtime.bundle.framing import LanguageIds
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.errors import InputError, OptionError

Side = Literal["source", "target"]
Language = str | Iterable[str | None] | None  # one for all texts, or one for each

NEAREST = 5
MARKED = re.compile(r">>([^<>\s]+)<<")  # how OPUS-MT's multilingual models have it at the beginning of a text


class LanguageReader:
    """The languages of a bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self._languages = manifest.languages
        self._places = manifest.framing.places

    def check(self, source: Language, target: Language) -> None:
        """Raises OptionError for a language of all texts that is missing or unknown."""
        for side, language in (("source", source), ("target", target)):
            missing = language is None and not self._languages.marked
            if missing or isinstance(language, str):
                self._id(side, language, None)  # type: ignore[arg-type]  # a str, or None

    def read(self, text: str, source: str | None, target: str | None, number: int) -> tuple[LanguageIds, str]:
        """The ids of a text's languages, and the text without the mark of its target, where it has one.

        Raises OptionError, or InputError for the text of this number, for a language that is missing, unknown or
        contradicted by the mark.
        """
        marked = MARKED.match(text) if self._languages.marked else None
        if marked is not None:
            text = text[marked.end() :]
            if target not in (None, marked[1]):
                got = f"The text is marked for {marked[1]!r}, but `target_language` is {target!r}"
                raise _refusal("target", (got, "one language to translate to", "Leave one of them out."), number)
            target = marked[1]
        return LanguageIds(self._id("source", source, number), self._id("target", target, number)), text

    def _id(self, side: Side, code: str | None, number: int | None) -> int | None:
        codes: Mapping[str, int] = getattr(self._languages, side)
        chosen = code if code is not None else getattr(self._languages, f"default_{side}")
        if chosen in codes:
            return codes[chosen]
        if chosen is None and f"{side}_language" not in self._places:
            return None
        raise _refusal(side, _unknown(side, chosen, codes), number)


def _unknown(side: Side, code: str | None, codes: Mapping[str, int]) -> tuple[str, str, str]:
    """What is wrong with a language that is not among the codes, what is expected, and the remedy."""
    option = f"`{side}_language`"
    if not codes:
        got = f"{option} is {code!r}, but this model has no languages of the {side} to choose from"
        return got, f"no {option}", "Leave it out."
    expected = expected_code(code, codes)
    if code is None:
        return f"There is no {option}", expected, f"Name the language of the {side}."
    return f"The model has no {side} language {code!r}", expected, "Correct the code."


def expected_code(code: str | None, codes: Mapping[str, int]) -> str:
    """What completes "Expected …" where a code is not among these."""
    return f"one of {len(codes)} codes, {_nearest(code, codes)}" if codes else "no language: the model has none"


def _nearest(code: str | None, codes: Mapping[str, int]) -> str:
    """Codes like this one, or else the first, in words."""
    lowered = {one.lower(): one for one in codes}
    near = difflib.get_close_matches((code or "").lower(), lowered, NEAREST, cutoff=0.4)
    shown = [lowered[one] for one in near] or list(codes)[:NEAREST]
    return f"{'such as' if not near else 'the nearest being'} {', '.join(shown)}"


def _refusal(side: Side, words: tuple[str, str, str], number: int | None) -> InputError | OptionError:
    (got, expected, remedy), option = words, f"{side}_language"
    if number is None:
        return OptionError(got, expected=expected, remedy=remedy, option=option)
    return InputError(got, expected=expected, remedy=remedy, option=option, line=number)
