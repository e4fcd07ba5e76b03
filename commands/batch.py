"""`kvx batch`: files of any size in, shards of translations out."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvx.commands.console import BAD_INPUT, say
from kvx.commands.machine import Machine, MachineOptions, open_bundle
from kvx.commands.options import Described, ModelOption, with_described_options
from kvx.commands.translation import OPTIONS_OF_A_TRANSLATION, resolved_options
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.scale.job import BatchOptions
from kvx.runtime.scale.on_ray import ClusterOptions, HeadLostError, run_on_ray

if TYPE_CHECKING:
    from kvx.runtime.bundle.folder import Bundle
    from kvx.runtime.scale.batch import Progress, Summary, Told
    from kvx.runtime.scale.folder import OutputFolder
    from kvx.runtime.scale.job import Job

SHOWN_ERRORS = 3
REDRAW = 0.2  # seconds
REPORT = 60.0  # seconds between lines where stderr is no terminal
FAILED = 1


@with_described_options
def batch(
    *,
    input_: Annotated[
        list[str],
        typer.Option(
            "-i", "--input", help="A file to translate, or a pattern in quotes, as 'data/*.jsonl'. May be repeated."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder of the shards: a new one, or that of the same job.")
    ],
    model: ModelOption = None,
    own: Annotated[BatchOptions, Described(BatchOptions)],
    errors: Annotated[
        Literal["keep", "fail"],
        typer.Option(help="End with exit code 0, or with 1, if rows could not be translated. The others are written."),
    ] = "keep",
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the shards of an earlier job in the folder, and begin again.")
    ] = False,
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    given: Annotated[dict[str, Any], OPTIONS_OF_A_TRANSLATION],
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Translate on this machine alone, or on a Ray cluster, with --workers engines in it. On Ray all nodes "
            "have the input and the output at the same paths."
        ),
    ] = "local",
    cluster: Annotated[ClusterOptions, Described(ClusterOptions)],
) -> None:
    """Translate files of any size: JSON lines, Parquet or plain text, compressed or not.

    Rows keep their order and their other fields. They are written in shards, which appear when they are whole. Give
    the same command again after an interruption: whole shards are skipped. A row that cannot be translated gets its
    error in a field.
    """
    from kvx.runtime.scale.batch import conclude
    from kvx.runtime.scale.folder import OutputFolder, check_folder
    from kvx.runtime.scale.job import Job

    check_folder(output)
    _check_engine(engine, machine, cluster)
    bundle = open_bundle(model)
    if engine == "ray":
        given.pop("workers", None)  # of the cluster, not of an engine
    job = Job.of(tuple(input_), own, resolved_options(bundle.manifest, given), bundle.manifest)
    with OutputFolder.open(output, job.describe(), restart=restart) as folder, _saying_how_to_go_on(folder):
        if folder.records:
            say(f"whole already, and skipped: {_counted(len(folder.records), 'shard')}")
        with _showing() as told:
            if job.is_done(folder.records):
                summary = conclude(folder)
            elif engine == "ray":
                summary = _on_a_cluster(job, bundle, cluster, folder, told, workers=machine.workers)
            else:
                summary = _on_this_machine(job, bundle, machine, folder, told, named=model is not None)
    _conclude(summary, output)
    if summary.errors and errors == "fail":
        raise typer.Exit(FAILED)


def _check_engine(engine: str, machine: MachineOptions, cluster: ClusterOptions) -> None:
    """Raises OptionError for options that the other engine has."""
    if engine == "ray":
        usual = MachineOptions()
        strays = [
            Problem(name, f"`{name}` is given, but each worker on Ray has its own", f"no `{name}`")
            for name in ("backend", "device", "threads", "spin")
            if getattr(machine, name) != getattr(usual, name)
        ]
    else:
        strays = [
            Problem(one.name, f"`{one.name}` is given, but the job is for this machine", "`engine` ray")
            for one in fields(cluster)
            if getattr(cluster, one.name) != one.default
        ]
    refuse(strays)


def _on_this_machine(
    job: Job, bundle: Bundle, options: MachineOptions, folder: OutputFolder, told: Told, *, named: bool
) -> Summary:
    from kvx.runtime.scale.batch import run_batch

    machine = Machine.of(bundle, options)
    if not named or options.device == "auto":
        say(f"{bundle.folder} on {options.backend}, {', '.join(map(str, machine.devices))}")
    return run_batch(job, machine.load(bulk=True), folder, told)


def _on_a_cluster(
    job: Job, bundle: Bundle, cluster: ClusterOptions, folder: OutputFolder, told: Told, *, workers: int | None
) -> Summary:
    try:
        return run_on_ray(job, bundle, folder, cluster, workers=workers, told=told)
    except HeadLostError:
        atexit.register(_leave_ray_behind)
        raise


def _leave_ray_behind() -> None:
    """Ends the process before what Ray does at its end, which breaks it where the head of the cluster is lost."""
    sys.stderr.flush()
    os._exit(BAD_INPUT)


@contextlib.contextmanager
def _saying_how_to_go_on(folder: OutputFolder) -> Iterator[None]:
    """Says after Ctrl-C or another signal what there is, and how to get the rest."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        whole = _counted(folder.count_shards(), "whole shard")
        say(f"stopped with {whole} in {folder.path}. Give the same command again to go on")
        raise


def _conclude(summary: Summary, output: Path) -> None:
    new = summary.rows - summary.rows_before
    pace = f" in {summary.seconds:.1f} s ({new / summary.seconds:.1f} rows/s)" if new else ""
    say(f"{_counted(summary.rows, 'row')} in {_counted(summary.shards, 'shard')} in {output}; {new} of them now{pace}")
    if summary.truncated:
        say(f"{_counted(summary.truncated, 'text')} cut to the model's positions")
    if summary.at_limit:
        say(f"{_counted(summary.at_limit, 'translation')} stopped at the limit of new tokens")
    if summary.errors:
        say(f"{_counted(summary.errors, 'row')} could not be translated:")
        for told in summary.first_errors[:SHOWN_ERRORS]:
            say(f"  {told}")
        if summary.errors > SHOWN_ERRORS:
            say("  … the error field of the others tells why")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@dataclass(slots=True)
class _Pace:
    """How fast a job has been since its first news, and how long the rest should take."""

    started: float | None = None
    bytes: int = 0
    rows: int = 0

    def line(self, now: float, progress: Progress) -> str:
        """Rows, rows/s, the share of the input and the time left."""
        if self.started is None:
            self.started, self.bytes, self.rows = now, progress.bytes, progress.rows
        seconds, done = now - self.started, progress.bytes - self.bytes
        pace = f", {(progress.rows - self.rows) / seconds:.0f} rows/s" if seconds > 0 else ""
        left = f", {_time(seconds * (progress.all_bytes - progress.bytes) / done)} left" if done > 0 else ""
        share = f", {progress.bytes / progress.all_bytes:.0%} of the input" if progress.all_bytes else ""
        errors = f", {progress.errors} with errors" if progress.errors else ""
        return f"{progress.rows} rows{errors}{share}{pace}{left}"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextlib.contextmanager
def _showing() -> Iterator[Told]:
    """Takes how far a job is, and shows it: as one line on a terminal, otherwise as a line every minute."""
    pace = _Pace()
    if sys.stderr is None or not sys.stderr.isatty():
        yield _each(REPORT, lambda progress: say(pace.line(time.monotonic(), progress)), at_once=False)
        return
    from rich.console import Console

    with Console(stderr=True).status("translating") as status:
        yield _each(REDRAW, lambda progress: status.update(pace.line(time.monotonic(), progress)), at_once=True)


def _each(seconds: float, show: Told, *, at_once: bool) -> Told:
    """Shows news after so many seconds, and the latest only."""
    due = time.monotonic() + (0 if at_once else seconds)

    def told(progress: Progress) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            show(progress)

    return told
