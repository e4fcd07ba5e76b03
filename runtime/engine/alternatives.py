"""Translations that differ in the token after a given beginning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvx.runtime.options import TranslateOptions, refuse
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

if TYPE_CHECKING:
    from kvx.runtime.translator import Translator

DEFAULTS = TranslateOptions()
OF_THE_LAST_TOKENS = (  # what says how far and by what search a translation goes on, not what its next token may be
    "window",
    "beam_size",
    "n_best",
    "length_penalty",
    "early_stopping",
    "patience",
    "samples",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_new_tokens",
    "max_new_tokens",
    "prefix",
)


def alternatives(
    translator: Translator, text: str, prefix: Target, count: int, options: TranslateOptions
) -> list[Translation]:
    """See Translator.alternatives."""
    refuse([(f"count = {count}", "a count from 1 up")] if count < 1 else [])
    limit = options.max_new_tokens or translator.manifest.max_new_tokens
    begun = translator.targets.prefix(prefix, limit, None)
    begins = _begins(translator, text, begun, count, options)
    if not begins[0].ids:
        return begins[:1]
    eos = translator.manifest.target_ids.eos
    going = [one.ids for one in begins if one.ids[-1] != eos and len(one.ids) < limit]
    further = translator.translate([text] * len(going), replace(options, prefix=None), prefixes=going)
    found = dict(zip(going, further, strict=True))
    return [found.get(one.ids, one) for one in begins]


def _begins(
    translator: Translator, text: str, begun: tuple[int, ...], count: int, options: TranslateOptions
) -> list[Translation]:
    """What is begun, each with one of the most probable next tokens.

    As a beam search for one more token, without a length penalty, which would favour eos, the only one not counted.
    """
    too_short = len(begun) + 1 < (options.min_new_tokens or 1)  # for eos, in whose place one more is looked for
    width = min(count + too_short, translator.manifest.model["target_vocab_size"])
    beams = {"beam_size": width, "n_best": width, "length_penalty": 0.0} if width > 1 else {}
    rows = None if options.rows is None else max(options.rows, width)
    one_more = {"max_new_tokens": len(begun) + 1, "prefix": begun, "rows": rows}
    plain = {name: getattr(DEFAULTS, name) for name in OF_THE_LAST_TOKENS}
    next_only = replace(options, **{**plain, **beams, **one_more})
    (first,) = translator.translate([text], next_only)
    found = [replace(first, others=()), *first.others]
    eos = translator.manifest.target_ids.eos
    return [one for one in found if not (too_short and one.ids[-1:] == (eos,))][:count] or found[:1]
