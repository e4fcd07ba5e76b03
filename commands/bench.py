"""`kvx bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvx.commands.console import check_places, counting, spinner
from kvx.commands.machine import Machine, MachineOptions
from kvx.commands.options import BundleArgument, Described, with_described_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.measuring.arrivals import ArrivalOptions, arrivals_table, measure_arrivals
from kvx.runtime.measuring.bench import BenchOptions, Subject, table
from kvx.runtime.measuring.bench import bench as run
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.text.lines import read_file, write_lines


@with_described_options
def bench(
    *,
    bundle: BundleArgument,
    text: Annotated[
        Path | None,
        typer.Option(help="Also measure the translation of this file. With --arrivals, its lines are the requests."),
    ] = None,
    options: Annotated[BenchOptions, Described(BenchOptions)],
    load: Annotated[ArrivalOptions, Described(ArrivalOptions)],
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the measured curves as an HTML page, and write it to this file.")
    ] = None,
) -> None:
    """Measure how fast a bundle runs on this machine.

    Measures load time, memory, the time of a decoder step by batch size, and the time per token by translation length.
    Steps use all threads together. With --text each worker has one thread, as when kvx translate reads a file.

    With --arrivals it measures only the load of a service. The lines of --text are its requests, in order and again
    from the first. They arrive at random moments, and are served twice: by the engine, which takes a request at any
    step, and in fixed batches of what has arrived, for comparison. Each worker has one thread.
    """
    check_places(json_file, plot)
    chosen = Machine.of(Bundle.open(bundle), machine)
    chosen.check()
    subject = Subject(bundle=str(bundle), threads=machine.threads, workers=machine.workers, spin=machine.spin)
    if load.arrivals is not None:
        _check_load(text, options)
    texts = None if text is None else read_file(text)
    if texts == ():
        raise InputError(f"There is no line in {text}", expected="at least one text", remedy="Check the file.")
    measured = (
        _bench(chosen, subject, texts, options) if load.arrivals is None else _serve(chosen, subject, texts or (), load)
    )
    for line in measured.lines:
        typer.echo(line)
    if json_file:
        write_lines(json_file, json.dumps(measured.values, indent=1).split("\n"))
    if plot:
        write_lines(plot, measured.page().split("\n"))


class _Measured(NamedTuple):
    """What was measured: its JSON form, its lines to read, and what draws its page."""

    values: dict[str, Any]
    lines: Iterable[str]
    page: Callable[[], str]


def _bench(machine: Machine, subject: Subject, texts: Sequence[str] | None, options: BenchOptions) -> _Measured:
    from kvx.runtime.measuring.curves import curves_html

    with spinner(f"measuring {subject.bundle}"):
        result = run(
            lambda: machine.load(bulk=False), subject, texts, options, make_bulk=lambda: machine.load(bulk=True)
        )
    return _Measured(result.to_dict(), table(result), partial(curves_html, result))


def _serve(machine: Machine, subject: Subject, texts: Sequence[str], load: ArrivalOptions) -> _Measured:
    from kvx.runtime.measuring.arrivals_page import arrivals_html

    with counting(f"measuring {subject.bundle}", load.runs, to_terminal=False) as progress:
        result = measure_arrivals(machine.load(bulk=True), subject, texts, load, progress=progress)
    return _Measured(result.to_dict(), arrivals_table(result), partial(arrivals_html, result))


def _check_load(text: Path | None, options: BenchOptions) -> None:
    """Raises OptionError where the load of a service has no texts, or options that it does not measure by."""
    if text is None:
        raise OptionError(
            "`arrivals` needs texts", expected="a file of requests", remedy="Add `text`.", option="arrivals"
        )
    plain = BenchOptions()
    refuse(
        Problem(field.name, f"`{field.name}` has no effect with `arrivals`", f"no `{field.name}`")
        for field in fields(options)
        if getattr(options, field.name) != getattr(plain, field.name)
    )
