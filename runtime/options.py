"""What may be asked of a translation: one frozen object for the library and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack, get_args

import numpy as np

from kvx.runtime.bundle.framing import MOST_PREFIX
from kvx.runtime.bundle.manifest import DEFAULTABLE, Default
from kvx.runtime.decoding.filters import (
    Ban,
    EndPenalty,
    Filter,
    Filters,
    LeastTokens,
    NoRepeatedNgrams,
    RepetitionPenalty,
    Suppress,
)
from kvx.runtime.decoding.search import BeamRules, BeamSearch, Greedy, Sampling
from kvx.runtime.errors import OptionError
from kvx.runtime.rules import (
    Option,
    Problem,
    Rule,
    choice,
    count,
    described,
    encodable,
    flag,
    number,
    path,
    refuse,
    wrong_value,
    wrong_values,
)
from kvx.runtime.text.sources import OnLong
from kvx.runtime.text.targets import Target, TargetReader

Search = Greedy | BeamSearch | Sampling

GREEDY = Greedy()

MOST_CACHE_BYTES = 2**50
SEARCHES = Rule("Greedy(), BeamSearch(…) or Sampling(…)", lambda value: isinstance(value, get_args(Search)))
PREFIX = Rule(
    "a text or a sequence of ids", lambda value: isinstance(value, str | Sequence) and not isinstance(value, bytes)
)
PIECES = Rule(
    "a tuple of pieces or ids",
    lambda value: isinstance(value, tuple | list) and all(isinstance(one, str | int) for one in value),
)
TARGETS = Rule(
    "a tuple of texts or of sequences of ids",
    lambda value: isinstance(value, tuple | list) and all(PREFIX.holds(one) for one in value),
)
LANGUAGE = Rule(
    "the code of a language, or a tuple of such codes, one for each text",
    lambda value: (
        isinstance(value, str)
        or (isinstance(value, tuple | list) and all(isinstance(one, str | None) for one in value))
    ),
)
CALLABLES = Rule("a sequence of callables", lambda value: isinstance(value, tuple) and all(map(callable, value)))


class TranslateKeywords(TypedDict, total=False):
    """What TranslateOptions takes, for type checkers; what each of them is for stands with its field."""

    search: Search
    beam_size: int
    n_best: int | None
    length_penalty: float | None
    early_stopping: bool | None
    patience: float | None
    beam_rules: BeamRules | None
    samples: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    source_language: str | Sequence[str | None] | None
    target_language: str | Sequence[str | None] | None
    text_prefix: str | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    prefix: Target | None
    suppress: Sequence[str | int]
    banned: Sequence[Target]
    no_repeated_ngrams: int | None
    repetition_penalty: float | None
    end_penalty: float | None
    end_at_limit: bool
    filters: Sequence[Filter]
    shortlist: str | Path | None
    on_long: OnLong
    scores: bool
    align: bool
    replace_unknown: bool
    window: int | None
    rows: int | None
    workers: int | None
    cache_bytes: int | None


class _Remembered:
    """Which options somebody has set, and from which files others are, where a bundle has defaults of its own."""

    __slots__ = ("given", "origins")
    given: frozenset[str]
    origins: Mapping[str, str]

    def _remember(self, given: Iterable[str], origins: Mapping[str, str]) -> None:
        object.__setattr__(self, "given", frozenset(given))
        object.__setattr__(self, "origins", origins)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class TranslateOptions(_Remembered):
    """How to translate. Raises one OptionError that names everything unknown or contradictory.

    `search` is Greedy(), BeamSearch(size) or Sampling(). Instead of it, or to change it, its fields may be given as
    keywords: `beam_size`, `n_best`, `length_penalty`, `early_stopping` and `patience` of beams, `samples`,
    `temperature`, `top_k`, `top_p` and `seed` of samples.

    `filters` are further constraints, callables that change the logits [n, V] of the active rows in place. They come
    after those that the other options describe, in their order. `given` are the options that somebody has set,
    `origins` the files that others are from, where a bundle has defaults of its own. docs/options.md has all options
    with their rules.
    """

    search: Annotated[Search, Option(SEARCHES, "How targets are searched for.", hidden=True)] = GREEDY
    source_language: Annotated[
        str | Sequence[str | None] | None,
        Option(
            LANGUAGE,
            "The language of the texts, by its code. `kvx inspect` lists the codes of a bundle.",
            unset="the bundle's default",
            flags=("--from",),
        ),
    ] = None
    target_language: Annotated[
        str | Sequence[str | None] | None,
        Option(
            LANGUAGE,
            "The language to translate to, by its code.",
            unset="the bundle's default",
            flags=("--to",),
        ),
    ] = None
    text_prefix: Annotated[
        str | None,
        Option(
            encodable(MOST_PREFIX),
            'Put this before every text, as in "translate English to German: ". Models of the T5 family are told so '
            "what to do.",
            unset="the bundle's own, if it has one",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Option(
            count(),
            "The longest translation, in tokens, the end token included. What is longer is cut there.",
            unset="the bundle's limit",
        ),
    ] = None
    min_new_tokens: Annotated[
        int | None, Option(count(), "The shortest translation, in tokens, the end token included.", unset="1")
    ] = None
    prefix: Annotated[Target | None, Option(PREFIX, "Begin every translation with this text.")] = None
    suppress: Annotated[
        tuple[str | int, ...], Option(PIECES, "Never generate this piece of the target vocabulary. May be repeated.")
    ] = ()
    banned: Annotated[
        tuple[Target, ...],
        Option(
            TARGETS,
            "Never generate this text, as the tokenizer splits it into pieces. Other spellings or splits of it may "
            "still come. May be repeated.",
            flags=("--ban",),
        ),
    ] = ()
    no_repeated_ngrams: Annotated[
        int | None, Option(count(), "Never generate the same n-gram twice in a translation; this number is n.")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Option(
            number(0.001, 1000),
            "Above 1, tokens that the translation already contains become less probable; below 1, more probable.",
            unset="1.0",
        ),
    ] = None
    end_penalty: Annotated[
        float | None,
        Option(
            number(-1_000_000, 1_000_000),
            "Take this from the logit of the end token at each step. Above 0, translations get longer.",
            unset="0.0",
        ),
    ] = None
    end_at_limit: Annotated[
        bool,
        Option(flag(), "Let the end token stand at the limit of new tokens, in the place of any other."),
    ] = False
    filters: Annotated[tuple[Filter, ...], Option(CALLABLES, "Further constraints, as callables.", hidden=True)] = ()
    shortlist: Annotated[
        str | Path | None,
        Option(
            path(),
            "Choose only among the target pieces that this file lists for the source, which is faster. `kvx "
            "shortlist` makes the file; the bundle must be exported for shortlists.",
        ),
    ] = None
    on_long: Annotated[
        OnLong,
        Option(
            choice(get_args(OnLong)),
            "What to do with a source of more tokens than the model has positions: stop with an error, or cut the "
            "source and say so.",
        ),
    ] = "error"
    scores: Annotated[
        bool,
        Option(
            flag(), "Also give each translation's log-probability: the sum over its tokens, as a natural logarithm."
        ),
    ] = False
    align: Annotated[
        bool,
        Option(
            flag(),
            "Also give the source piece that each token attends to most. The bundle must be exported with attention.",
        ),
    ] = False
    replace_unknown: Annotated[
        bool,
        Option(
            flag(),
            "Replace each unknown token by the source word that it attends to most. The bundle must be exported with "
            "attention.",
        ),
    ] = False
    window: Annotated[
        int | None,
        Option(
            count(), "Texts that are read ahead and sorted by length together.", unset="8 for each row", hidden=True
        ),
    ] = None
    rows: Annotated[
        int | None,
        Option(
            count(),
            "The batch size of each worker. A text takes one row, or one for each of its beams.",
            unset="64, or as many as the cache has room for",
        ),
    ] = None
    workers: Annotated[
        int | None,
        Option(
            count(),
            "Decode in this many loops side by side, which share the threads.",
            unset="one for each thread on the CPU with onnx, 1 otherwise and for texts given as arguments",
        ),
    ] = None
    cache_bytes: Annotated[
        int | None,
        Option(
            count(MOST_CACHE_BYTES),
            "The most memory that the key-value caches of all workers may take together, in MiB.",
            unset="1024",
            flags=("--cache-mb",),
            unit=2**20,
        ),
    ] = None

    def __init__(self, **keywords: Unpack[TranslateKeywords]) -> None:
        given: dict[str, Any] = dict(keywords)
        _refuse_unknown(given)
        self._remember(_set_by(given), {})
        flat = {name: given.pop(name) for name in SEARCH_OPTIONS if name in given}
        for one in fields(self):
            value = given.get(one.name, one.default)
            object.__setattr__(self, one.name, tuple(value) if isinstance(value, list | np.ndarray) else value)
        problems = [*wrong_values(self), *_wrong_search_values(flat)]
        if not problems:
            search, problems = _searched(self.search, flat)
            object.__setattr__(self, "search", search)
        refuse(problems or self._contradictions())

    def __getstate__(self) -> list[object]:
        """All fields, and what is remembered beside them."""
        return [getattr(self, name) for name in (*(one.name for one in fields(self)), *_Remembered.__slots__)]

    def __setstate__(self, state: list[object]) -> None:
        names = (*(one.name for one in fields(self)), *_Remembered.__slots__)
        for name, value in zip(names, state, strict=True):
            object.__setattr__(self, name, value)

    def changed(self, **changes: Unpack[TranslateKeywords]) -> TranslateOptions:
        """These options with some others. Keywords of a search change the search that is there."""
        if not changes:
            return self
        own: TranslateKeywords = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[assignment]
        own.update(changes)
        changed = TranslateOptions(**own)
        given = self.given | {name for name, value in changes.items() if value is not None}
        changed._remember(given, {name: one for name, one in self.origins.items() if name not in changes})
        return changed

    def resolved(self, defaults: Mapping[str, Default], **changes: Unpack[TranslateKeywords]) -> TranslateOptions:
        """These options with the changes, and with a bundle's defaults for what neither names.

        Beams are not the default of who asks for another search. `origins` tells for each option that is a default
        which file of the checkpoint it is from. Raises OptionError.
        """
        asked = self.given | {name for name, value in changes.items() if value is not None}
        size = changes.get("beam_size", self.search.beams if asked & {"search", "beam_size"} else 2)
        own_search = "search" in asked or not asked.isdisjoint(SAMPLING_OPTIONS) or size == 1
        taken = {
            name: default
            for name, default in defaults.items()
            if name not in asked and name in DEFAULTABLE and not (own_search and name in BEAM_OPTIONS)
        }
        if "patience" in asked:
            taken = {name: one for name, one in taken.items() if name not in ("early_stopping", "beam_rules")}
        values: TranslateKeywords = {name: default.value for name, default in taken.items()}  # type: ignore[assignment]
        values.update(changes)
        limit = values.get("max_new_tokens") or self.max_new_tokens
        if "min_new_tokens" in taken and limit is not None:
            values["min_new_tokens"] = min(taken["min_new_tokens"].value, limit)
        found = self.changed(**values)
        found._remember(asked, {name: default.origin for name, default in taken.items()})
        return found

    @property
    def with_attention(self) -> bool:
        """Whether the weights of the cross-attention are needed."""
        return self.align or self.replace_unknown

    def _contradictions(self) -> Iterator[Problem]:
        beams = self.search.beams
        if self.rows is not None and self.rows < beams:
            yield Problem("rows", f"`beam_size` is {beams}, more than `rows` ({self.rows})", "a row for every beam")
        if self.min_new_tokens is not None and self.min_new_tokens > (self.max_new_tokens or self.min_new_tokens):
            got = f"`min_new_tokens` is {self.min_new_tokens}, more than `max_new_tokens` ({self.max_new_tokens})"
            yield Problem("min_new_tokens", got, "`min_new_tokens` up to `max_new_tokens`")


def _set_by(keywords: Mapping[str, Any]) -> set[str]:
    """The options that keywords set. dataclasses.replace gives all of them, also those that nobody has changed."""
    defaults = {one.name: one.default for one in fields(TranslateOptions)}
    same = defaults if defaults.keys() <= keywords.keys() else {}
    named = (name for name, value in keywords.items() if value is not None)
    return {name for name in named if name not in same or keywords[name] is not same[name]}


def filters_of(options: TranslateOptions, reader: TargetReader, never: tuple[int, ...] = ()) -> Filters:
    """The filters that options describe, their texts read as pieces, and that for ids that `never` come. The least
    length comes last: it gives way where the others leave nothing but eos. Raises OptionError for what the vocabulary
    does not have.
    """
    filters: list[Filter] = [Suppress(never)] if never else []
    if options.repetition_penalty not in (None, 1.0):
        filters.append(RepetitionPenalty(options.repetition_penalty))
    if options.end_penalty:
        filters.append(EndPenalty(options.end_penalty))
    if options.suppress:
        filters.append(Suppress(reader.pieces(options.suppress, "suppress")))
    if options.banned:
        filters.append(Ban(tuple(reader.sequence(one, "banned") for one in options.banned)))
    if options.no_repeated_ngrams is not None:
        filters.append(NoRepeatedNgrams(options.no_repeated_ngrams))
    filters.extend(options.filters)
    if options.min_new_tokens is not None and options.min_new_tokens > 1:
        filters.append(LeastTokens(options.min_new_tokens))
    in_place = isinstance(options.search, Greedy) and not options.scores and len(filters) == bool(never)
    return Filters(tuple(filters), in_place=in_place)


def options_or_default(options: TranslateOptions | None) -> TranslateOptions:
    """The options, or those of a plain translation for None. Raises OptionError for anything else."""
    if options is not None and not isinstance(options, TranslateOptions):
        raise OptionError(
            f"The options are {options!r:.60}",
            expected="TranslateOptions(…)",
            remedy="Make them with TranslateOptions(**options), or give them as keyword arguments.",
        )
    return options or PLAIN


def _search_options(search: type) -> dict[str, Option]:
    """The described fields of a search, by the keywords that they are as options of a translation."""
    return {option.keyword or name: option for name, option in described(search).items()}


BEAM_OPTIONS, SAMPLING_OPTIONS = _search_options(BeamSearch), _search_options(Sampling)
SEARCH_OPTIONS = BEAM_OPTIONS | SAMPLING_OPTIONS
SEARCH_FIELDS = {  # by the keyword of an option
    option.keyword or name: name for search in (BeamSearch, Sampling) for name, option in described(search).items()
}
OPTIONS = SEARCH_OPTIONS | described(TranslateOptions)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raises OptionError for keywords that are no options, with the nearest one."""
    for name in given.keys() - OPTIONS.keys():
        near = difflib.get_close_matches(name.replace("num_", "").replace("beams", "beam_size"), OPTIONS, 1)
        raise OptionError(
            f"There is no option `{name}`",
            expected=f"one like `{near[0]}`" if near else "one of those that TranslateOptions has",
            remedy="Correct its name or leave it out.",
            option=name,
        )


def _wrong_search_values(flat: Mapping[str, Any]) -> Iterator[Problem]:
    for name, value in flat.items():
        if value is not None or name == "beam_size":
            yield from wrong_value(name, value, SEARCH_OPTIONS[name].rule)


def _searched(base: Search, flat: Mapping[str, Any]) -> tuple[Search, list[Problem]]:
    """The search that keywords make of another, and what contradicts itself in it. None stands for the default."""
    if not flat:
        return base, []
    size = flat.get("beam_size", base.beams)
    samples = flat.get("samples", base.samples if isinstance(base, Sampling) else None)
    own = BEAM_OPTIONS if size > 1 else SAMPLING_OPTIONS if samples is not None else {}
    set_ = {name: value for name, value in flat.items() if value is not None}
    problems = list(_strays(set_, own, beams=size > 1, sampling=samples is not None))
    if size > 1 and samples is not None:
        problems.append(Problem("samples", f"`samples` is {samples} and `beam_size` is {size}", "one of the two"))
    kind: type[BeamSearch | Sampling] = BeamSearch if size > 1 else Sampling
    kept = {field.name: getattr(base, field.name) for field in fields(base)} if isinstance(base, kind) else {}
    kept |= {SEARCH_FIELDS[name]: value for name, value in set_.items() if name in own}
    reset = {SEARCH_FIELDS[name] for name, value in flat.items() if value is None}
    try:
        return (
            kind(**{name: value for name, value in kept.items() if name not in reset}) if own else Greedy()
        ), problems
    except OptionError as error:
        return base, [*problems, Problem(error.option or "", error.got, error.expected)]


def _strays(given: Mapping[str, Any], own: Mapping[str, Option], *, beams: bool, sampling: bool) -> Iterator[Problem]:
    """Options of a search that is not the one asked for."""
    for name, value in given.items():
        if name in own or name in ("beam_size", "samples"):
            continue
        if name in BEAM_OPTIONS and not beams:
            yield Problem(
                name, f"`{name}` is {value}, but there are no beams", f"`{name}` only with `beam_size` above 1"
            )
        if name in SAMPLING_OPTIONS and not sampling:
            yield Problem(name, f"`{name}` is {value}, but nothing is sampled", f"`{name}` only with `samples`")


PLAIN = TranslateOptions()
