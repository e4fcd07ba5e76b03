"""Folders of Hugging Face transformers: which families are read, and the order of reading one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers import huggingface_bart, huggingface_t5
from kvx.models.importers.checkpoint import Checkpoint, build
from kvx.models.importers.folder import read_weights
from kvx.models.importers.huggingface_config import CONFIG_FILE, read_config
from kvx.models.importers.huggingface_generation import Generation
from kvx.models.importers.huggingface_text import read_text
from kvx.models.importers.naming import Named
from kvx.models.importers.tokenizer_settings import has, read_object
from kvx.runtime.errors import CheckpointError

GENERATION_FILE = "generation_config.json"

# Of each `model_type`: the file of the weights, its tensors and config.json → the model.
CONVERTERS: Mapping[str, Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], tuple[ModelConfig, Named]]] = {
    **dict.fromkeys(huggingface_bart.FAMILIES, huggingface_bart.convert),
    **dict.fromkeys(huggingface_t5.FAMILIES, huggingface_t5.convert),
}
REFUSED = {
    "nllb-moe": "mixtures of experts are not supported",
    "switch_transformers": "mixtures of experts are not supported",
    "longt5": "its local and transient-global attention is not supported",
}


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder, with its tokenizers, framing, languages and defaults. Raises CheckpointError and
    TokenizerError.
    """
    config = read_config(folder)
    family = _family(folder, config)
    settings = read_object(folder / GENERATION_FILE) if has(folder, GENERATION_FILE) else {}
    generation = Generation(settings, GENERATION_FILE) if settings else Generation(config, CONFIG_FILE)
    path, tensors = read_weights(folder)
    made, found = CONVERTERS[family](path, tensors, config)
    model = build(made, found.state, path, found.names)
    text = read_text(folder, config, settings, made.source_vocab_size, made.target_vocab_size)
    forced = len(text.framing.forced)
    limit, notes = generation.limit(made.target_positions - forced, forced)
    defaults, more = generation.defaults(text.framing, made.target_vocab_size, limit)
    return Checkpoint(model, limit, (*text.notes, *notes, *more), family=family, text=text, defaults=defaults)


def _family(folder: Path, config: Mapping[str, Any]) -> str:
    """The `model_type` of a folder that is read. Raises CheckpointError."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONVERTERS:
        return kind
    why = f", and {REFUSED[kind]}" if isinstance(kind, str) and kind in REFUSED else ""
    raise CheckpointError(
        f"{folder / CONFIG_FILE} says that the model is of the type {kind!r:.60}{why}",
        expected=f"one of {', '.join(CONVERTERS)}",
        remedy="Only these families are read from a folder. docs/models.md has the list.",
    )
