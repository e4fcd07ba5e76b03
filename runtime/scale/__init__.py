"""Files of any size in shards, on one machine or on Ray. Parquet needs the extra `scale`, clusters the extra `ray`."""

from kvx.runtime.scale.batches import TranslateBatches

__all__ = ["TranslateBatches"]
