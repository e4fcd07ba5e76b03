"""Checkpoint files → a Transformer, one reader per format."""
