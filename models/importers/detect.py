"""Which format a checkpoint has, and its reader."""

from __future__ import annotations

from pathlib import Path

from kvx.models.importers import own, reference
from kvx.models.importers.checkpoint import Checkpoint, describe, read_file
from kvx.runtime.errors import CheckpointError

READERS = (own.read, reference.read)  # each gives None for content of another format


def load_checkpoint(path: Path, *, heads: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: kvx's own file, or a bare state dict of the reference model.

    `heads` is the head count of a state dict, which cannot tell; kvx's own file can, and is believed. Raises
    CheckpointError.
    """
    content = read_file(path)
    for read in READERS:
        checkpoint = read(content, path, heads)
        if checkpoint is not None:
            return checkpoint
    raise CheckpointError(
        f"{path} holds {describe(content)}",
        expected="a state dict of the reference model (names to tensors) or a checkpoint written by kvx",
        remedy="Save the model with torch.save(model.state_dict(), file).",
    )
