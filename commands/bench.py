"""`kvx bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvx.commands.console import spinner
from kvx.commands.machine import Machine, MachineOptions
from kvx.commands.options import BundleArgument, Described, with_described_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.text.lines import read_file, write_lines


@with_described_options
def bench(
    *,
    bundle: BundleArgument,
    text: Annotated[
        Path | None,
        typer.Option(help="Also translate the lines of this file, in as many decode loops as there are threads."),
    ] = None,
    rows: Annotated[str, typer.Option(help="The numbers of rows to measure, with commas between.")] = "1,8,32,128",
    lengths: Annotated[
        str,
        typer.Option(
            help="The target lengths at which to measure the cost of a token, with commas between. Empty for none."
        ),
    ] = "50,100,200,400,700,1000",
    tokens: Annotated[int, typer.Option(help="The number of steps to measure for each number of rows.")] = 24,
    source_tokens: Annotated[int, typer.Option(help="The length of every source, with bos and eos.")] = 20,
    length_rows: Annotated[int, typer.Option(help="The number of rows at which to measure the cost of a token.")] = 32,
    repeat: Annotated[int, typer.Option(help="How often to measure each number of rows.")] = 5,
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves in this HTML file.")] = None,
) -> None:
    """Measure a bundle on this machine: steps by rows, cost by target length, load time, memory, speed on a file.

    Steps use all threads. For --text the threads are shared by as many decode loops, as for any bulk work.
    """
    from kvx.runtime.measuring import bench as measuring
    from kvx.runtime.measuring.curves import curves_html

    options = measuring.BenchOptions(
        rows=_counts("rows", rows),
        lengths=_counts("lengths", lengths),
        tokens=tokens,
        source_tokens=source_tokens,
        length_rows=length_rows,
        repeat=repeat,
    )
    chosen = Machine.of(Bundle.open(bundle), machine)
    chosen.check()
    subject = measuring.Subject(bundle=str(bundle), threads=machine.threads, workers=machine.workers, spin=machine.spin)
    texts = None if text is None else read_file(text)
    if texts == ():
        raise InputError(f"There is no line in {text}", expected="at least one text", remedy="Check the file.")
    with spinner(f"measuring {bundle}"):
        result = measuring.bench(
            lambda: chosen.load(bulk=False), subject, texts, options, make_bulk=lambda: chosen.load(bulk=True)
        )
    for line in measuring.table(result):
        typer.echo(line)
    if json_file:
        write_lines(json_file, json.dumps(result.to_dict(), indent=1).split("\n"))
    if plot:
        write_lines(plot, curves_html(result).split("\n"))


def _counts(option: str, given: str) -> tuple[int, ...]:
    try:
        return tuple(int(count) for count in given.split(",") if count.strip())
    except ValueError:
        raise OptionError(
            f"`{option}` is {given}",
            expected="numbers with commas between them",
            remedy=f"Correct `{option}`.",
            option=option,
        ) from None
