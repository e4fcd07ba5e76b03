"""Translations, made of what a search found."""

from __future__ import annotations

from dataclasses import replace

from kvx.runtime.bundle.precision import PRECISIONS
from kvx.runtime.decoding.results import Hypothesis, Outcome
from kvx.runtime.engine.request import Request
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.alignment import align, replace_unknown
from kvx.runtime.translation import Translation


def write(request: Request) -> Translation:
    """The translation of a request that is finished, all others of it included, with what its options ask for; an empty
    one where it failed.
    """
    outcomes = request.results if request.ids else None
    if not outcomes:
        return _nothing(request.asked_for)
    first, *others = (_write(request, one, each) for one in outcomes for each in one.hypotheses)
    return replace(first, others=tuple(others)) if others else first


def _write(request: Request, outcome: Outcome, hypothesis: Hypothesis) -> Translation:
    model, options = request.model, request.asked_for
    tokenizer, align_it = model.targets.tokenizer, options.align
    ids = hypothesis.ids[:-1] if hypothesis.ended else hypothesis.ids
    pieces, attention = tokenizer.pieces(ids), hypothesis.attention
    framing = model.manifest.framing
    around = len(framing.prefix), len(framing.suffix)
    alignment = () if attention is None else align(attention[: len(ids)], *around)
    written = tokenizer.decode(ids)
    if options.replace_unknown and tokenizer.unknown_id in ids:
        written = replace_unknown(request.pieces, pieces, ids, tokenizer.unknown_id, alignment, tokenizer.join)
    return Translation(
        text=written,
        tokens=pieces,
        ids=hypothesis.ids,
        score=hypothesis.score,
        finish_reason=outcome.reason(hypothesis),
        truncated=request.truncated,
        log_probabilities=hypothesis.log_probabilities,
        alignment=alignment if align_it else None,
        source_tokens=request.pieces if align_it else None,
        attention=attention if align_it else None,
    )


def _nothing(options: TranslateOptions) -> Translation:
    """The translation of a text without a piece."""
    return Translation(
        text="",
        tokens=(),
        ids=(),
        score=0.0 if options.scores else None,
        finish_reason="end",
        truncated=False,
        log_probabilities=() if options.scores else None,
        alignment=() if options.align else None,
        source_tokens=() if options.align else None,
    )


def not_finite(request: Request) -> InputError:
    """The error of a request for which the model gave numbers that are not finite."""
    precision = request.model.manifest.precision
    if PRECISIONS[precision].element == "float16":
        remedy = "Export the model again with `precision` fp32 or bf16: float16 ends at 65,504."
    else:
        remedy = "Check the weights of the checkpoint, and export it again with `precision` fp32."
    return InputError(
        f"The model, in {precision}, gives numbers for this text that are not finite",
        expected="finite logits",
        remedy=remedy,
        line=request.number,
    )
