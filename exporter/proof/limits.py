"""The options of a proof: its limits, and the text on which translations are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from kvx.runtime.bundle.precision import CODED_CACHE, PRECISIONS, Limits, Precision
from kvx.runtime.rules import Option, Problem, Rule, count, number, path, refuse, wrong_values

MOST_STEPS = 10_000
LARGEST_SEED = 2**63 - 1
TO_ONE = number(0, 1, above=True)
SHARE = Rule("a number above 0 and below 1", lambda value: TO_ONE.holds(value) and value < 1)


def by_precision(limit: str, *, reduced: bool = False) -> str:
    """The default of a limit in words, for every precision or for those with fewer bits."""
    names = [name for name in get_args(Precision) if PRECISIONS[name].reduced or not reduced]
    return ", ".join(f"{name} {getattr(PRECISIONS[name].limits, limit):g}" for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How an export is compared with eager PyTorch. Limits that are None are those of the precision.

    Tolerances are in units of the largest eager value of a tensor or of 1, whichever is larger, but of 0.5 for
    attention, whose weights are below 1. Raises OptionError.
    """

    tolerance: Annotated[
        float | None,
        Option(
            SHARE,
            "The largest difference from eager PyTorch that passes, as a share of the largest value of a tensor, or "
            "of 1 if that is larger.",
            unset=by_precision("tolerance"),
        ),
    ] = None
    equal_lines: Annotated[
        float | None,
        Option(
            number(0, 1),
            "The least share of the lines of `verify_text`, from 0 to 1, whose translations must equal those of "
            "eager PyTorch. For fewer bits than fp32.",
            unset=by_precision("equal_lines", reduced=True),
        ),
    ] = None
    bleu_lost: Annotated[
        float | None,
        Option(
            number(0, 100),
            "The most BLEU points that may be lost against `verify_reference`. For fewer bits than fp32.",
            unset=by_precision("bleu_lost", reduced=True),
        ),
    ] = None
    verify_text: Annotated[
        Path | None,
        Option(path(), "Also translate the lines of this file, and compare them with what eager PyTorch gives."),
    ] = None
    verify_reference: Annotated[
        Path | None,
        Option(
            path(),
            "Reference translations of `verify_text`, one per line, against which to measure how much BLEU is lost.",
        ),
    ] = None
    steps: Annotated[int, Option(count(MOST_STEPS), "Compare this number of decoder steps.", hidden=True)] = 30
    seed: Annotated[
        int, Option(count(LARGEST_SEED, least=0), "Draw the inputs of the comparison from this seed.", hidden=True)
    ] = 0

    def __post_init__(self) -> None:
        refuse(wrong_values(self))

    def limits(self, precision: Precision, *, coded_cache: bool = False) -> Limits:
        """The limits, with the precision's own where none is set, and those of a cache in codes."""
        default = PRECISIONS[precision].limits
        if coded_cache:
            default = default.with_those(CODED_CACHE)
        return Limits(
            default.tolerance if self.tolerance is None else self.tolerance,
            default.equal_lines if self.equal_lines is None else self.equal_lines,
            default.bleu_lost if self.bleu_lost is None else self.bleu_lost,
            default.neighbours,
        )

    def without_effect(self, precision: Precision, *, coded_cache: bool = False) -> Iterator[Problem]:
        """The limits and files that would judge nothing, and what they need."""
        missing = [
            *(["without `verify_text`"] if self.verify_text is None else []),
            *([] if PRECISIONS[precision].reduced or coded_cache else [f"with `precision` {precision}"]),
        ]
        for name in ("verify_reference", "equal_lines") if missing else ():
            if getattr(self, name) is not None:
                yield Problem(
                    name,
                    f"`{name}` has no effect {' and '.join(missing)}",
                    f"`{name}` only with fewer bits and `verify_text`",
                )
        if self.bleu_lost is not None and self.verify_reference is None:
            yield Problem(
                "bleu_lost",
                "`bleu_lost` has no effect without `verify_reference`",
                "`bleu_lost` only with `verify_reference`",
            )
