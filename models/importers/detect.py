"""Which format a checkpoint has, and its reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path

from torch import Tensor

from kvx.models.importers import fairseq, marian, opennmt, own, reference
from kvx.models.importers import layout as layouts
from kvx.models.importers.checkpoint import NAMED_PROBLEMS, Checkpoint, describe, is_state_dict, read_file
from kvx.models.importers.folder import read_tensors
from kvx.models.importers.huggingface import read_folder as read_huggingface
from kvx.models.importers.huggingface_config import CONFIG_FILE
from kvx.models.importers.layout_draft import draft
from kvx.models.importers.tokenizer_settings import has
from kvx.models.importers.unwrapped import unwrapped
from kvx.runtime.errors import CheckpointError

FOREIGN = (fairseq.read, opennmt.read)  # each gives None for content of another format, as these do
READERS = (own.read, reference.read)  # what training leaves around is taken off before
PLUGINS = "kvx.importers"  # entry points of other packages: a path → its checkpoint, or None
FAIRSEQ_FILES = ("checkpoint_best.pt", "checkpoint_last.pt")
MARIAN_FILE = "model.npz"

Importer = Callable[[Path], Checkpoint | None]


def load_checkpoint(path: Path, *, heads: int | None = None, layout: Path | None = None) -> Checkpoint:
    """The checkpoint at `path`: a file of kvx's own, of fairseq or with a state dict, or a folder of Hugging Face or
    fairseq; or one that an importer of another package takes.

    `heads` is the head count of a state dict, which cannot tell; kvx's own file can, and is believed. `layout` is a
    file that names the parts of a model of one's own. Raises CheckpointError and TokenizerError.
    """
    if layout is not None:
        content, notes = read_state_dict(path)
        checkpoint = layouts.read(layouts.Layout.read(layout), content, path)
        return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    for plugin in entry_points(group=PLUGINS):
        importer: Importer = plugin.load()
        if (found := importer(path)) is not None:
            return found
    if os.path.isdir(path):  # noqa: PTH112  # pathlib raises for names that cannot be one
        return _read_folder(path)
    return _read_file(path, heads)


def read_state_dict(path: Path) -> tuple[object, tuple[str, ...]]:
    """What a file holds, without what training left around a state dict, and notes on that. Raises CheckpointError."""
    return unwrapped(_content(path))


def draft_of(path: Path) -> tuple[str, tuple[str, ...]]:
    """A first layout for the state dict in a file, and sentences about what it does not tell. Raises the same."""
    content, notes = read_state_dict(path)
    if not is_state_dict(content):
        raise CheckpointError(
            f"{path} holds {describe(content)}",
            expected="a state dict: tensors by name",
            remedy="Save the model with torch.save(model.state_dict(), file).",
        )
    text, more = draft(content)
    return text, (*notes, *more)


def _read_folder(folder: Path) -> Checkpoint:
    for name in (*FAIRSEQ_FILES, MARIAN_FILE):
        if has(folder, name) and not has(folder, CONFIG_FILE):
            return _read_file(folder / name, None)
    return opennmt.read_folder(folder) if opennmt.reads(folder) else read_huggingface(folder)


def _read_file(path: Path, heads: int | None) -> Checkpoint:
    if path.suffix == ".npz":
        return marian.read(path)
    whole = _content(path)
    for read_foreign in FOREIGN:
        if (foreign := read_foreign(whole, path)) is not None:
            return foreign
    content, notes = unwrapped(whole)
    for read in READERS:
        checkpoint = read(content, path, heads)
        if checkpoint is not None:
            return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    if is_state_dict(content) and content:
        raise _unknown(path, content)
    raise CheckpointError(
        f"{path} holds {describe(content)}",
        expected="a state dict (names to tensors), a checkpoint of fairseq, or one that kvx wrote",
        remedy="Save the model with torch.save(model.state_dict(), file).",
    )


def _content(path: Path) -> object:
    return read_tensors(path) if path.suffix == ".safetensors" else read_file(path)


def _unknown(path: Path, tensors: Mapping[str, Tensor]) -> CheckpointError:
    """What a state dict of another model looks like, and what can be done."""
    first = islice(tensors.items(), NAMED_PROBLEMS)
    shown = ", ".join(f"{name!s:.80} {list(tensor.shape)}" for name, tensor in first)
    return CheckpointError(
        f"{path} holds {len(tensors)} tensors of a model that kvx does not know: {shown}{', …' * (len(tensors) > 10)}",
        expected="the names of the reference model, or a `layout` for others",
        remedy="Draft one with kvx export --write-layout FILE, and check it. docs/models.md has an example.",
    )
