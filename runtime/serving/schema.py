"""What the native API takes and gives, as types: they read requests, and the description is made of them.

The options of a translation come from their one description, so that a new one is here at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from kvx.runtime.engine.core import OF_THE_ENGINE
from kvx.runtime.engine.scoring import RankBy
from kvx.runtime.options import OPTIONS, TranslateKeywords
from kvx.runtime.rules import Option

AUTO = "auto"
Format = Literal["sentence", "text", "html"]

OF_THE_SERVICE = ("shortlist",)  # a path, and nobody may name the files of a server
LANGUAGES = ("source_language", "target_language")
NOT_ASKED = (*OF_THE_ENGINE, *OF_THE_SERVICE)


def option_fields() -> Iterator[tuple[str, Any, Any]]:
    """The options of a translation that a request may have, as fields of a struct."""
    hints = get_type_hints(TranslateKeywords)
    for name, option in OPTIONS.items():
        if not option.hidden and name not in NOT_ASKED:
            yield name, Annotated[_json_type(hints[name]) | UnsetType, Meta(description=_told(option))], UNSET


def _told(option: Option) -> str:
    unset = "" if option.unset is None else f" Default: {option.unset}."
    return f"{option.help} Expected: {option.rule.expected}.{unset}"


def _json_type(hint: Any) -> Any:  # noqa: ANN401  # annotations have no common type
    """A type of the library as JSON has it: sequences are lists, and arrays of numpy do not come."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kept = [_simple(part) for part in parts if get_origin(part) is not np.ndarray]
    return functools.reduce(lambda one, other: one | other, kept)


def _simple(part: Any) -> Any:  # noqa: ANN401
    if get_origin(part) is Sequence:
        return list[_json_type(get_args(part)[0])]  # type: ignore[misc]
    return type(None) if part is NoneType else part


Texts = Annotated[
    str | list[str | list[int]],
    Meta(description="The text, or a list of texts. A text may also be the ids of its pieces."),
]
ModelName = Annotated[
    str | None, Meta(description="The model's name. By default the first that can translate between the languages.")
]
Deadline = Annotated[
    float | None,
    Meta(description="Seconds after which each text ends as far as it has come, with the finish_reason deadline."),
]

TranslateRequest = msgspec.defstruct(
    "TranslateRequest",
    [
        ("texts", Texts),
        *option_fields(),
        ("model", ModelName, None),
        (
            "format",
            Annotated[
                Format,
                Meta(
                    description="What a text is: one sentence, as the model takes it; a text of any number of lines "
                    "and sentences; or HTML. source_language may be auto."
                ),
            ],
            "sentence",
        ),
        (
            "stream",
            Annotated[bool, Meta(description="Answer with server-sent events: the tokens as they are decided.")],
            False,
        ),
        ("deadline", Deadline, None),
    ],
    namespace={"__doc__": "Texts, and how to translate them."},
    forbid_unknown_fields=True,
    kw_only=True,
    module=__name__,
)

_LANGUAGE_FIELDS = [field for field in option_fields() if field[0] in (*LANGUAGES, "text_prefix", "on_long")]

AlternativesRequest = msgspec.defstruct(
    "AlternativesRequest",
    [
        ("text", Annotated[str, Meta(description="The text to translate: one sentence.")]),
        (
            "prefix",
            Annotated[str | list[int], Meta(description="What all alternatives begin with, as text or target ids.")],
            "",
        ),
        ("count", Annotated[int, Meta(description="How many alternatives.")], 5),
        *(field for field in option_fields() if field[0] != "prefix"),
        ("model", ModelName, None),
    ],
    namespace={"__doc__": "A beginning of a translation, of which the most probable continuations are asked for."},
    forbid_unknown_fields=True,
    kw_only=True,
    module=__name__,
)

ScoreRequest = msgspec.defstruct(
    "ScoreRequest",
    [
        ("texts", Annotated[list[str | list[int]], Meta(description="The source texts.")]),
        (
            "translations",
            Annotated[
                list[str | list[str | list[int]]],
                Meta(description="For each text a translation, or a list of candidates, texts or target ids."),
            ],
        ),
        (
            "by",
            Annotated[RankBy, Meta(description="How candidates are compared: by sums, or by means per token.")],
            "sum",
        ),
        *_LANGUAGE_FIELDS,
        ("model", ModelName, None),
    ],
    namespace={"__doc__": "Translations whose probability is asked for."},
    forbid_unknown_fields=True,
    kw_only=True,
    module=__name__,
)


class Translated(Struct, kw_only=True):
    """One translation, as kvx translate --json has it."""

    text: str
    tokens: list[str]
    ids: list[int]
    score: float | None
    finish_reason: str
    truncated: bool
    log_probabilities: list[float] | UnsetType = UNSET
    others: list[Translated] | UnsetType = UNSET
    alignment: list[int] | UnsetType = UNSET
    source_tokens: list[str] | UnsetType = UNSET


class Sentence(Translated, kw_only=True):
    """A sentence of a text, with its source."""

    source: str


class DetectedLanguage(Struct):
    """A language that was found, and how probable it is, 0 to 1."""

    language: str
    confidence: float


class TranslatedText(Struct, kw_only=True):
    """What became of one text. With format sentence it has the fields of the translation itself; else its text is
    gaps[0] + sentences[0].text + gaps[1] + …, for HTML with the sentences escaped. There are no gaps where a sentence
    of HTML has elements in it: then the sentences are all that were translated, those between tags and after them those
    without tags. The model is null for a text that was found to be in the target language already.
    """

    text: str
    model: str | None
    finish_reason: str
    source_language: str | None = None
    target_language: str | None = None
    detected: DetectedLanguage | UnsetType = UNSET
    pivot: str | UnsetType = UNSET
    gaps: list[str] | UnsetType = UNSET
    sentences: list[Sentence] | UnsetType = UNSET
    tokens: list[str] | UnsetType = UNSET
    ids: list[int] | UnsetType = UNSET
    score: float | UnsetType | None = UNSET
    truncated: bool | UnsetType = UNSET
    log_probabilities: list[float] | UnsetType = UNSET
    others: list[Translated] | UnsetType = UNSET
    alignment: list[int] | UnsetType = UNSET
    source_tokens: list[str] | UnsetType = UNSET


class TranslateResponse(Struct):
    """A translation for each text, in order."""

    translations: list[TranslatedText]


class AlternativesResponse(Struct):
    """Translations that differ in the token after the prefix, the most probable first."""

    model: str
    alternatives: list[Translated]


class Scored(Struct):
    """The log-probability of a translation: natural logarithms, of all tokens, per token, and of each."""

    sum: float
    per_token: float
    tokens: int
    log_probabilities: list[float]


class Ranked(Struct):
    """The candidates of a text: their scores, in order, the index of the best, and its lead over the next."""

    scores: list[Scored]
    best: int
    margin: float | None


class ScoreResponse(Struct):
    """What each text's translations are worth."""

    model: str
    results: list[Ranked]


class NamedLanguage(Struct):
    """A language by its code, BCP 47, and its English name."""

    code: str
    name: str


class Proof(Struct):
    """What the export was found to differ by from eager PyTorch."""

    verified: bool
    max_abs_error: float | None


class ModelDescription(Struct, kw_only=True):
    """A model: which languages it has, its limits, and how it was proven."""

    name: str
    source_languages: list[NamedLanguage]
    target_languages: list[NamedLanguage]
    family: str
    precision: str
    lowering: str
    source_positions: int
    target_positions: int
    max_new_tokens: int
    attention: bool
    proof: Proof | None
    defaults: dict[str, Any]


class Limits(Struct):
    """What one request may have at most."""

    body_bytes: int
    characters: int
    texts: int
    tokens: int | None
    beams: int
    timeout: float


class ModelsResponse(Struct):
    """The models, which languages texts are in through a pivot, and the limits."""

    models: list[ModelDescription]
    pairs: dict[str, list[str]]
    detection: bool
    limits: Limits


class Problem(Struct, kw_only=True, omit_defaults=True):
    """What was wrong (RFC 9457), with the option that it is about and the index of the text, from 0."""

    type: str = msgspec.field(default="about:blank")
    title: str
    status: int
    detail: str
    option: str | None = None
    text: int | None = None


def asked_options(request: Struct) -> dict[str, Any]:
    """The options of a translation that a request has set, by name."""
    found = ((name, getattr(request, name)) for name in request.__struct_fields__ if name in OPTIONS)
    return {name: _tuples(value) for name, value in found if value is not UNSET and value is not None}


def size_of(value: object) -> int:
    """The characters and elements of values, all together: what they cost to read and to keep."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) + len(value) if isinstance(value, list | tuple) else 0


def _tuples(value: object) -> object:
    """Lists as tuples, so that options can be looked up."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
