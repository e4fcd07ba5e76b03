"""Tables of tokens that training made larger than the vocabulary, so that a multiple of some number comes out."""

from __future__ import annotations

import torch
from torch import nn

from kvx.models.config import ModelConfig
from kvx.models.transformer import Transformer

FEW = 16  # more than this part of a table is no padding
MULTIPLES = tuple(2**power for power in range(3, 11))  # what tables are padded to


def cut_to_vocabularies(model: Transformer, source: int, target: int) -> tuple[Transformer, tuple[str, ...]]:
    """The model without the rows that no piece of its tokenizers has, where they are padding, and notes on them.

    What has more rows for another reason stays as it is.
    """
    config = model.config
    rows = {"source": config.source_vocab_size, "target": config.target_vocab_size}
    cut = {side: size for side, size in (("source", source), ("target", target)) if _is_padded(rows[side], size)}
    if not cut or (config.shared_embeddings and source != target):
        return model, ()
    notes = tuple(
        f"cut the {side} embedding from {rows[side]} to {size} rows, the pieces of its tokenizer"
        for side, size in cut.items()
    )
    sizes = {f"{side}_vocab_size": size for side, size in cut.items()}
    with torch.device("meta"):
        smaller = Transformer(ModelConfig.from_dict(config.to_dict() | sizes))
    state = model.state_dict()
    for side, size in cut.items():
        _cut(state, f"{side}_embedding.tokens.weight", size)
    if "target" in cut:
        for name in ("head.weight", "head.bias"):
            _cut(state, name, cut["target"])
    smaller.load_state_dict(state, assign=True)
    smaller.tie()
    return smaller.eval().requires_grad_(requires_grad=False), notes


def _cut(state: dict[str, torch.Tensor], name: str, size: int) -> None:
    if name in state:
        state[name] = nn.Parameter(state[name][:size].clone(), requires_grad=False)


def _is_padded(rows: int, pieces: int) -> bool:
    """Whether rows are what pieces become when a table is padded, and not those of another tokenizer."""
    few = 0 < rows - pieces < max(MULTIPLES[0], rows // FEW)
    return few and any(-(-pieces // multiple) * multiple == rows for multiple in MULTIPLES)
