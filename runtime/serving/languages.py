"""The languages of bundles by the codes that people and clients use: BCP 47, as short as it can be."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvx.runtime.bundle.framing import Languages
from kvx.runtime.errors import OptionError

OTHER_NAMES = {"pb": "pt-br", "zh": "zh-hans", "zt": "zh-hant"}  # that clients of LibreTranslate send
NO_REGION = re.compile(r"[_-]XX$")  # as mBART writes a language of no country
NEAR = 10  # of langcodes' distances: 5 is a language of another country, 10 one in another usual script
LONGEST = 64  # of codes that are looked for, and remembered
WITH_SCRIPT = ("zh",)  # whose scripts readers tell apart


@dataclass(frozen=True, slots=True)
class Side:
    """The languages that a bundle translates from, or to: by their public codes, its own, which are None where it has
    no choice.
    """

    own: Mapping[str, str | None]

    @classmethod
    def of(cls, codes: Iterable[str]) -> Side:
        """Of a bundle's own codes."""
        full = {own: standard(own) for own in codes}
        languages = Counter(tag.partition("-")[0] for tag in full.values())
        public: dict[str, str] = {}
        for own in sorted(full, key=lambda one: one != full[one]):  # codes that are standard stay as they are
            language = full[own].partition("-")[0]
            short = language if languages[language] == 1 and language not in WITH_SCRIPT else full[own]
            public[own if short in public else short] = own
        names = {own: short for short, own in public.items()}
        return cls({names[own]: own for own in full})

    def find(self, code: str) -> str | None:
        """The public code of what somebody calls by this code, if it is there."""
        if code in self.own:
            return code
        if len(code) > LONGEST:
            return None
        asked = code.strip().replace("_", "-").lower()
        known = _lowered(self)
        for name in (OTHER_NAMES.get(asked), asked):
            if name in known:
                return known[name]
        return _nearest(self, OTHER_NAMES.get(asked, asked))

    def __hash__(self) -> int:
        return hash(tuple(self.own.items()))


NO_SIDE = Side({})


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a bundle translates from and to, by public codes."""

    source: Side = NO_SIDE
    target: Side = NO_SIDE

    @classmethod
    def of(cls, languages: Languages, given: tuple[str, str] | None) -> Pairs:
        """Of a bundle with these languages. `given` are those of a bundle that has none to choose from. Raises
        OptionError.
        """
        source, target = languages.source, languages.target
        if given is None:
            return cls(Side.of(source), Side.of(target)) if target else cls()
        sides = [_given(code, codes) for code, codes in zip(given, (source, target), strict=True)]
        return cls(*sides)


def _given(code: str, codes: Mapping[str, int]) -> Side:
    """One language that was given to a bundle, or chosen among its own."""
    if not codes:
        return Side({public_code(code): None})
    found = Side.of(codes)
    public = found.find(code)
    if public is None:
        raise OptionError(
            f"The bundle has no language {code!r}",
            expected=f"one of {len(codes)}, such as {', '.join(list(found.own)[:5])}",
            remedy="Correct the pair before the bundle's folder, or leave it out.",
            option="bundles",
        )
    return Side({public: found.own[public]})


def public_code(code: str) -> str:
    """A code as the service shows it."""
    return next(iter(Side.of([code]).own))


@functools.cache
def standard(code: str) -> str:
    """A bundle's code as BCP 47 has it; one that is none stays as it is."""
    import langcodes

    try:
        tag = langcodes.standardize_tag(NO_REGION.sub("", code), macro=True)
    except ValueError:
        return code
    return tag if langcodes.Language.get(tag).is_valid() else code


@functools.cache
def name_of(code: str) -> str:
    """The English name of a language; its code where it has none."""
    import langcodes

    try:
        language = langcodes.Language.get(code)
        return language.display_name() if language.is_valid() else code
    except ValueError:
        return code


@functools.lru_cache(maxsize=256)
def _lowered(side: Side) -> dict[str, str]:
    """Public codes and the bundle's own, in lower case, with the public codes that they stand for."""
    found = {own.replace("_", "-").lower(): public for public, own in side.own.items() if own is not None}
    return found | {public.lower(): public for public in side.own}


@functools.lru_cache(maxsize=4096)
def _nearest(side: Side, code: str) -> str | None:
    import langcodes

    full = {standard(own or public): public for public, own in side.own.items()}
    try:
        found = langcodes.closest_supported_match(code, [tag for tag in full if _is_tag(tag)], max_distance=NEAR)
    except ValueError:
        return None
    return full.get(found or "")


def _is_tag(code: str) -> bool:
    import langcodes

    return langcodes.tag_is_valid(code)
