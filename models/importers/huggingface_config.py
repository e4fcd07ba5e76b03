"""What config.json of a Hugging Face folder says of a model, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvx.models.config import LARGEST_SIZE
from kvx.models.importers.tokenizer_settings import has, read_object
from kvx.runtime.errors import CheckpointError

CONFIG_FILE = "config.json"

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError."""
    if not has(folder, CONFIG_FILE):
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}",
            expected="a folder that save_pretrained wrote, or a snapshot of a hub",
            remedy="Name the folder with config.json, weights and tokenizer, or the file of a checkpoint.",
        )
    return read_object(folder / CONFIG_FILE)


def read_sizes(path: Path, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The sizes of a config.json at a path, by our names; `names` has theirs. Raises CheckpointError."""
    wrong = [f"{theirs} = {config.get(theirs)!r:.40}" for theirs in names.values() if not _is_size(config.get(theirs))]
    if wrong:
        raise CheckpointError(
            f"{path} has {', '.join(wrong)}",
            expected=f"whole numbers from 1 to {LARGEST_SIZE}",
            remedy="Save the model again with save_pretrained, or correct the sizes.",
        )
    return {ours: config[theirs] for ours, theirs in names.items()}


def read_activation(path: Path, setting: str, name: object) -> str:
    """Our name of the activation that a `setting` of a config.json names. Raises CheckpointError."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path} has the {setting} {name!r:.60}",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            remedy="This activation is not supported.",
        )
    return ACTIVATIONS[name]


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE
