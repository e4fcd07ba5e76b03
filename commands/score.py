"""`kvx score`: how probable given translations are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvx.commands.console import check_output, spinner
from kvx.commands.machine import MachineOptions, load_and_say, open_bundle
from kvx.commands.options import Described, ModelOption, OutputOption, with_described_options
from kvx.commands.output import format_ranking
from kvx.commands.translation import options_of_a_translation
from kvx.runtime.engine.scoring import RankBy
from kvx.runtime.errors import OptionError
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.lines import output_file, read_file

OPTIONS_OF_A_SCORE = options_of_a_translation(
    "source_language", "target_language", "text_prefix", "rows", "workers", "cache_bytes"
)


@with_described_options
def score(
    *,
    source: Annotated[Path, typer.Option(help="The source texts, one per line.")],
    target: Annotated[Path, typer.Option(help="The translations to score, one per line.")],
    choices: Annotated[
        bool,
        typer.Option(
            "--choices",
            help="Rank candidates: each line of --target holds all candidates of one source, with tabs between.",
        ),
    ] = False,
    by: Annotated[
        RankBy | None,
        typer.Option(
            help="With --choices: rank by the total log-probability, or by its mean per token.  [default: sum]"
        ),
    ] = None,
    model: ModelOption = None,
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    given: Annotated[dict[str, Any], OPTIONS_OF_A_SCORE],
    output: OutputOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each line, with every token and candidate.")
    ] = False,
) -> None:
    """Print the log-probabilities of given translations.

    Each line has the total, the mean per token and the number of tokens, with tabs between. The end token counts.
    Logarithms are natural. With --choices, each line has the best candidate, its lead over the next one, and its total.
    """
    check_output(output)
    if by is not None and not choices:
        raise OptionError(
            "`by` has no effect without `choices`",
            expected="candidates to rank",
            remedy="Add `choices`, or leave out `by`.",
            option="by",
        )
    sources, lines = read_file(source), read_file(target)
    candidates = [line.split("\t") if choices else [line] for line in lines]
    options = TranslateOptions(**given)
    translator = load_and_say(open_bundle(model), machine, bulk=True, named=model is not None)
    with spinner(f"scoring {len(lines)} lines"):
        rankings = translator.rank(sources, candidates, by=by or "sum", options=options)
    with output_file(output) as out:
        for texts, ranking in zip(candidates, rankings, strict=True):
            out.write(format_ranking(texts, ranking, choices=choices, as_json=as_json) + "\n")
