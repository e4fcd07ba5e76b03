"""The options of a translation, for the commands that translate."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kvx.commands.console import say
from kvx.commands.options import Described
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.search import BeamSearch, Sampling
from kvx.runtime.options import OPTIONS, PLAIN, TranslateKeywords, TranslateOptions
from kvx.runtime.rules import Option

DEFAULTS = {
    **{field.name: field.default for search in (BeamSearch, Sampling) for field in fields(search)},
    "beam_size": 1,
    "samples": None,  # the default of Sampling, which is not the default search
}


def _with_default(name: str, option: Option) -> Option:
    """The library's option, which also tells the default that stands with a search's own field."""
    default = DEFAULTS.get(name)
    if option.unset is not None or default is None:
        return option
    return replace(option, unset=name.replace("_", "-") if default is True else str(default))


TABLE = {name: _with_default(name, option) for name, option in OPTIONS.items()}


def options_of_a_translation(*only: str) -> Described:
    """These options of a translation, or all, as keyword arguments of TranslateOptions."""
    return Described(TranslateOptions, table=TABLE, types=TranslateKeywords, only=only, build=False)


def resolved_options(manifest: Manifest, given: dict[str, Any]) -> TranslateOptions:
    """The options that were given, on top of the defaults of a bundle, which are said. Raises OptionError."""
    options = PLAIN.resolved(manifest.defaults, **given)
    for file in dict.fromkeys(options.origins.values()):
        names = [name for name, origin in options.origins.items() if origin == file]
        said = ", ".join(f"{name} {manifest.defaults[name].value}" for name in names)
        greedy = " (--beam-size 1 for greedy search)" if "beam_size" in names else ""
        say(f"{said} by {file}{greedy}")
    return options


OPTIONS_OF_A_TRANSLATION = options_of_a_translation()
