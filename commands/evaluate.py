"""`kvx evaluate`: backends side by side on a test set."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvx.commands.console import check_places, require, say, spinner
from kvx.commands.machine import BACKENDS, BackendName, Machine, MachineOptions
from kvx.commands.options import BundleArgument, Described, with_described_options
from kvx.commands.translation import options_of_a_translation, resolved_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import OptionError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.lines import read_file, write_lines

if TYPE_CHECKING:
    from kvx.runtime.measuring.evaluation import Evaluation, ParallelText

OPTIONS_OF_AN_EVALUATION = options_of_a_translation(
    "source_language",
    "target_language",
    "text_prefix",
    "beam_size",
    "length_penalty",
    "max_new_tokens",
    "shortlist",
    "on_long",
    "rows",
    "workers",
    "cache_bytes",
)


@with_described_options
def evaluate(
    *,
    bundle: BundleArgument,
    source: Annotated[Path, typer.Option(help="The texts to translate, one per line.")],
    reference: Annotated[Path, typer.Option(help="Their reference translations, one per line.")],
    limit: Annotated[int | None, typer.Option(help="Use only this many lines from the start of the files.")] = None,
    tokenize: Annotated[
        str | None, typer.Option(help="The tokenizer that sacrebleu uses for BLEU: 13a, zh, …  [default: 13a]")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the model: onnx, torchscript, torch or torch-no-cache, or several with commas between, "
            "to compare them."
        ),
    ] = "onnx",
    machine: Annotated[MachineOptions, Described(MachineOptions, but=("backend",))],
    given: Annotated[dict[str, Any], OPTIONS_OF_AN_EVALUATION],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
    hypotheses: Annotated[
        Path | None,
        typer.Option(
            help="Write the translations to this file, or to NAME.<backend>.EXT for each of several backends."
        ),
    ] = None,
) -> None:
    """Translate a test set, and report BLEU, chrF, speed and memory."""
    require("sacrebleu", extra="evaluate")
    from kvx.runtime.measuring.evaluation import ParallelText

    check_places(json_file, hypotheses)
    names = _backends(backend)
    if "shortlist" in given and set(names) != {"onnx"}:
        raise OptionError(
            f"`shortlist` is given with the backends {backend}",
            expected="onnx alone",
            remedy="Leave out the other backends.",
            option="shortlist",
        )
    test_set = ParallelText(read_file(source, limit), read_file(reference, limit))
    opened = Bundle.open(bundle)
    options = resolved_options(opened.manifest, given)
    machines = [Machine.of(opened, replace(machine, backend=name)) for name in names]
    for one in machines:
        one.check()
    found: list[Evaluation] = []
    try:
        for one in machines:
            path = hypotheses and (_named_for(hypotheses, one) if len(machines) > 1 else hypotheses)
            found.append(_evaluate(one, test_set, options, tokenize, path))
            if not found[-1].complete:
                say(f"interrupted: {found[-1].name} covers the first {found[-1].sentences} sentences")
                raise typer.Exit(130)
    finally:
        _show(found, json_file)


def _evaluate(
    machine: Machine, test_set: ParallelText, options: TranslateOptions, tokenize: str | None, path: Path | None
) -> Evaluation:
    """One backend's figures; its translations go to the file."""
    from kvx.runtime.measuring.evaluation import evaluate as run

    loaded = machine.load(bulk=True)
    with spinner(f"{machine.options.backend}: {len(test_set.sources)} sentences"):
        result, lines = run(loaded, test_set, options, tokenize=tokenize)
    if path:
        write_lines(path, lines)
    return result


def _show(found: list[Evaluation], json_file: Path | None) -> None:
    from kvx.runtime.measuring.evaluation import comparison

    if not found:
        return
    for line in comparison(found):
        typer.echo(line)
    for signature in (found[0].bleu.signature, found[0].chrf.signature):
        typer.echo(signature)
    if json_file:
        write_lines(json_file, json.dumps({"backends": [asdict(result) for result in found]}, indent=1).split("\n"))


def _backends(given: str) -> list[BackendName]:
    names = [name.strip() for name in given.split(",")]
    known: list[BackendName] = [one for name in names for one in BACKENDS if one == name]
    if len(known) < len(names):
        raise OptionError(
            f"`backend` is {given}",
            expected=f"some of {', '.join(BACKENDS)}, with commas between them",
            remedy="Correct `backend`.",
            option="backend",
        )
    return known


def _named_for(path: Path, machine: Machine) -> Path:
    return path.with_name(f"{path.stem}.{machine.options.backend}{path.suffix}")
