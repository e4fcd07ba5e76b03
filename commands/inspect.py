"""`kvx inspect`: what is in a bundle."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvx.commands.options import BundleArgument
from kvx.runtime.bundle.folder import Bundle


def inspect(
    bundle: BundleArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest, which is JSON.")] = False,
) -> None:
    """Show what a bundle holds, what it needs, and its proof."""
    from kvx.runtime.bundle.description import describe

    opened = Bundle.open(bundle)
    lines = [json.dumps(opened.manifest.to_dict(), indent=1)] if as_json else describe(opened)
    for line in lines:
        typer.echo(line)
