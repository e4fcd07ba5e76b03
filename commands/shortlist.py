"""`kvx shortlist train` and `kvx shortlist import`: shortlists from parallel text or a lexical table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvx.commands.console import say, spinner
from kvx.commands.options import Described, with_described_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.shortlist.lexicon import LexiconOptions, import_shortlist, train_shortlist
from kvx.runtime.text.lines import open_lines, read_file, read_lines

if TYPE_CHECKING:
    from kvx.runtime.shortlist.candidates import Shortlist

BundleOption = Annotated[Path, typer.Option("--bundle", help="The bundle that the shortlist is for.")]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Write the shortlist (.npz) to this file.")]


@with_described_options
def train(
    *,
    bundle: BundleOption,
    source: Annotated[Path, typer.Option(help="Source texts to learn from, one per line.")],
    target: Annotated[Path, typer.Option(help="Their translations, one per line.")],
    output: OutputOption,
    options: Annotated[LexiconOptions, Described(LexiconOptions)],
) -> None:
    """Learn a shortlist from parallel text."""
    opened, sources, targets = Bundle.open(bundle), read_file(source), read_file(target)
    with spinner(f"learning from {len(sources)} lines"):
        shortlist, coverage = train_shortlist(opened, sources, targets, options)
        shortlist.write(output)
    say(
        f"{_describe(shortlist, output)}; {coverage.candidates:.0f} candidates a sentence, "
        f"which hold {coverage.share:.2%} of this text's target tokens"
    )


@with_described_options
def import_(
    *,
    table: Annotated[
        Path,
        typer.Argument(
            help='The table. Each line is "target source probability", with the pieces of the bundle\'s tokenizers.'
        ),
    ],
    bundle: BundleOption,
    output: OutputOption,
    options: Annotated[LexiconOptions, Described(LexiconOptions, but=("iterations",))],
) -> None:
    """Make a shortlist from a lexical table, the lex.s2t that Marian uses."""
    opened = Bundle.open(bundle)
    with open_lines(table) as stream, spinner(f"reading {table}"):
        shortlist, read = import_shortlist(opened, read_lines(stream), options)
        shortlist.write(output)
    if read.unknown:
        say(
            f"{read.unknown} of {read.entries} entries have pieces that the tokenizers do not know "
            f"(the first on line {read.first_unknown})"
        )
    say(_describe(shortlist, output))


def _describe(shortlist: Shortlist, path: Path) -> str:
    targets = shortlist.targets_per_source
    pieces = sum(map(bool, targets))
    return (
        f"{path}, {path.stat().st_size / 1024:.0f} KiB: {pieces} of {len(targets)} source pieces, "
        f"{sum(targets) / max(pieces, 1):.1f} targets each, {len(shortlist.frequent)} frequent ones"
    )
