"""Translations that differ in the token after a given beginning."""

from __future__ import annotations

from dataclasses import replace

from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.decoding.search import BeamSearch, Greedy
from kvx.runtime.engine.core import Core, core_for, one_language
from kvx.runtime.engine.translating import Progress, translate_all
from kvx.runtime.options import Search, TranslateOptions
from kvx.runtime.rules import count as whole
from kvx.runtime.rules import refuse, wrong_value
from kvx.runtime.text.sources import Source
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

MOST_ALTERNATIVES = 2**16


def alternatives(
    usual: Core,
    text: Source,
    prefix: Target,
    count: int,
    options: TranslateOptions,
    *,
    cancelled: Cancelled | None = None,
    stats: DecodeStats | None = None,
    progress: Progress | None = None,
) -> list[Translation]:
    """See Translator.alternatives."""
    refuse(wrong_value("count", count, whole(MOST_ALTERNATIVES)))
    for name in ("source_language", "target_language"):
        one_language(options, name)
    model = usual.model
    limit = options.max_new_tokens or model.manifest.max_new_tokens
    begun = model.targets.prefix(prefix, limit, None)
    begins = _begins(usual, text, begun, count, options, cancelled, stats)
    if not begins[0].ids:
        return begins[:1]
    eos = model.manifest.framing.eos
    going = [one.ids for one in begins if one.ids[-1] != eos and len(one.ids) < limit]
    plain = options.changed(prefix=None)
    with core_for(model, plain, usual) as core:
        further = translate_all(
            core, [text] * len(going), plain, prefixes=going, cancelled=cancelled, stats=stats, progress=progress
        )
    found = dict(zip(going, further, strict=True))
    return [found.get(one.ids, one) for one in begins]


def _begins(
    usual: Core,
    text: Source,
    begun: tuple[int, ...],
    count: int,
    options: TranslateOptions,
    cancelled: Cancelled | None,
    stats: DecodeStats | None,
) -> list[Translation]:
    """The beginning with each of the most probable next tokens.

    As a beam search for one more token, without a length penalty, which would favour eos, the only one not counted.
    """
    model = usual.model
    too_short = len(begun) + 1 < (options.min_new_tokens or 1)  # for eos, in whose place one more is looked for
    width = min(count + too_short, model.manifest.model["target_vocab_size"])
    search: Search = BeamSearch(width, n_best=width, length_penalty=0.0) if width > 1 else Greedy()
    rows = None if options.rows is None else max(options.rows, width)
    one_more = options.changed(
        search=search,
        rows=rows,
        min_new_tokens=None,
        max_new_tokens=len(begun) + 1,
        end_at_limit=False,
        prefix=begun,
    )
    with core_for(model, one_more, usual) as core:
        (first,) = translate_all(core, [text], one_more, cancelled=cancelled, stats=stats)
    found = [replace(first, others=()), *first.others]
    eos = model.manifest.framing.eos
    return [one for one in found if not (too_short and one.ids[-1:] == (eos,))][:count] or found[:1]
