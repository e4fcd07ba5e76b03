"""Checkpoint files → a Transformer, one reader per format."""

from kvx.models.importers.checkpoint import Checkpoint
from kvx.models.importers.detect import load_checkpoint
from kvx.models.importers.own import save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
