"""What becomes of a text: its translation, made of what a search found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from kvx.runtime.arrays import FloatArray
from kvx.runtime.decoding.results import FinishReason

OPTIONAL = ("log_probabilities", "alignment", "source_tokens")  # in the JSON form only where they were asked for
LEFT_OUT = ("attention", "others")


@dataclass(frozen=True, slots=True)
class Translation:
    """One translated text.

    `ids` are the target ids after those that it begins with, such as bos or a language, eos included where
    `finish_reason` is "end", and at the limit with `end_at_limit`, none where it is "failed"; `tokens` their pieces
    without eos; `score` the sum of `log_probabilities`, the model's own of each id, natural, where asked for;
    `truncated` tells that the source was cut to the model's positions. `others` are the next best ones of a beam
    search, or further samples. Where alignment was asked for, `alignment` has for each of `tokens` the index among
    `source_tokens` of the piece that it attends to most, and `attention` [ids, S] all weights, those of bos and eos or
    what else stands around a text included.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    score: float | None
    finish_reason: FinishReason
    truncated: bool
    log_probabilities: tuple[float, ...] | None = None
    others: tuple[Translation, ...] = ()
    alignment: tuple[int, ...] | None = None
    source_tokens: tuple[str, ...] | None = None
    attention: FloatArray | None = field(default=None, compare=False, repr=False)

    @property
    def hypotheses(self) -> tuple[Translation, ...]:
        """This one and the others."""
        return self, *self.others

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the others in it where there are any, and without attention."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in LEFT_OUT}
        form = {name: value for name, value in named.items() if name not in OPTIONAL or value is not None}
        if self.others:
            form["others"] = [other.to_dict() for other in self.others]
        return form


def strict_json(form: object) -> str:
    """JSON, in which a number that is not finite, such as the logarithm of no probability, is null."""
    try:
        return json.dumps(form, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(form), ensure_ascii=False, allow_nan=False)


def _finite(form: object) -> object:
    if isinstance(form, float):
        return form if math.isfinite(form) else None
    if isinstance(form, dict):
        return {name: _finite(value) for name, value in form.items()}
    return [_finite(value) for value in form] if isinstance(form, list | tuple) else form
