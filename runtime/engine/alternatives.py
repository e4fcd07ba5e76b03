"""Translations that differ in the token after a given beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvx.runtime.decoding.search import BeamSearch, Greedy
from kvx.runtime.engine.call import translate_all
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import Search, TranslateOptions
from kvx.runtime.rules import Problem, refuse, wrong_value
from kvx.runtime.rules import count as whole
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation

MOST_ALTERNATIVES = 2**16


def alternatives(
    model: LoadedModel, text: str, prefix: Target, count: int, options: TranslateOptions
) -> list[Translation]:
    """See Translator.alternatives."""
    refuse([*wrong_value("count", count, whole(MOST_ALTERNATIVES)), *_several_languages(options)])
    limit = options.max_new_tokens or model.manifest.max_new_tokens
    begun = model.targets.prefix(prefix, limit, None)
    begins = _begins(model, text, begun, count, options)
    if not begins[0].ids:
        return begins[:1]
    eos = model.manifest.framing.eos
    going = [one.ids for one in begins if one.ids[-1] != eos and len(one.ids) < limit]
    further = translate_all(model, [text] * len(going), options.changed(prefix=None), prefixes=going)
    found = dict(zip(going, further, strict=True))
    return [found.get(one.ids, one) for one in begins]


def _several_languages(options: TranslateOptions) -> Iterator[Problem]:
    for name in ("source_language", "target_language"):
        if not isinstance(getattr(options, name), str | None):
            yield Problem(name, f"`{name}` has a language for each text, and there is one text", f"one `{name}`")


def _begins(
    model: LoadedModel, text: str, begun: tuple[int, ...], count: int, options: TranslateOptions
) -> list[Translation]:
    """The beginning with each of the most probable next tokens.

    As a beam search for one more token, without a length penalty, which would favour eos, the only one not counted.
    """
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
    (first,) = translate_all(model, [text], one_more)
    found = [replace(first, others=()), *first.others]
    eos = model.manifest.framing.eos
    return [one for one in found if not (too_short and one.ids[-1:] == (eos,))][:count] or found[:1]
