"""kvx's own checkpoint, model.pt: configuration, weights and token limit in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import Checkpoint, build, is_same
from kvx.models.importers.reference import TIED
from kvx.runtime.errors import CheckpointError

KVX_FORMAT = "kvx-checkpoint-1"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes kvx's own format: configuration, weights and token limit in one file."""
    content = {
        "format": KVX_FORMAT,
        "config": checkpoint.model.config.to_dict(),
        "max_new_tokens": checkpoint.max_new_tokens,
        "state_dict": checkpoint.model.state_dict(),
    }
    torch.save(content, path)


def read(content: object, path: Path, heads: int | None) -> Checkpoint | None:
    """kvx's own checkpoint, or None for other content. It knows its head count: `heads` is not needed.

    Raises CheckpointError for one that is not whole.
    """
    if not isinstance(content, dict) or content.get("format") != KVX_FORMAT:
        return None
    config, state, limit = (content.get(name) for name in ("config", "state_dict", "max_new_tokens"))
    if not isinstance(config, dict) or not isinstance(state, dict) or type(limit) is not int or limit < 1:
        raise CheckpointError(
            f"{path} lacks its configuration, weights or token limit",
            expected="config, state_dict and max_new_tokens",
            remedy="Write the checkpoint again with kvx.",
        )
    return Checkpoint(build(ModelConfig.from_dict(_with_ties(config, state)), state, path), limit)


def _with_ties(config: Mapping[str, object], state: Mapping[str, object]) -> dict[str, object]:
    """The configuration, in which earlier releases did not say what is tied: what is one tensor is."""
    source, target, head = (state.get(name) for name in TIED)
    if "tied_head" in config:
        return dict(config)
    return {**config, "shared_embeddings": is_same(source, target), "tied_head": is_same(head, target)}
