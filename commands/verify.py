"""`kvx verify`: the proof of a bundle, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvx.commands.console import reporting, require
from kvx.commands.machine import ready_torch
from kvx.commands.options import BundleArgument

VerifyTextOption = Annotated[
    Path | None, typer.Option(help="Also prove the greedy translations of the lines of this file.")
]
VerifyReferenceOption = Annotated[
    Path | None,
    typer.Option(help="The reference translations of --verify-text, which show how much BLEU fewer bits lose."),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        help="The largest difference from eager PyTorch, relative above 1.  "
        "[default: 1e-4; fp16 0.005, bf16 0.04, int8 0.1, int4 0.25]"
    ),
]
EqualLinesOption = Annotated[
    float | None,
    typer.Option(
        help="The least share of lines that must be translated as eager PyTorch does.  "
        "[default: fp16 0.95, bf16 0.9, int8 0.8, int4 0.4]"
    ),
]
BleuLostOption = Annotated[
    float | None,
    typer.Option(
        help="The most BLEU that may be lost against eager PyTorch.  [default: fp16 0.2, bf16 0.3, int8 0.5, int4 1.0]"
    ),
]


def verify(
    bundle: BundleArgument,
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that it was exported from.")],
    verify_text: VerifyTextOption = None,
    verify_reference: VerifyReferenceOption = None,
    tolerance: ToleranceOption = None,
    equal_lines: EqualLinesOption = None,
    bleu_lost: BleuLostOption = None,
) -> None:
    """Prove a bundle against its checkpoint again: hashes, graphs, translations."""
    ready_torch()
    if verify_reference is not None:
        require("sacrebleu", extra="evaluate")
    from kvx.exporter.proof.bundle import verify as run
    from kvx.exporter.proof.trial import ParityOptions
    from kvx.runtime.bundle.description import describe_parity

    with reporting() as report:
        options = ParityOptions(tolerance=tolerance, equal_lines=equal_lines, bleu_lost=bleu_lost)
        found = run(bundle, checkpoint, options, verify_text, verify_reference, report)
    for line in describe_parity(found.to_dict()):
        typer.echo(line)
    if not found.passed:
        raise typer.Exit(1)
