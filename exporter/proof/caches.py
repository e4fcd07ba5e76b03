"""Caches under trial: poisoned beyond their lengths, and compared within them.

Letters: B rows, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.exporter.proof.report import Differences
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.signature import STEP_BYTES
from kvx.runtime.decoding.cache import KVCache

POISON = 1e30  # any finite number may lie beyond a row's length
HALF_POISON = 6e4  # in float16


def numbers(held: NDArray[Any]) -> NDArray[Any]:
    """Keys or values as a cache holds them → [..., D], also of codes and the step behind them [..., D + 4]."""
    if held.dtype != np.int8:
        return held
    steps = np.ascontiguousarray(held[..., -STEP_BYTES:]).view(np.float32)
    return held[..., :-STEP_BYTES] * steps


def codes(array: NDArray[Any]) -> NDArray[np.int8]:
    """[..., D] → codes in steps of the largest magnitude / 127, and the step behind them [..., D + 4]."""
    peaks = np.abs(array).max(axis=-1, keepdims=True).astype(np.float32)
    steps = np.where(peaks > 0, peaks, 1) / np.float32(127)
    return np.concatenate([np.rint(array / steps).astype(np.int8), steps.view(np.int8)], axis=-1)


def held_as(buffer: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    """[..., D] as a cache of this type holds it."""
    return codes(array) if buffer.dtype == np.int8 else array.astype(buffer.dtype)


def inside(array: NDArray[Any], lengths: IntArray) -> NDArray[Any]:
    """[B, H, positions, D] → the numbers at the positions within the rows' lengths [sum of lengths, H, D]."""
    positions: NDArray[Any] = numbers(array).transpose(0, 2, 1, 3)
    return positions[np.arange(positions.shape[1]) < lengths[:, None]]


def outside(array: NDArray[Any], lengths: IntArray) -> NDArray[Any]:
    """[B, H, positions, D] → the positions beyond the rows' lengths [their number, H, D]."""
    positions: NDArray[Any] = array.transpose(0, 2, 1, 3)
    return positions[np.arange(positions.shape[1]) >= lengths[:, None]]


def compare_caches(found: Differences, expected: Tensors, tried: KVCache, before: Tensors, spare: int = 0) -> None:
    """What was written into the rows that are expected, that nothing else was, in no row, but in `spare` positions
    beyond its length, and that the sources are as they were.
    """
    for spec in tried.specs:
        name, old, new = spec.name, before[spec.name], tried.buffers[spec.name]
        if "S" in spec.axes:
            found.require_equal(f"{name} left as it is", old, new)
            continue
        rows = len(expected[name])
        lengths = tried.lengths[:rows]
        found.add(name, inside(expected[name], lengths), inside(new[:rows], lengths))
        kept = outside(old, tried.lengths + spare), outside(new, tried.lengths + spare)
        found.require_equal(f"{name} beyond the lengths", *kept)


def poison(cache: KVCache, random: np.random.Generator) -> None:
    """Puts ±POISON wherever no position of a row's own or of its source is."""
    for spec in cache.specs:
        buffer, lengths = cache.buffers[spec.name], cache.source_lengths if "S" in spec.axes else cache.lengths
        outside = np.arange(buffer.shape[2]) >= lengths[:, None]
        largest = HALF_POISON if buffer.dtype == np.float16 else POISON
        drawn = random.choice([-largest, largest], size=numbers(buffer).shape)
        np.copyto(buffer, held_as(buffer, drawn), where=outside[:, None, :, None])
