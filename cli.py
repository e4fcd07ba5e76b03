"""The `kvx` command: parse → one frozen options object → one call.

Exit codes: 0 success; 1 a proof found a difference; 2 bad input or usage; 70 a fault of kvx; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from typer.core import TyperGroup

import kvx
from kvx.commands.output import format_ranking, format_stats, translation_json, translation_lines
from kvx.runtime.errors import DeviceError, InputError, KvxError, OptionError, ParityError
from kvx.runtime.text.lines import open_lines, output_file, read_file, read_lines, write_lines

if TYPE_CHECKING:
    from kvx import Translation, Translator
    from kvx.exporter.progress import Progress as Listener
    from kvx.runtime.decoding.results import DecodeStats
    from kvx.runtime.measuring.evaluation import Evaluation
    from kvx.runtime.options import TranslateOptions
    from kvx.runtime.shortlist.candidates import Shortlist

ARTIFACTS = Path("artifacts")
EXPORT_NEEDS = ("torch", "onnx", "onnx_ir", "onnxscript")
NAMED_LINES = 10
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h


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
            _drop_output()
            raise typer.Exit(0) from None
        except OSError as error:
            _say(
                f"error: {error.strerror or error} ({error.filename or 'input or output'}); expected files and streams "
                "that can be read and written. Check permissions and free space."
            )
            _drop_output()
            raise typer.Exit(2) from None


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


class Lowering(StrEnum):
    """Which operators the ONNX graphs are made of."""

    ORT = "ort"
    STANDARD = "standard"
    CUDA = "cuda"


class Precision(StrEnum):
    """What weights are stored in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class BackendName(StrEnum):
    """What `kvx translate` runs on."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    TORCH = "torch"
    TORCH_NO_CACHE = "torch-no-cache"


class RankMeasure(StrEnum):
    """What makes the best candidate."""

    SUM = "sum"
    PER_TOKEN = "per_token"


class OnLongSource(StrEnum):
    """What happens to a source that is too long."""

    ERROR = "error"
    TRUNCATE = "truncate"


VerifyTextOption = Annotated[Path | None, typer.Option(help="Also prove greedy translations of the lines of a file.")]
VerifyReferenceOption = Annotated[
    Path | None, typer.Option(help="Reference translations of --verify-text: how much BLEU fewer bits lose.")
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        help="Largest difference from eager, relative above 1 "
        "[default: 1e-4; fp16 0.005, bf16 0.04, int8 0.1, int4 0.25]."
    ),
]
EqualLinesOption = Annotated[
    float | None,
    typer.Option(
        help="Least share of lines that fewer bits translate as eager does "
        "[default: fp16 0.95, bf16 0.9, int8 0.8, int4 0.4]."
    ),
]
BleuLostOption = Annotated[
    float | None,
    typer.Option(help="Most BLEU that may be lost against eager [default: fp16 0.2, bf16 0.3, int8 0.5, int4 1.0]."),
]


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
    format_: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="What to write [default: both; onnx with fewer bits or for CUDA]."),
    ] = None,
    lowering: Annotated[
        Lowering | None,
        typer.Option(
            help="Operators of the ONNX graphs: ONNX Runtime's own, the standard's alone, or those for captured CUDA "
            "graphs [default: ort; cuda with fp16 and bf16]."
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="fp16 or bf16 for CUDA; weights alone: int8 for many sentences at a time, int4 for one."),
    ] = Precision.FP32,
    calibration: Annotated[
        Path | None, typer.Option(help="Fix the scales of int8 on the lines of a file, which is faster.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The bundle's default limit of a translation.")] = None,
    attention: Annotated[
        bool, typer.Option("--with-attention", help="Steps also give what a decoder layer attends to in the source.")
    ] = False,
    attention_layer: Annotated[
        int | None, typer.Option(help="The layer of --with-attention, counted from 0 [default: the last].")
    ] = None,
    verify_text: VerifyTextOption = None,
    verify_reference: VerifyReferenceOption = None,
    verify_: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the export before it is kept.")] = True,
    tolerance: ToleranceOption = None,
    equal_lines: EqualLinesOption = None,
    bleu_lost: BleuLostOption = None,
    with_shortlist: Annotated[
        bool, typer.Option("--with-shortlist", help="Also what translating with a shortlist needs (onnx).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")] = False,
) -> None:
    """Export a checkpoint to a bundle, and prove it equal to eager PyTorch."""
    _require(*EXPORT_NEEDS, extra="export")
    if verify_reference is not None:
        _require("sacrebleu", extra="evaluate")
    _steady_torch()
    from kvx.exporter.export import export as run
    from kvx.exporter.options import ExportOptions
    from kvx.exporter.proof.limits import ParityOptions
    from kvx.runtime.bundle.description import describe_parity

    options = ExportOptions(
        checkpoint=checkpoint,
        output=output,
        source_tokenizer=source_tokenizer,
        target_tokenizer=target_tokenizer,
        heads=heads,
        format=None if format_ is None else format_.value,
        lowering=None if lowering is None else lowering.value,
        precision=precision.value,
        calibration=calibration,
        max_new_tokens=max_new_tokens,
        attention=attention,
        attention_layer=attention_layer,
        verify=verify_,
        parity=ParityOptions(
            tolerance=tolerance,
            equal_lines=equal_lines,
            bleu_lost=bleu_lost,
            verify_text=verify_text,
            verify_reference=verify_reference,
        ),
        force=force,
        shortlist=with_shortlist,
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
    verify_text: VerifyTextOption = None,
    verify_reference: VerifyReferenceOption = None,
    tolerance: ToleranceOption = None,
    equal_lines: EqualLinesOption = None,
    bleu_lost: BleuLostOption = None,
) -> None:
    """Prove a bundle against its checkpoint again: hashes, graphs, translations."""
    _require(*EXPORT_NEEDS, extra="export")
    if verify_reference is not None:
        _require("sacrebleu", extra="evaluate")
    _steady_torch()
    from kvx.exporter.proof.bundle import verify as run
    from kvx.exporter.proof.limits import ParityOptions
    from kvx.runtime.bundle.description import describe_parity

    with _reporting() as report:
        options = ParityOptions(
            tolerance=tolerance,
            equal_lines=equal_lines,
            bleu_lost=bleu_lost,
            verify_text=verify_text,
            verify_reference=verify_reference,
        )
        found = run(bundle, checkpoint, options, report)
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
    from kvx.runtime.bundle.description import describe
    from kvx.runtime.bundle.folder import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        typer.echo(json.dumps(opened.manifest.to_dict(), indent=1))
        return
    for line in describe(opened):
        typer.echo(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What runs a model: `threads` compute threads in all (default: the cores available), shared by `workers` decode
    loops (default: as many as the backend is fastest with; 1 where there is little to do); `spin`: they wait busily.
    """

    backend: BackendName
    device: str
    threads: int | None
    workers: int | None
    spin: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"--{name} {value}"
            for name, value in (("threads", self.threads), ("workers", self.workers))
            if value is not None and value < 1
        ]
        if wrong:
            raise OptionError(", ".join(wrong), expected="1 or more", remedy="Correct it or leave it out.")
        if self.spin and self.backend is not BackendName.ONNX:
            raise OptionError(f"--spin with {self.backend}", expected="the onnx backend", remedy="Leave it out.")

    def place(self, path: Path) -> str:
        """The device: auto is CUDA for a bundle exported for it where its libraries are found, else the CPU."""
        if self.device != "auto":
            return self.device
        if self.backend is not BackendName.ONNX:
            return "cpu"
        from kvx.runtime.bundle.manifest import Manifest

        if Manifest.read(path).lowering != "cuda":
            return "cpu"
        from kvx.runtime.backends.sessions import cuda_lacks

        return "cuda" if cuda_lacks() is None else "cpu"

    def check(self, path: Path) -> None:
        """Raises BundleError where the bundle has not what the backend needs."""
        from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
        from kvx.runtime.bundle.manifest import GRAPH_FILES

        Bundle.open(path).require(*GRAPH_FILES.get(self.backend, (CHECKPOINT_FILE,)))

    def load(self, path: Path, *, bulk: bool) -> Translator:
        """The translator of a bundle; for `bulk` work the threads are shared out to as many workers."""
        if self.backend in (BackendName.TORCH, BackendName.TORCH_NO_CACHE):
            return _eager_translator(path, self)
        from kvx import Translator
        from kvx.runtime.system import available_threads

        workers = self.workers
        place = self.place(path)
        if workers is None and bulk and self.backend is BackendName.ONNX and place == "cpu":
            workers = self.threads or available_threads()
        return Translator.load(
            path, backend=self.backend, threads=self.threads, workers=workers, spin=self.spin, device=place
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateCommand:
    """Where texts come from, where translations go, and how they are written. `model` None is the newest bundle."""

    texts: tuple[str, ...]
    input: Path | None
    output: Path | None
    model: Path | None
    json: bool
    stats: bool
    prefix_file: Path | None
    prefix: str | None
    alternatives: int | None
    several_hypotheses: bool
    plot_attention: Path | None
    align: bool

    def __post_init__(self) -> None:
        if self.texts and self.input:
            raise OptionError("texts and --input", expected="one of them", remedy="Leave one out.")
        if self.alternatives is not None and (self.stats or self.several_hypotheses):
            raise OptionError(
                "--alternatives with --n-best, --samples or --stats",
                expected="one translation after each alternative",
                remedy="Leave one of them out.",
            )
        if self.prefix and self.prefix_file is not None:
            raise OptionError("--prefix and --prefix-file", expected="one of them", remedy="Leave one out.")
        if self.plot_attention is not None and len(self.texts) != 1:
            raise OptionError(
                f"--plot-attention for {len(self.texts) or 'a stream of'} texts",
                expected="one text, as an argument",
                remedy="Give the text to be looked at.",
            )
        if self.prefix_file is not None and self.interactive:
            raise OptionError(
                "--prefix-file for texts that are typed", expected="texts from a file or pipe", remedy="Use --prefix."
            )
        if not self.texts and self.input is None and sys.stdin is None:
            raise OptionError("a closed standard input", expected="texts", remedy="Give them as arguments or a file.")
        if self.output is None and sys.stdout is None:
            raise OptionError("a closed standard output", expected="a place to write to", remedy="Use --output.")

    @property
    def several(self) -> bool:
        """Whether a text may have several translations."""
        return self.several_hypotheses or (self.alternatives or 1) > 1

    @property
    def interactive(self) -> bool:
        """Whether somebody types the texts, and waits for each answer."""
        return not self.texts and self.input is None and sys.stdin is not None and sys.stdin.isatty()


ModelOption = Annotated[Path | None, typer.Option(help="Bundle [default: the newest below ./artifacts].")]
BackendOption = Annotated[BackendName, typer.Option(help="What runs the model.")]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:<index>, or several with commas; auto is the one exported for.")
]
RowsOption = Annotated[
    int | None, typer.Option(help="Cache rows of a worker, one a sentence or a beam [default: 64, or what fits].")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Compute threads in all [default: the cores available].")]
WorkersOption = Annotated[
    int | None, typer.Option(help="Decode loops that share the threads [default: one a thread on onnx, else 1].")
]
SpinOption = Annotated[
    bool,
    typer.Option("--spin", help="Threads wait busily within a step: faster for one text, on cores of its own."),
]
CacheOption = Annotated[float | None, typer.Option(help="The most that the caches may hold, in MiB [default: 1024].")]
TokensOption = Annotated[int | None, typer.Option(help="Tokens of a translation [default: the bundle's].")]
OnLongOption = Annotated[OnLongSource, typer.Option(help="For sources beyond the model's positions.")]
BeamSizeOption = Annotated[int, typer.Option(help="Beams of a sentence; 1 is greedy.")]
LengthPenaltyOption = Annotated[
    float | None,
    typer.Option(help="Beams are compared by log-probability / length^this [default: 1.0]."),
]

ShortlistOption = Annotated[
    Path | None,
    typer.Option(
        help="A file of kvx shortlist: translate with its candidates alone, on a bundle made --with-shortlist."
    ),
]


@app.command()
def translate(
    text: Annotated[list[str] | None, typer.Argument(help="Texts [default: the lines of standard input].")] = None,
    input_: Annotated[Path | None, typer.Option("-i", "--input", help="Read a text a line from a file.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a file, which appears when it is complete.")
    ] = None,
    model: ModelOption = None,
    backend: BackendOption = BackendName.ONNX,
    device: DeviceOption = "auto",
    rows: RowsOption = None,
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    spin: SpinOption = False,
    cache_mb: CacheOption = None,
    on_long: OnLongOption = OnLongSource.ERROR,
    beam_size: BeamSizeOption = 1,
    n_best: Annotated[
        int | None,
        typer.Option(help="Translations of each text, from its beams [default: 1]."),
    ] = None,
    length_penalty: LengthPenaltyOption = None,
    early_stopping: Annotated[
        bool | None,
        typer.Option(
            "--early-stopping/--no-early-stopping",
            help="End at so many finished beams, or when none can get better [default: early].",
        ),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(help="End at this times so many finished beams [default: 1.0]."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Draw so many translations of each text at random.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of samples: below 1 more probable, above 1 more varied."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens [default: all].")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the fewest tokens of this probability [default: 1.0]."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same samples every time, whatever the batch.")] = None,
    alternatives: Annotated[
        int | None,
        typer.Option(help="So many translations that differ in the token after --prefix."),
    ] = None,
    max_new_tokens: TokensOption = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Least tokens of a translation.")] = None,
    prefix: Annotated[str | None, typer.Option(help="What every translation begins with.")] = None,
    prefix_file: Annotated[Path | None, typer.Option(help="What each translation begins with, a line a text.")] = None,
    suppress: Annotated[
        list[str] | None,
        typer.Option(help="A piece that never comes; may be given again."),
    ] = None,
    no_repeated_ngrams: Annotated[
        int | None, typer.Option(help="No so many tokens come twice in the same order.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: what has come gets less probable.")] = None,
    end_penalty: Annotated[float | None, typer.Option(help="Nats that ending costs.")] = None,
    shortlist: ShortlistOption = None,
    align: Annotated[
        bool, typer.Option("--align", help="Also print source-target pairs of pieces; needs a bundle --with-attention.")
    ] = False,
    replace_unknown: Annotated[
        bool, typer.Option("--replace-unknown", help="The aligned source word in place of an unknown token.")
    ] = False,
    plot_attention: Annotated[
        Path | None, typer.Option(help="Write a page with the attention of one text's translation.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object a line.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Also print log-probabilities.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and cache size to stderr.")] = False,
) -> None:
    """Translate texts, a line each, in order.

    With --n-best, --samples or --alternatives: a line for each translation, the number of its text before it.
    """
    from kvx.runtime.options import TranslateOptions

    command = TranslateCommand(
        texts=tuple(text or ()),
        input=input_,
        output=output,
        model=model,
        json=as_json,
        stats=stats,
        prefix_file=prefix_file,
        alternatives=alternatives,
        prefix=prefix,
        several_hypotheses=max(n_best or 1, samples or 1) > 1,
        plot_attention=plot_attention,
        align=align,
    )
    machine = Machine(backend=backend, device=device, threads=threads, workers=workers, spin=spin)
    options = TranslateOptions(
        on_long=on_long.value,
        window=1 if command.interactive else len(command.texts) or None,
        rows=rows,
        workers=workers,
        cache_bytes=_cache_bytes(cache_mb),
        beam_size=beam_size,
        n_best=n_best,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        patience=patience,
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        prefix=prefix,
        suppress=tuple(suppress or ()),
        no_repeated_ngrams=no_repeated_ngrams,
        repetition_penalty=repetition_penalty,
        end_penalty=end_penalty,
        shortlist=shortlist,
        scores=scores,
        align=align or plot_attention is not None,
        replace_unknown=replace_unknown,
    )
    translator = _announce(command.model, machine, bulk=not command.texts and not command.interactive)
    if command.interactive:
        _say("reading standard input, a text a line, until Ctrl-D")
    _translate(translator, command, options)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle written by kvx export.")],
    source: Annotated[Path, typer.Option(help="The test set: a sentence a line.")],
    reference: Annotated[Path, typer.Option(help="Its reference translations, line by line.")],
    backend: Annotated[str, typer.Option(help="What runs the model; several, with commas, side by side.")] = "onnx",
    device: DeviceOption = "auto",
    limit: Annotated[int | None, typer.Option(help="Only the first so many lines.")] = None,
    tokenize: Annotated[
        str | None, typer.Option(help="sacrebleu's tokenizer: 13a, zh, … [default: sacrebleu's].")
    ] = None,
    rows: RowsOption = None,
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    spin: SpinOption = False,
    cache_mb: CacheOption = None,
    max_new_tokens: TokensOption = None,
    beam_size: BeamSizeOption = 1,
    length_penalty: LengthPenaltyOption = None,
    shortlist: ShortlistOption = None,
    on_long: OnLongOption = OnLongSource.ERROR,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to a file.")] = None,
    hypotheses: Annotated[
        Path | None,
        typer.Option(help="Write the translations; with several backends NAME.<backend>.EXT for each."),
    ] = None,
) -> None:
    """Compare backends on a test set: BLEU, chrF, speed and memory in one table."""
    _require("sacrebleu", extra="evaluate")
    from kvx.runtime.measuring import evaluation
    from kvx.runtime.options import TranslateOptions

    names = [_backend(name) for name in backend.split(",")]
    if shortlist is not None and set(names) != {BackendName.ONNX}:
        raise OptionError(
            f"--shortlist with --backend {backend}", expected="onnx alone", remedy="Leave out the others."
        )
    test_set = evaluation.ParallelText(read_file(source, limit), read_file(reference, limit))
    options = TranslateOptions(
        max_new_tokens=max_new_tokens,
        beam_size=beam_size,
        length_penalty=length_penalty,
        shortlist=shortlist,
        on_long=on_long.value,
        rows=rows,
        cache_bytes=_cache_bytes(cache_mb),
        workers=workers,
    )
    machines = [Machine(backend=name, device=device, threads=threads, workers=workers, spin=spin) for name in names]
    for machine in machines:
        machine.check(bundle)
    found: list[evaluation.Evaluation] = []
    try:
        for machine in machines:
            translator = machine.load(bundle, bulk=True)
            with _spinner(f"{machine.backend}: {len(test_set.sources)} sentences"):
                result, lines = evaluation.evaluate(translator._model, test_set, options, tokenize=tokenize)
            found.append(result)
            if hypotheses:
                write_lines(_named_for(hypotheses, machine.backend) if len(names) > 1 else hypotheses, lines)
            if not result.complete:
                _say(f"interrupted: {result.name} covers the first {result.sentences} sentences")
                raise typer.Exit(130)
    finally:
        _show_evaluations(found, json_file)


@app.command()
def score(
    source: Annotated[Path, typer.Option(help="Sources, a line each.")],
    target: Annotated[Path, typer.Option(help="A translation of each, line by line.")],
    choices: Annotated[
        bool, typer.Option("--choices", help="Each line of --target holds candidates separated by tabs: rank them.")
    ] = False,
    by: Annotated[RankMeasure, typer.Option(help="What ranks candidates.")] = RankMeasure.SUM,
    model: ModelOption = None,
    backend: BackendOption = BackendName.ONNX,
    device: DeviceOption = "auto",
    rows: RowsOption = None,
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    spin: SpinOption = False,
    cache_mb: CacheOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a file, which appears when it is complete.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object a line, with every token and candidate.")
    ] = False,
) -> None:
    """Print natural log-probabilities of given translations: sum, mean per token, tokens, with tabs between.

    With --choices: the best candidate, its lead over the next and its sum.
    """
    from kvx.runtime.options import TranslateOptions

    sources, lines = read_file(source), read_file(target)
    candidates = [line.split("\t") if choices else [line] for line in lines]
    machine = Machine(backend=backend, device=device, threads=threads, workers=workers, spin=spin)
    options = TranslateOptions(rows=rows, cache_bytes=_cache_bytes(cache_mb), workers=workers)
    translator = _announce(model, machine, bulk=True)
    with _spinner(f"scoring {len(lines)} lines"):
        rankings = translator.rank(sources, candidates, by=by.value, options=options)
    with output_file(output) as out:
        for given, ranking in zip(candidates, rankings, strict=True):
            out.write(format_ranking(given, ranking, choices=choices, as_json=as_json) + "\n")


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle written by kvx export.")],
    text: Annotated[
        Path | None, typer.Option(help="Also translate the lines of a file, as many at a time as pay.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Row counts to measure, with commas.")] = "1,8,32,128",
    lengths: Annotated[
        str, typer.Option(help="Target lengths for the cost per token, with commas; none where empty.")
    ] = "50,100,200,400,700,1000",
    tokens: Annotated[int, typer.Option(help="Steps that are measured for each row count.")] = 24,
    source_tokens: Annotated[int, typer.Option(help="Tokens of every source, bos and eos counted.")] = 20,
    length_rows: Annotated[int, typer.Option(help="Rows for the cost per token.")] = 32,
    repeat: Annotated[int, typer.Option(help="How often each row count is measured.")] = 5,
    backend: BackendOption = BackendName.ONNX,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    spin: SpinOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to a file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to an HTML file.")] = None,
) -> None:
    """Measure a bundle on this machine: steps by rows, cost by target length, load time, memory, speed on a file.

    Steps have all threads; for --text they are shared out to as many decode loops, as for any bulk work.
    """
    from kvx.runtime.measuring import bench as measuring
    from kvx.runtime.measuring.curves import curves_html

    options = measuring.BenchOptions(
        rows=_counts("--rows", rows),
        lengths=_counts("--lengths", lengths),
        tokens=tokens,
        source_tokens=source_tokens,
        length_rows=length_rows,
        repeat=repeat,
    )
    machine = Machine(backend=backend, device=device, threads=threads, workers=workers, spin=spin)
    machine.check(bundle)
    subject = measuring.Subject(bundle=str(bundle), threads=threads, workers=workers, spin=spin)
    texts = None if text is None else read_file(text)
    if texts == ():
        raise InputError(f"{text} without a line", expected="at least one text", remedy="Check the file.")
    with _spinner(f"measuring {bundle}"):
        result = measuring.bench(
            lambda: machine.load(bundle, bulk=False)._model,
            subject,
            texts,
            options,
            make_bulk=lambda: machine.load(bundle, bulk=True)._model,
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
            f"{option} {given}", expected="numbers with commas between", remedy=f"Correct {option}."
        ) from None


def _show_evaluations(found: list[Evaluation], json_file: Path | None) -> None:
    from kvx.runtime.measuring.evaluation import comparison

    if not found:
        return
    for line in comparison(found):
        typer.echo(line)
    for signature in (found[0].bleu.signature, found[0].chrf.signature):
        typer.echo(signature)
    if json_file:
        write_lines(json_file, json.dumps({"backends": [asdict(result) for result in found]}, indent=1).split("\n"))


shortlists = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make a shortlist: the target pieces that the pieces of a source may become.",
)
app.add_typer(shortlists, name="shortlist")

ShortlistBundleOption = Annotated[Path, typer.Option("--bundle", help="The bundle whose tokenizers it is for.")]
ShortlistOutputOption = Annotated[
    Path, typer.Option("-o", "--output", help="Shortlist (.npz), which appears when it is complete.")
]
PerSourceOption = Annotated[int, typer.Option(help="The most target pieces of a source piece.")]
FrequentOption = Annotated[int, typer.Option(help="How many frequent target pieces every sentence may use.")]


@shortlists.command("train")
def train_shortlist(
    bundle: ShortlistBundleOption,
    source: Annotated[Path, typer.Option(help="Sources, a line each.")],
    target: Annotated[Path, typer.Option(help="A translation of each, line by line.")],
    output: ShortlistOutputOption,
    per_source: PerSourceOption = 50,
    frequent: FrequentOption = 100,
    iterations: Annotated[int, typer.Option(help="Iterations of IBM Model 1.")] = 5,
) -> None:
    """Learn a shortlist from parallel text."""
    from kvx.runtime.bundle.folder import Bundle
    from kvx.runtime.shortlist import lexicon

    options = lexicon.LexiconOptions(iterations=iterations, per_source=per_source, frequent=frequent)
    opened, sources, targets = Bundle.open(bundle), read_file(source), read_file(target)
    with _spinner(f"learning from {len(sources)} lines"):
        shortlist, coverage = lexicon.train_shortlist(opened, sources, targets, options)
        shortlist.write(output)
    _say(
        f"{_describe(shortlist, output)}; {coverage.candidates:.0f} candidates a sentence, "
        f"which hold {coverage.share:.2%} of this text's target tokens"
    )


@shortlists.command("import")
def import_shortlist(
    table: Annotated[Path, typer.Argument(help='Lines of "target source probability", pieces of the tokenizers.')],
    bundle: ShortlistBundleOption,
    output: ShortlistOutputOption,
    per_source: PerSourceOption = 50,
    frequent: FrequentOption = 100,
) -> None:
    """Make a shortlist of a lexical table (lex.s2t)."""
    from kvx.runtime.bundle.folder import Bundle
    from kvx.runtime.shortlist import lexicon

    options = lexicon.LexiconOptions(per_source=per_source, frequent=frequent)
    opened = Bundle.open(bundle)
    with open_lines(table) as stream, _spinner(f"reading {table}"):
        shortlist, read = lexicon.import_shortlist(opened, read_lines(stream), options)
        shortlist.write(output)
    if read.unknown:
        _say(
            f"{read.unknown} of {read.entries} entries have pieces that the tokenizers do not know "
            f"(the first on line {read.first_unknown})"
        )
    _say(_describe(shortlist, output))


def _describe(shortlist: Shortlist, path: Path) -> str:
    targets = shortlist.targets_per_source
    pieces = sum(map(bool, targets))
    return (
        f"{path}, {path.stat().st_size / 1024:.0f} KiB: {pieces} of {len(targets)} source pieces, "
        f"{sum(targets) / max(pieces, 1):.1f} targets each, {len(shortlist.frequent)} frequent ones"
    )


def _translate(translator: Translator, command: TranslateCommand, options: TranslateOptions) -> None:
    from kvx.runtime.decoding.results import DecodeStats

    stats, started, at_limit = DecodeStats(), time.perf_counter(), list[int]()
    with _input_texts(command) as texts, output_file(command.output) as out, _counter(command) as count:
        for number, translation in enumerate(_translations(translator, command, options, texts, stats), 1):
            _write_translation(out, translation, number, command)
            out.flush()
            if command.plot_attention is not None:
                _plot_attention(command.plot_attention, translation, command.texts[0])
            if translation.truncated:
                _say(f"line {number} was cut to the model's {translator.manifest.model['source_positions']} positions")
            if translation.finish_reason == "length":
                at_limit.append(number)
            count(number)
    if at_limit:
        shown = ", ".join(map(str, at_limit[:NAMED_LINES])) + (", …" if len(at_limit) > NAMED_LINES else "")
        _say(f"{len(at_limit)} translations stopped at the limit of new tokens (lines {shown})")
    if command.stats:
        _say(format_stats(stats, time.perf_counter() - started))


def _write_translation(out: TextIO, translation: Translation, number: int, command: TranslateCommand) -> None:
    if not command.align:
        translation = replace(translation, alignment=None, source_tokens=None)
    if command.json:
        out.write(translation_json(translation) + "\n")
    else:
        out.writelines(f"{line}\n" for line in translation_lines(translation, number, several=command.several))


def _plot_attention(path: Path, translation: Translation, text: str) -> None:
    """A row for each token, eos included where the translation has ended."""
    from kvx.runtime.measuring.heatmap import attention_html

    if translation.attention is None:
        raise InputError("an empty text", expected="a text that has a translation", remedy="Give one.")
    tokens = (*translation.tokens, *(["eos"] if len(translation.ids) > len(translation.tokens) else []))
    page = attention_html(
        translation.attention, translation.source_tokens or (), tokens, f"{text} → {translation.text}"
    )
    write_lines(path, page.split("\n"))


def _translations(
    translator: Translator,
    command: TranslateCommand,
    options: TranslateOptions,
    texts: Iterable[str],
    stats: DecodeStats,
) -> Iterator[Translation]:
    from kvx.runtime.engine.call import paired

    prefixes = None if command.prefix_file is None else read_file(command.prefix_file)
    if command.alternatives is None:
        yield from translator.translate_iter(texts, options, stats, prefixes=prefixes)
        return
    pairs = paired(texts, prefixes) if prefixes is not None else ((text, options.prefix or "") for text in texts)
    for number, (text, prefix) in enumerate(pairs, 1):
        first, *others = translator.alternatives(text, prefix, command.alternatives, options, number=number)
        yield replace(first, others=tuple(others))


def _announce(model: Path | None, machine: Machine, *, bulk: bool) -> Translator:
    """Loads the bundle, or the newest, and says what was chosen where the user left it open."""
    from kvx.runtime.bundle.folder import newest_bundle

    path = model or newest_bundle(ARTIFACTS)
    loaded = machine.load(path, bulk=bulk)
    if model is None or machine.device == "auto":
        _say(f"{path} on {machine.backend}, {machine.place(path)}")
    return loaded


def _eager_translator(path: Path, machine: Machine) -> Translator:
    """The bundle's own checkpoint on eager PyTorch, which only the command line offers."""
    _require("torch", extra="export")
    import torch

    from kvx import Translator
    from kvx.models.eager import NoCacheBackend, TorchBackend
    from kvx.models.importers import load_checkpoint
    from kvx.runtime.bundle.folder import CHECKPOINT_FILE, Bundle
    from kvx.runtime.engine.loaded import LoadedModel

    if machine.place(path) != "cpu":
        raise DeviceError(f"device {machine.device} for {machine.backend}", expected="cpu", remedy="Use --device cpu.")
    bundle = Bundle.open(path)
    bundle.require(CHECKPOINT_FILE)
    bundle.check_hashes()
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    model = load_checkpoint(bundle.folder / CHECKPOINT_FILE).model
    backend = TorchBackend if machine.backend is BackendName.TORCH else NoCacheBackend
    eager = backend(model, attention_layer=bundle.manifest.features.attention)
    return Translator(LoadedModel(bundle, eager))


def _backend(name: str) -> BackendName:
    try:
        return BackendName(name.strip())
    except ValueError:
        raise OptionError(
            f"--backend {name}", expected=f"some of {', '.join(BackendName)}", remedy="Correct --backend."
        ) from None


def _cache_bytes(mebibytes: float | None) -> int | None:
    if mebibytes is not None and not 0 < mebibytes < float("inf"):
        raise OptionError(f"--cache-mb {mebibytes}", expected="more than 0", remedy="Correct it or leave it out.")
    return None if mebibytes is None else max(1, int(mebibytes * 2**20))


def _named_for(path: Path, backend: str) -> Path:
    return path.with_name(f"{path.stem}.{backend}{path.suffix}")


@contextlib.contextmanager
def _input_texts(command: TranslateCommand) -> Iterator[Iterable[str]]:
    if command.texts:
        yield command.texts
    elif command.input:
        with open_lines(command.input) as stream:
            yield read_lines(stream)
    else:
        yield read_lines(sys.stdin.buffer)


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
def _reporting() -> Iterator[Listener]:
    """What an export says: notes as lines on stderr, the phase that runs as a spinner where that is a terminal."""
    from rich.console import Console

    from kvx.exporter.progress import Progress as Listener

    with Console(stderr=True).status("starting") as status:

        class Spinner(Listener):
            def phase(self, text: str) -> None:
                status.update(text)

            def note(self, text: str) -> None:
                _say(text)

        yield Spinner()


def _steady_torch() -> None:
    """One thread for torch: a proof takes no longer with it, and on busy cores several wait for each other."""
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    """Says on stderr what is being waited for, where that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _require(*modules: str, extra: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"no {', '.join(missing)} here",
            expected=f"the {extra} extra",
            remedy=f"Install it with: pip install 'kvx[{extra}]'",
        )


def _drop_output() -> None:
    """Sends what is still buffered for a standard output that takes no more to nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    typer.echo(f"kvx: {text}", err=True)


def main() -> None:
    """The entry point of the `kvx` command."""
    try:
        app(prog_name="kvx")
    except Exception as error:  # a fault of ours or of what we stand on, not the user's
        _say(f"internal error: {type(error).__name__}: {error}; expected nothing of the kind. Please report it.")
        sys.exit(INTERNAL_ERROR)


if __name__ == "__main__":
    main()
