"""`kvx export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvx.commands.console import reporting, require
from kvx.commands.machine import ready_torch
from kvx.commands.verify import (
    BleuLostOption,
    EqualLinesOption,
    ToleranceOption,
    VerifyReferenceOption,
    VerifyTextOption,
)
from kvx.runtime.bundle.manifest import Precision


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A state dict of the reference model, or kvx's own model.pt.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The bundle's folder.  [default: artifacts/<name of the checkpoint's folder>]"
        ),
    ] = None,
    source_tokenizer: Annotated[
        Path | None,
        typer.Option(help="The sentencepiece model of the source.  [default: source.model beside the checkpoint]"),
    ] = None,
    target_tokenizer: Annotated[
        Path | None,
        typer.Option(help="The sentencepiece model of the target.  [default: target.model beside the checkpoint]"),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="The number of attention heads.  [default: d_model / 64]")] = None,
    format_: Annotated[
        Literal["onnx", "torchscript", "both"] | None,
        typer.Option("--format", help="What to write.  [default: both; onnx with fewer bits or for CUDA]"),
    ] = None,
    lowering: Annotated[
        Literal["ort", "standard", "cuda"] | None,
        typer.Option(
            help="The operators of the ONNX graphs: ONNX Runtime's own, those of the standard only, or those that a "
            "captured CUDA graph may hold.  [default: ort; cuda with fp16 and bf16]"
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="fp16 or bf16 for CUDA, int8 weights for many sentences at a time, int4 weights for one."),
    ] = "fp32",
    calibration: Annotated[
        Path | None, typer.Option(help="Fix the scales of int8 on the lines of this file, which makes it faster.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The bundle's default limit of the tokens of a translation.")
    ] = None,
    attention: Annotated[
        bool,
        typer.Option("--with-attention", help="Let steps also give what a decoder layer attends to in the source."),
    ] = False,
    attention_layer: Annotated[
        int | None, typer.Option(help="The layer of --with-attention, counted from 0.  [default: the last]")
    ] = None,
    verify_text: VerifyTextOption = None,
    verify_reference: VerifyReferenceOption = None,
    verify_: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the export before it is kept.")] = True,
    tolerance: ToleranceOption = None,
    equal_lines: EqualLinesOption = None,
    bleu_lost: BleuLostOption = None,
    shortlist: Annotated[
        bool,
        typer.Option("--with-shortlist", help="Also write what translating with a shortlist needs. Only for onnx."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")] = False,
) -> None:
    """Export a checkpoint to a bundle, and prove it equal to eager PyTorch."""
    ready_torch()
    if verify_reference is not None:
        require("sacrebleu", extra="evaluate")
    from kvx.exporter.export import ExportOptions
    from kvx.exporter.export import export as run
    from kvx.exporter.proof.trial import ParityOptions
    from kvx.runtime.bundle.description import describe_parity

    options = ExportOptions(
        checkpoint=checkpoint,
        output=output,
        source_tokenizer=source_tokenizer,
        target_tokenizer=target_tokenizer,
        heads=heads,
        format=format_,
        lowering=lowering,
        precision=precision,
        calibration=calibration,
        max_new_tokens=max_new_tokens,
        attention=attention,
        attention_layer=attention_layer,
        verify=verify_,
        verify_text=verify_text,
        verify_reference=verify_reference,
        parity=ParityOptions(tolerance=tolerance, equal_lines=equal_lines, bleu_lost=bleu_lost),
        force=force,
        shortlist=shortlist,
    )
    with reporting() as report:
        manifest = run(options, report)
    for line in describe_parity(manifest.parity, tensors=False):
        typer.echo(line, err=True)
    typer.echo(options.folder)
