"""`kvx export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvx.commands.console import reporting, tell
from kvx.commands.machine import ready_torch
from kvx.commands.options import Described, with_described_options
from kvx.exporter.options import ExportOptions
from kvx.exporter.proof.limits import ParityOptions
from kvx.runtime.rules import described
from kvx.runtime.text.lines import output_file


@with_described_options
def export(
    *,
    checkpoint: Annotated[Path, typer.Argument(help=described(ExportOptions)["checkpoint"].help)],
    write_layout: Annotated[
        Path | None,
        typer.Option(help="Draft a layout for a model of your own from its tensors, write it to this file, and stop."),
    ] = None,
    given: Annotated[dict[str, Any], Described(ExportOptions, but=("checkpoint",), build=False)],
    parity: Annotated[ParityOptions, Described(ParityOptions)],
) -> None:
    """Export a checkpoint to a bundle, and prove it.

    A bundle is a folder with everything that translating needs: graphs, weights, tokenizers and a manifest.
    """
    ready_torch(parity)
    if write_layout is not None:
        _draft(checkpoint, write_layout)
        return
    from kvx.exporter.export import export as run
    from kvx.runtime.bundle.description import describe_parity

    options = ExportOptions(checkpoint=checkpoint, parity=parity, **given)
    with reporting() as report:
        manifest = run(options, report)
    for line in describe_parity(manifest.parity, tensors=False):
        tell(line)
    typer.echo(options.folder)


def _draft(checkpoint: Path, output: Path) -> None:
    """Writes a layout that is still to be checked, and says what it could not tell."""
    from kvx.models.importers.detect import draft_of

    text, notes = draft_of(checkpoint)
    with output_file(output) as file:
        file.write(text)
    for note in notes:
        tell(note)
    typer.echo(output)
