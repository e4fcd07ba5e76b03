"""`kvx verify`: the proof of a bundle, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvx.commands.console import drop_output, reporting
from kvx.commands.machine import ready_torch
from kvx.commands.options import BundleArgument, Described, with_described_options
from kvx.exporter.proof.limits import ParityOptions


@with_described_options
def verify(
    *,
    bundle: BundleArgument,
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that the bundle was exported from.")],
    parity: Annotated[ParityOptions, Described(ParityOptions)],
) -> None:
    """Repeat the proof of a bundle against its checkpoint."""
    ready_torch(parity)
    from kvx.exporter.proof.bundle import verify as run
    from kvx.runtime.bundle.description import describe_parity

    with reporting() as report:
        found = run(bundle, checkpoint, parity, report)
    try:
        for line in describe_parity(found.to_dict()):
            typer.echo(line)
    except BrokenPipeError:  # the reader has seen enough; the exit code says the rest
        drop_output()
    if not found.passed:
        raise typer.Exit(1)
