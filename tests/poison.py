"""What a cache may hold where nothing may matter."""

from __future__ import annotations

import numpy as np

from kvx.runtime.decoding.cache import KVCache

POISON = 1e30


def poison(cache: KVCache, *, beyond: float, idle: float) -> None:
    """Fills what lies beyond the lengths, and the rows that nobody has."""
    for spec in cache.specs:
        buffer = cache.buffers[spec.name]
        lengths = cache.source_lengths if "S" in spec.axes else cache.lengths + 1
        outside = np.arange(buffer.shape[2]) >= lengths[: len(buffer), None]
        np.copyto(buffer, np.float32(beyond), where=outside[:, None, :, None])
        buffer[cache.seated if spec.axes[0] == "G" else cache.active :] = idle
