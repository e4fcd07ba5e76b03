"""Which format a checkpoint has, and its reader."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kvx.models.importers import own, reference
from kvx.models.importers.checkpoint import Checkpoint, describe, read_file
from kvx.models.importers.folder import read_tensors
from kvx.models.importers.huggingface import read_folder
from kvx.models.importers.unwrapped import unwrapped
from kvx.runtime.errors import CheckpointError

READERS = (own.read, reference.read)  # each gives None for content of another format


def load_checkpoint(path: Path, *, heads: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: kvx's own file, a state dict of the reference model, or a folder of Hugging Face.

    `heads` is the head count of a state dict, which cannot tell; kvx's own file can, and is believed. Raises
    CheckpointError.
    """
    if os.path.isdir(path):  # noqa: PTH112  # pathlib raises for names that cannot be one
        return read_folder(path)
    content, notes = unwrapped(read_tensors(path) if path.suffix == ".safetensors" else read_file(path))
    for read in READERS:
        checkpoint = read(content, path, heads)
        if checkpoint is not None:
            return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    raise CheckpointError(
        f"{path} holds {describe(content)}",
        expected="a state dict of the reference model (names to tensors) or a checkpoint written by kvx",
        remedy="Save the model with torch.save(model.state_dict(), file).",
    )
