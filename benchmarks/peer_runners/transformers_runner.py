"""transformers' `generate` in PyTorch, with its cache, on a Hugging Face folder or on the weights of a kvx model."""

from __future__ import annotations

from typing import Any

import torch
from generating import model_of, translate  # type: ignore[import-not-found]
from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]


def prepare(_: Request) -> None:
    """Nothing: the model is loaded from the folder or built from the weights."""


def load(request: Request) -> Any:  # noqa: ANN401  # of a package without types
    """The model; torch's threads are the process's."""
    torch.set_num_threads(request["threads"])
    return model_of(request)


def run(model: Any, request: Request) -> Timed:  # noqa: ANN401
    """Translations by the model that `load` gave."""
    torch.set_num_threads(request["threads"])
    return translate(model, request)


if __name__ == "__main__":
    serve(Runner(prepare, load, run))
