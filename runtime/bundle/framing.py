"""How ids are laid around a text: what a model was trained to see before, after and instead of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, get_args

Place = Literal["source_language", "target_language"]
Framed = int | Place  # an id, or the place of a language's id

PLACES: tuple[Place, ...] = get_args(Place)
MOST_FRAMED = 64  # ids on each side of a text
MOST_PREFIX = 10_000  # characters of what stands before every text


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids of a tokenizer's control pieces."""

    pad: int
    bos: int
    eos: int


class LanguageIds(NamedTuple):
    """The ids of the languages that a text is translated from and to; None where the model has none."""

    source: int | None = None
    target: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """The ids around a text.

    A source is `prefix`, the pieces of `text_prefix` and its text together, `suffix`. A target begins with `start`,
    which is fed and never chosen, then with the `forced` ids, which are not chosen either, and ends with `eos`. `pad`
    fills sources up. The ids of `never` do not come in a target.
    """

    prefix: tuple[Framed, ...]
    suffix: tuple[Framed, ...]
    start: Framed
    eos: int
    pad: int
    forced: tuple[Framed, ...] = ()
    never: tuple[int, ...] = ()
    text_prefix: str = ""

    @classmethod
    def plain(cls, source: SpecialIds, target: SpecialIds) -> Self:
        """Bos before every text and eos after it."""
        return cls(prefix=(source.bos,), suffix=(source.eos,), start=target.bos, eos=target.eos, pad=source.pad)

    @property
    def around(self) -> int:
        """How many ids a source has beside its pieces."""
        return len(self.prefix) + len(self.suffix)

    def source_ids(self, pieces: Iterable[int], languages: LanguageIds) -> tuple[int, ...]:
        """The ids of a text's pieces → those for the encoder."""
        return (*_placed(self.prefix, languages), *pieces, *_placed(self.suffix, languages))

    def start_ids(self, languages: LanguageIds) -> tuple[int, ...]:
        """The ids that a target begins with, none of which is chosen."""
        return _placed((self.start, *self.forced), languages)

    @property
    def places(self) -> frozenset[Place]:
        """The languages that have a place somewhere."""
        held = (*self.prefix, *self.suffix, self.start, *self.forced)
        return frozenset(one for one in held if not isinstance(one, int))

    def problems(self, source_vocab_size: int, target_vocab_size: int) -> Iterator[str]:
        """The fields that name ids beyond the vocabularies, or anything but ids and places of languages."""
        source, target = range(source_vocab_size), range(target_vocab_size)
        for name, values, ids in (
            ("prefix", self.prefix, source),
            ("suffix", self.suffix, source),
            ("start", (self.start,), target),
            ("forced", self.forced, target),
        ):
            if len(values) > MOST_FRAMED or not all(one in PLACES or _is_in(one, ids) for one in values):
                yield name
        for name, plain, ids in (
            ("eos", (self.eos,), target),
            ("pad", (self.pad,), range(min(source_vocab_size, target_vocab_size))),
            ("never", self.never, target),
        ):
            if not all(_is_in(one, ids) for one in plain):
                yield name
        if not isinstance(self.text_prefix, str) or len(self.text_prefix) > MOST_PREFIX:
            yield "text_prefix"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Those that a manifest holds. Raises KeyError and TypeError."""
        lists = {name: tuple(values[name]) for name in ("prefix", "suffix", "forced", "never")}
        text_prefix = values.get("text_prefix", "")  # which earlier releases do not write
        return cls(start=values["start"], eos=values["eos"], pad=values["pad"], text_prefix=text_prefix, **lists)


@dataclass(frozen=True, slots=True, kw_only=True)
class Languages:
    """The codes of the languages that a text may be in and be translated to, each with the id that stands for it; and
    those that are taken where none is asked for. Texts may be `marked`: begin with the code of their target, >>code<<.
    """

    source: Mapping[str, int] = field(default_factory=dict)
    target: Mapping[str, int] = field(default_factory=dict)
    default_source: str | None = None
    default_target: str | None = None
    marked: bool = False

    @property
    def usual(self) -> LanguageIds:
        """The default languages, or else the first ones: for what needs some text and not a certain one."""
        return LanguageIds(
            self.source.get(self.default_source or next(iter(self.source), "")),
            self.target.get(self.default_target or next(iter(self.target), "")),
        )

    def problems(self, source_vocab_size: int, target_vocab_size: int) -> Iterator[str]:
        """The fields that name ids beyond the vocabularies, or defaults that are not among the codes."""
        for name, codes, size in (
            ("source", self.source, source_vocab_size),
            ("target", self.target, target_vocab_size),
        ):
            if not all(isinstance(code, str) and _is_in(one, range(size)) for code, one in codes.items()):
                yield name
        if type(self.marked) is not bool:
            yield "marked"
        if self.default_source is not None and self.default_source not in self.source:
            yield "default_source"
        if self.default_target is not None and self.default_target not in self.target:
            yield "default_target"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Those that a manifest holds. Raises KeyError and TypeError."""
        return cls(
            source=dict(values["source"]),
            target=dict(values["target"]),
            default_source=values["default_source"],
            default_target=values["default_target"],
            marked=values["marked"],
        )


def _placed(framed: Iterable[Framed], languages: LanguageIds) -> tuple[int, ...]:
    """The ids, those of languages in their places."""
    ids = {"source_language": languages.source, "target_language": languages.target}
    found = tuple(one if isinstance(one, int) else ids[one] for one in framed)
    assert None not in found, "a text whose language has no id"
    return found  # type: ignore[return-value]  # none of them is None


def _is_in(one: object, ids: range) -> bool:
    return type(one) is int and one in ids
