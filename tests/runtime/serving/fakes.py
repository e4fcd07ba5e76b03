"""Models without bundles, for services in other processes, which import this module."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kvx import Translator
from kvx.runtime.serving.models import Model


def models_of(translators: Mapping[str, Translator]) -> list[Model]:
    """By the names of the models."""
    return [Model(name, translator) for name, translator in translators.items()]


def process(text: str) -> str:
    """A "translation": the number of the process that makes it."""
    return f"{os.getpid():08d}"
