"""The `kvx` command: parse → one frozen options object → one call.

Exit codes: 0 success; 1 a proof found a difference; 2 bad input or usage; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from typer.core import TyperGroup

import kvx
from kvx.runtime.errors import DeviceError, KvxError, OptionError, ParityError

if TYPE_CHECKING:
    from kvx import Translation, Translator
    from kvx.exporter.report import Report
    from kvx.runtime.bundle import Bundle
    from kvx.runtime.schedule import DecodeStats
    from kvx.runtime.translator import TranslateOptions

ARTIFACTS = Path("artifacts")
EXPORT_NEEDS = ("torch", "onnx", "onnxscript")
NAMED_LINES = 10


class _Commands(TyperGroup):
    """Turns what a command raises into a sentence on stderr and an exit code; no traceback reaches a user."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # Typer's own Context is the same class
        """Runs the command that was chosen."""
        try:
            return super().invoke(ctx)
        except KvxError as error:
            _say(f"error: {error}")
            raise typer.Exit(1 if isinstance(error, ParityError) else 2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Export encoder-decoder Transformers with an explicit KV cache, prove the export, run it without torch.",
)


class ExportFormat(StrEnum):
    """What `kvx export` writes."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    BOTH = "both"


class BackendName(StrEnum):
    """What `kvx translate` runs on."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    TORCH = "torch"
    TORCH_NO_CACHE = "torch-no-cache"


class OnLongSource(StrEnum):
    """What happens to a source that is too long."""

    ERROR = "error"
    TRUNCATE = "truncate"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"kvx {kvx.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A state dict of the reference model, or kvx's own model.pt.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Bundle folder [default: artifacts/<name of the checkpoint's folder>]."),
    ] = None,
    source_tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model [default: source.model beside the checkpoint].")
    ] = None,
    target_tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model [default: target.model beside the checkpoint].")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads [default: d_model / 64].")] = None,
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.BOTH,
    max_new_tokens: Annotated[int | None, typer.Option(help="The bundle's default limit of a translation.")] = None,
    verify_text: Annotated[Path | None, typer.Option(help="Also prove greedy equality on the lines of a file.")] = None,
    verify_: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the export before it is kept.")] = True,
    tolerance: Annotated[float, typer.Option(help="Largest difference from eager, relative above 1.")] = 1e-4,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")] = False,
) -> None:
    """Export a checkpoint to a bundle, and prove it equal to eager PyTorch."""
    _require_export_extra()
    from kvx.exporter.export import ExportOptions
    from kvx.exporter.export import export as run
    from kvx.exporter.parity import ParityOptions
    from kvx.runtime.inspect import describe_parity

    options = ExportOptions(
        checkpoint=checkpoint,
        output=output,
        source_tokenizer=source_tokenizer,
        target_tokenizer=target_tokenizer,
        heads=heads,
        format=format_.value,
        max_new_tokens=max_new_tokens,
        verify=verify_,
        verify_text=verify_text,
        parity=ParityOptions(tolerance=tolerance),
        force=force,
    )
    with _reporting() as report:
        manifest = run(options, report)
    for line in describe_parity(manifest.parity, tensors=False):
        typer.echo(line, err=True)
    typer.echo(options.folder)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle written by kvx export.")],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that it was exported from.")],
    verify_text: Annotated[Path | None, typer.Option(help="Also prove greedy equality on the lines of a file.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference from eager, relative above 1.")] = 1e-4,
) -> None:
    """Prove a bundle against its checkpoint again: hashes, graphs, translations."""
    _require_export_extra()
    from kvx.exporter.parity import ParityOptions
    from kvx.exporter.verify import verify as run
    from kvx.runtime.inspect import describe_parity

    with _reporting() as report:
        found = run(bundle, checkpoint, ParityOptions(tolerance=tolerance), verify_text, report)
    for line in describe_parity(found.to_dict()):
        typer.echo(line)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle written by kvx export.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is.")] = False,
) -> None:
    """Show a bundle's graphs, sizes, limits, cache needs and parity report."""
    from kvx.runtime.bundle import Bundle
    from kvx.runtime.inspect import describe

    opened = Bundle.open(bundle)
    if as_json:
        typer.echo(json.dumps(opened.manifest.to_dict(), indent=1))
        return
    for line in describe(opened):
        typer.echo(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateCommand:
    """Where texts come from, where translations go, and what runs them. `model` None is the newest bundle."""

    texts: tuple[str, ...]
    input: Path | None
    output: Path | None
    model: Path | None
    backend: BackendName
    device: str
    threads: int | None
    json: bool
    stats: bool

    def __post_init__(self) -> None:
        if self.texts and self.input:
            raise OptionError("texts and --input", expected="one of them", remedy="Leave one out.")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"--threads {self.threads}", expected="1 or more", remedy="Correct it or leave it out.")


@app.command()
def translate(
    text: Annotated[list[str] | None, typer.Argument(help="Texts [default: the lines of standard input].")] = None,
    input_: Annotated[Path | None, typer.Option("-i", "--input", help="Read a text a line from a file.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a file, which appears when it is complete.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Bundle [default: the newest below ./artifacts].")] = None,
    backend: Annotated[BackendName, typer.Option(help="What runs the model.")] = BackendName.ONNX,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>; auto is where it was proven.")] = "auto",
    rows: Annotated[int | None, typer.Option(help="Sentences decoded at a time.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads [default: the cores available].")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of a translation [default: the bundle's].")] = None,
    on_long: Annotated[
        OnLongSource, typer.Option(help="For sources beyond the model's positions.")
    ] = OnLongSource.ERROR,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object a line.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Also print log-probabilities.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and cache size to stderr.")] = False,
) -> None:
    """Translate texts, a line each, in order."""
    from kvx.runtime.translator import DEFAULT_ROWS, TranslateOptions

    command = TranslateCommand(
        texts=tuple(text or ()),
        input=input_,
        output=output,
        model=model,
        backend=backend,
        device=device,
        threads=threads,
        json=as_json,
        stats=stats,
    )
    interactive = not command.texts and input_ is None and sys.stdin.isatty()
    options = TranslateOptions(
        max_new_tokens=max_new_tokens,
        scores=scores,
        on_long=on_long.value,
        rows=DEFAULT_ROWS if rows is None else rows,
        window=1 if interactive else None,
    )
    if interactive:
        _say("reading standard input, a text a line, until Ctrl-D")
    _translate(command, options)


def _translate(command: TranslateCommand, options: TranslateOptions) -> None:
    from kvx.runtime.schedule import DecodeStats

    translator = _load_translator(command)
    stats, started, at_limit = DecodeStats(), time.perf_counter(), list[int]()
    with _input_texts(command) as texts, _output_file(command.output) as out, _counter(command) as count:
        for number, translation in enumerate(translator.translate_iter(texts, options, stats), 1):
            out.write(_format(translation, as_json=command.json) + "\n")
            out.flush()
            if translation.truncated:
                _say(f"line {number} was cut to the model's {translator.manifest.model['source_positions']} positions")
            if translation.finish_reason == "length":
                at_limit.append(number)
            count(number)
    if at_limit:
        shown = ", ".join(map(str, at_limit[:NAMED_LINES])) + (", …" if len(at_limit) > NAMED_LINES else "")
        _say(f"{len(at_limit)} translations stopped at the limit of new tokens (lines {shown})")
    if command.stats:
        _say(_format_stats(stats, time.perf_counter() - started))


def _load_translator(command: TranslateCommand) -> Translator:
    from kvx import Translator
    from kvx.runtime.bundle import Bundle, newest_bundle

    path = command.model or newest_bundle(ARTIFACTS)
    device = "cpu" if command.device == "auto" else command.device
    if command.backend in (BackendName.ONNX, BackendName.TORCHSCRIPT):
        translator = Translator.load(path, backend=command.backend, threads=command.threads, device=device)
    else:
        translator = _eager_translator(Bundle.open(path), command, device)
    if command.model is None or command.device == "auto":
        _say(f"{path} on {command.backend}, {device}")
    return translator


def _eager_translator(bundle: Bundle, command: TranslateCommand, device: str) -> Translator:
    """The bundle's own checkpoint on eager PyTorch, which only the command line offers."""
    _require_export_extra()
    import torch

    from kvx import Translator
    from kvx.models.backend import NoCacheBackend, TorchBackend
    from kvx.models.checkpoint import load_checkpoint
    from kvx.runtime.bundle import CHECKPOINT_FILE

    if device != "cpu":
        raise DeviceError(f"device {device} for {command.backend}", expected="cpu", remedy="Use --device cpu.")
    bundle.require(CHECKPOINT_FILE)
    bundle.check_hashes()
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    model = load_checkpoint(bundle.folder / CHECKPOINT_FILE).model
    return Translator(bundle, TorchBackend(model) if command.backend is BackendName.TORCH else NoCacheBackend(model))


@contextlib.contextmanager
def _input_texts(command: TranslateCommand) -> Iterator[Iterable[str]]:
    from kvx.runtime.lines import open_lines, read_lines

    if command.texts:
        yield command.texts
    elif command.input:
        with open_lines(command.input) as stream:
            yield read_lines(stream)
    else:
        yield read_lines(sys.stdin.buffer)


@contextlib.contextmanager
def _output_file(path: Path | None) -> Iterator[TextIO]:
    from kvx.runtime.lines import complete_file

    if path is not None:
        with complete_file(path) as file:
            yield file
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]  # a TextIOWrapper
        yield sys.stdout


def _format(translation: Translation, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(translation), ensure_ascii=False)
    line = translation.text.replace("\n", " ").replace("\r", " ")  # a text in is a line out
    return line if translation.score is None else f"{translation.score:.4f}\t{line}"


def _format_stats(stats: DecodeStats, seconds: float) -> str:
    return (
        f"{stats.sentences} sentences in {seconds:.2f} s: {stats.sentences / seconds:.1f} sentences/s, "
        f"{stats.tokens / seconds:.0f} tokens/s, {stats.steps} steps, "
        f"{stats.row_steps / max(1, stats.steps):.1f} rows a step, {stats.repacks} repacks, "
        f"cache {stats.cache_bytes / 2**20:.1f} MiB"
    )


@contextlib.contextmanager
def _counter(command: TranslateCommand) -> Iterator[Callable[[int], None]]:
    """A progress line on stderr, where that is a terminal and the translations do not go there too."""
    if not sys.stderr.isatty() or (command.output is None and sys.stdout.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("translating"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("translating", total=len(command.texts) or None)
        yield lambda number: progress.update(task, completed=number)


@contextlib.contextmanager
def _reporting() -> Iterator[Report]:
    """What an export says: notes as lines on stderr, the phase that runs as a spinner where that is a terminal."""
    from rich.console import Console

    from kvx.exporter.report import Report

    with Console(stderr=True).status("starting") as status:

        class Spinner(Report):
            def phase(self, text: str) -> None:
                status.update(text)

            def note(self, text: str) -> None:
                _say(text)

        yield Spinner()


def _require_export_extra() -> None:
    missing = [name for name in EXPORT_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"no {', '.join(missing)} here",
            expected="the export extra",
            remedy="Install it with: pip install 'kvx[export]'",
        )


def _say(text: str) -> None:
    typer.echo(f"kvx: {text}", err=True)


def main() -> None:
    """The entry point of the `kvx` command."""
    app(prog_name="kvx")


if __name__ == "__main__":
    main()
