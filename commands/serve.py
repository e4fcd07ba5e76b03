"""`kvx serve`: bundles behind HTTP; and `kvx key`, which makes API keys for it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kvx.commands.console import require, say
from kvx.commands.machine import Machine, MachineOptions
from kvx.commands.options import Described, with_described_options
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.engine.core import EngineOptions
from kvx.runtime.serving.keys import Keys, new_key
from kvx.runtime.serving.settings import ServeOptions

if TYPE_CHECKING:
    from kvx import Translator

NEEDS = ("starlette", "uvicorn", "msgspec", "prometheus_client", "python_multipart", "sentencex", "langcodes")
ENVIRONMENT = "KVX_"


@with_described_options(environment=ENVIRONMENT)
def serve(
    *,
    bundles: Annotated[
        list[str],
        typer.Argument(
            help="Bundles, which kvx export wrote, or folders that hold some. de-en=BUNDLE says which languages a "
            "bundle is for; a bundle whose folder is called de-en needs no more.",
            envvar=f"{ENVIRONMENT}BUNDLES",
        ),
    ],
    options: Annotated[ServeOptions, Described(ServeOptions)],
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    engine: Annotated[EngineOptions, Described(EngineOptions, only=("rows", "cache_bytes"))],
) -> None:
    """Serve bundles over HTTP: kvx's own API, LibreTranslate's, and a page to try them.

    Every option is also read from the environment: --client-requests from KVX_CLIENT_REQUESTS. SIGTERM ends the
    service after the requests that it has, SIGHUP loads the bundles again.
    """
    require(*NEEDS, "py3langid", extra="serve")
    require("onnxruntime", extra="gpu")
    from kvx.runtime.serving.models import check_places, load_models, places_of
    from kvx.runtime.serving.server import serve as run
    from kvx.runtime.serving.service import Service, engine_options

    check_places(places_of(bundles))
    keys = None if options.keys is None else Keys.read(options.keys)
    if keys is None and not options.is_local:
        say(f"warning: {options.host} can be reached by others, and nobody needs a key (--keys)")
    size = engine_options(options, rows=engine.rows, cache_bytes=engine.cache_bytes)
    load = partial(_load, machine, size)
    run(Service(options, keys=keys), lambda: load_models(places_of(bundles), load), _said)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is: what logs call its owner.")],
) -> None:
    """Make an API key for kvx serve.

    The key goes to standard error, for its owner. What belongs into the file of --keys goes to standard output:
    kvx key alice >> keys.toml
    """
    made, lines = new_key(name)
    say(f"the key of {name}: {made}")
    typer.echo(lines)


def _load(machine: MachineOptions, size: EngineOptions, bundle: Bundle) -> Translator:
    """A bundle in memory, with what every request needs ready."""
    from kvx import Translator

    chosen = Machine.of(bundle, machine)
    translator = Translator(chosen.load(bulk=True), size)
    translator.engine.warm()
    say(f"loaded {bundle.folder} on {machine.backend}, {', '.join(map(str, chosen.devices))}")
    return translator


def _said(address: str) -> None:
    say(f"{address} (page), {address}/docs (API)")
