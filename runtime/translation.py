"""What becomes of a text: its translation, made of what a search found."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvx.runtime.arrays import FloatArray
from kvx.runtime.decoding.rows import FinishReason, Hypothesis
from kvx.runtime.decoding.schedule import Outcome
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.alignment import align, replace_unknown
from kvx.runtime.text.sources import SourceText
from kvx.runtime.text.tokenizers.sentencepiece import Tokenizer


@dataclass(frozen=True, slots=True)
class Translation:
    """One translated text.

    `ids` are the target ids after bos, eos included where `finish_reason` is "end"; `tokens` their pieces without
    it; `score` the sum of `log_probabilities`, the model's own of each id, natural, where asked for; `truncated` tells
    that the source was cut to the model's positions. `others` are the next best ones of a beam search, or further
    samples. Where alignment was asked for, `alignment` has for each of `tokens` the index among `source_tokens` of the
    piece that it attends to most, and `attention` [ids, 1 + source tokens + 1] all weights, bos and eos included.
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


@dataclass(frozen=True, slots=True)
class Writer:
    """Makes translations of hypotheses, with what the options ask for."""

    tokenizer: Tokenizer
    options: TranslateOptions

    def write(self, text: SourceText, outcome: Outcome, hypothesis: Hypothesis) -> Translation:
        """The translation that a hypothesis is."""
        tokenizer, align_it = self.tokenizer, self.options.align
        ids = hypothesis.ids[:-1] if hypothesis.ended else hypothesis.ids
        pieces, attention = tokenizer.pieces(ids), hypothesis.attention
        alignment = () if attention is None else align(attention[: len(ids)])
        written = tokenizer.decode(ids)
        if self.options.replace_unknown and tokenizer.unknown_id in ids:
            written = replace_unknown(text.pieces, pieces, ids, tokenizer.unknown_id, alignment, tokenizer.join)
        return Translation(
            text=written,
            tokens=pieces,
            ids=hypothesis.ids,
            score=hypothesis.score,
            finish_reason=outcome.reason(hypothesis),
            truncated=text.truncated,
            log_probabilities=hypothesis.log_probabilities,
            alignment=alignment if align_it else None,
            source_tokens=text.pieces if align_it else None,
            attention=attention if align_it else None,
        )

    def nothing(self) -> Translation:
        """The translation of a text without a piece."""
        return Translation(
            text="",
            tokens=(),
            ids=(),
            score=0.0 if self.options.scores else None,
            finish_reason="end",
            truncated=False,
            log_probabilities=() if self.options.scores else None,
            alignment=() if self.options.align else None,
            source_tokens=() if self.options.align else None,
        )
