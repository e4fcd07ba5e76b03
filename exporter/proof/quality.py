"""What fewer bits cost: an export against the float32 model, in tensors, in translations, in BLEU and chrF."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvx.exporter.precision.halves import peaks
from kvx.exporter.proof.greedy import translations
from kvx.exporter.proof.report import Check
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.measuring.evaluation import corpus_scores

HALF_LARGEST = 65504 / 2  # what float32 may reach where float16 shall, which rounds and has other inputs

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VerificationText:
    """Sources with bos and eos, reference translations of them or none, and what makes text of target ids."""

    sources: Sequence[Ids]
    references: Sequence[str]
    detokenize: Callable[[Ids], str]


def check_range(backend: Backend, model: Transformer, plan: Plan, sources: Sequence[Ids]) -> Check:
    """How large anything gets that float16 has to hold, while float32 translates the sources."""
    with peaks(model) as peak:
        translations(TorchBackend(model, ops=peak), sources, plan)
    detail = f"largest activation {peak.largest:.4g} in {peak.where}, {HALF_LARGEST:.0f} allowed"
    return Check(backend.name, "range of float16", peak.largest <= HALF_LARGEST, detail)


def check_lines(backend: Backend, expected: Mapping[int, Ids], got: Mapping[int, Ids], least: float) -> Check:
    """The share of lines translated to the ids that float32 gives."""
    equal = sum(expected[index] == got[index] for index in expected)
    detail = f"{equal} of {len(expected)} lines equal ({equal / len(expected):.1%}), {least:.0%} wanted"
    return Check(backend.name, "greedy lines of the verification text", equal >= least * len(expected), detail)


def check_scores(
    backend: Backend, expected: Mapping[int, Ids], got: Mapping[int, Ids], text: VerificationText, lost: float
) -> Check:
    """BLEU and chrF of both translations against the references."""
    before, after = (
        corpus_scores([text.detokenize(ids[index]) for index in range(len(text.sources))], text.references)
        for ids in (expected, got)
    )
    fall = before[0] - after[0]
    detail = (
        f"BLEU {before[0]:.2f} in float32, {after[0]:.2f} here, chrF {before[1]:.2f} and {after[1]:.2f}; "
        f"at most {lost:g} of BLEU may be lost"
    )
    return Check(backend.name, "BLEU and chrF against the references", fall <= lost, detail)
