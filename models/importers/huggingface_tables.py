"""The tables of tokens of a Hugging Face file: shared, apart, tied to the head, and saved under several names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvx.models.importers.checkpoint import is_same, refuse_tensors

SHARED, HEAD = "shared.weight", "lm_head.weight"
TABLES = {"encoder": "encoder.embed_tokens.weight", "decoder": "decoder.embed_tokens.weight"}


class Tables(NamedTuple):
    """The tables of tokens of both sides, and the head's own where it is not the target's."""

    source: Tensor
    target: Tensor
    head: Tensor | None

    @property
    def state(self) -> dict[str, Tensor]:
        """By our names."""
        return {
            "source_embedding.tokens.weight": self.source,
            "target_embedding.tokens.weight": self.target,
            "head.weight": self.target if self.head is None else self.head,
        }

    @property
    def parts(self) -> dict[str, object]:
        """The fields of a configuration that follow from them."""
        return {
            "source_vocab_size": rows(self.source),
            "target_vocab_size": rows(self.target),
            "shared_embeddings": self.source is self.target,
            "tied_head": self.head is None,
        }


def read_tables(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tables:
    """The tables of tokens. Those that a file lacks are others of it; those that it has twice are one. Raises
    CheckpointError.
    """
    shared, head = tensors.get(SHARED), tensors.get(HEAD)
    own = {side: tensors.get(name) for side, name in TABLES.items()}
    apart = config.get("share_encoder_decoder_embeddings", True) is False
    anywhere = shared if shared is not None else head if head is not None and not apart else None
    for side, table in own.items():
        other = own["decoder" if side == "encoder" else "encoder"] if not apart else None
        fallback = anywhere if anywhere is not None else other
        if table is None and fallback is None:
            refuse_tensors(path, [f"missing {TABLES[side]}"])
        own[side] = fallback if table is None else table
    source, target = own["encoder"], own["decoder"]
    assert source is not None
    assert target is not None
    target = source if is_same(source, target) else target
    if head is None and config.get("tie_word_embeddings", True) is False:
        refuse_tensors(path, [f"missing {HEAD}, although config.json says that it is not tied"])
    return Tables(source, target, None if head is None or is_same(head, target) else head)


def rows(table: Tensor | None) -> int:
    """What is missing has one, for an error that names it."""
    return len(table) if table is not None and table.ndim else 1
