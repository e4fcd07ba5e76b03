"""The `kvx` command: its commands, and what becomes of their errors.

Exit codes: 0 success; 1 a proof found a difference, or rows of `batch --errors fail` have errors; 2 bad input or usage;
70 a fault of kvx; 130 Ctrl-C; 128 + n the end by another signal.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NoReturn

import typer

import kvx
from kvx.commands import shortlist
from kvx.commands.batch import batch
from kvx.commands.bench import bench
from kvx.commands.console import (
    BAD_INPUT,
    DIFFERENCE,
    INTERNAL_ERROR,
    INTERRUPTED,
    drop_output,
    hold_closed_streams,
    say,
    saying_warnings,
)
from kvx.commands.evaluate import evaluate
from kvx.commands.export import export
from kvx.commands.inspect import inspect
from kvx.commands.options import spelled, spellings
from kvx.commands.score import score
from kvx.commands.serve import key, serve
from kvx.commands.signals import cleaning_up
from kvx.commands.translate import CommandOfTexts, translate
from kvx.commands.verify import verify
from kvx.runtime.errors import KvxError, ParityError, is_out_of_threads, out_of_threads, remedy_of

LIBRARY = "shared object"  # what the loader says where one is missing or damaged

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Export encoder-decoder Transformers to ONNX, prove the export equal to PyTorch, and run it without torch.\n\n"
    "kvx export turns a checkpoint into a bundle: a folder that all other commands work on.",
)
for command in (export, verify, inspect, translate, batch, evaluate, score, bench, serve, key):
    app.command(cls=CommandOfTexts if command is translate else None)(command)

shortlists = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make a shortlist, which lets a bundle translate faster.",
)
shortlists.command("train")(shortlist.train)
shortlists.command("import")(shortlist.import_)
app.add_typer(shortlists, name="shortlist")


@dataclass(slots=True)
class Run:
    """What is to be known of a run when it ends with an error."""

    debug: bool = False
    command: str | None = None


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="KVX_DEBUG", help="Print the traceback of any error.")
    ] = False,
) -> None:
    run = context.ensure_object(Run)
    run.debug, run.command = debug, context.invoked_subcommand
    if version:
        typer.echo(f"kvx {kvx.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_INPUT)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the `kvx` command. Typer itself tells of usage errors and of Ctrl-C."""
    run = Run()
    try:
        with cleaning_up(), saying_warnings():
            hold_closed_streams()
            app([_in_utf8(one) for one in sys.argv[1:]] if arguments is None else arguments, prog_name="kvx", obj=run)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        drop_output()  # the reader has seen enough
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if run.debug:
            traceback.print_exception(error)
        sys.exit(INTERRUPTED if _was_interrupted(error) else _explain(error, run))
    sys.exit(0)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: modules in C make an ImportError of it while they load."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _in_utf8(argument: str) -> str:
    """An argument as UTF-8, whatever the locale says."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def _explain(error: Exception, run: Run) -> int:
    """Says on stderr what went wrong → the exit code."""
    if is_out_of_threads(error):
        error = out_of_threads(f"A thread cannot be started ({error})")
    if isinstance(error, KvxError):
        say(f"error: {spelled(str(error), spellings(app, run.command))}")
        return DIFFERENCE if isinstance(error, ParityError) else BAD_INPUT
    if isinstance(error, MemoryError):
        say(
            f"error: There is not enough memory ({error or 'an allocation failed'}). Expected enough for this command. "
            "Free some, or raise the limit of this process."
        )
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno:
        drop_output()
        place, otherwise = error.filename or "input or output", "Check the disk and the other end of the stream."
        say(
            f"error: {error.strerror} ({place}). Expected files and streams that can be read and written. "
            f"{remedy_of(error, otherwise)}"
        )
        return BAD_INPUT
    if isinstance(error, OSError | ImportError) and LIBRARY in str(error):
        say(f"error: {error}. Expected the libraries that the installed packages need. Install what is missing.")
        return BAD_INPUT
    say(
        f"internal error: {type(error).__name__}: {error}. This is a bug in kvx {kvx.__version__}. "
        f"Please report it with {'the traceback' if run.debug else 'what kvx --debug or KVX_DEBUG=1 prints'}."
    )
    return INTERNAL_ERROR


if __name__ == "__main__":
    main()
