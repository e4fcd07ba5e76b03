"""`kvx bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvx.commands.console import check_places, spinner
from kvx.commands.machine import Machine, MachineOptions
from kvx.commands.options import BundleArgument, Described, with_described_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import InputError
from kvx.runtime.measuring.bench import BenchOptions, Subject, table
from kvx.runtime.measuring.bench import bench as run
from kvx.runtime.text.lines import read_file, write_lines


@with_described_options
def bench(
    *,
    bundle: BundleArgument,
    text: Annotated[
        Path | None,
        typer.Option(help="Also measure the translation of this file."),
    ] = None,
    options: Annotated[BenchOptions, Described(BenchOptions)],
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the measured curves as an HTML page, and write it to this file.")
    ] = None,
) -> None:
    """Measure how fast a bundle runs on this machine.

    Measures load time, memory, the time of a decoder step by batch size, and the time per token by translation length.
    Steps use all threads together. With --text each worker has one thread, as when kvx translate reads a file.
    """
    from kvx.runtime.measuring.curves import curves_html

    check_places(json_file, plot)
    chosen = Machine.of(Bundle.open(bundle), machine)
    chosen.check()
    subject = Subject(bundle=str(bundle), threads=machine.threads, workers=machine.workers, spin=machine.spin)
    texts = None if text is None else read_file(text)
    if texts == ():
        raise InputError(f"There is no line in {text}", expected="at least one text", remedy="Check the file.")
    with spinner(f"measuring {bundle}"):
        result = run(lambda: chosen.load(bulk=False), subject, texts, options, make_bulk=lambda: chosen.load(bulk=True))
    for line in table(result):
        typer.echo(line)
    if json_file:
        write_lines(json_file, json.dumps(result.to_dict(), indent=1).split("\n"))
    if plot:
        write_lines(plot, curves_html(result).split("\n"))
