"""transformers' `generate` in PyTorch, with its cache, on the weights of a kvx model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from m2m100 import build, translate  # type: ignore[import-not-found]
from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]


def prepare(_: Request) -> None:
    """Nothing: the model is built from the weights."""


def load(request: Request) -> Any:  # noqa: ANN401  # of a package without types
    """The model; torch's threads are the process's."""
    torch.set_num_threads(request["threads"])
    return build(Path(request["weights"]))


def run(model: Any, request: Request) -> Timed:  # noqa: ANN401
    """Translations by the model that `load` gave."""
    torch.set_num_threads(request["threads"])
    return translate(model, request)


if __name__ == "__main__":
    serve(Runner(prepare, load, run))
