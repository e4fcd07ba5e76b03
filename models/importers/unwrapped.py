"""What training leaves around and in a state dict: wrappers, the optimiser's state, prefixes, buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from kvx.models.importers.checkpoint import is_plain

WRAPPERS = ("state_dict", "model_state_dict", "model")  # what holds the weights, in the order of preference
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # of DataParallel and torch.compile
MASKS = re.compile(r"(?:^|[._])(?:mask|tril|triu)$|mask$")
INDICES = re.compile(r"(?:^|[._])(?:position_ids|pos_ids|positions)$")


def unwrapped(content: object) -> tuple[object, tuple[str, ...]]:
    """The state dict in a training state, without what wraps it and what can be derived, and notes on both; other
    content as it is.
    """
    content, notes = _without_wrapper(content)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return content, ()
    named = {PREFIXES.sub("", name): value for name, value in content.items()}
    if len(named) == len(content) and named.keys() != content.keys():
        found = {match[0] for name in content if (match := PREFIXES.match(name))}
        notes = (*notes, f"took the names without the prefix {' and '.join(sorted(found))}")
        content = named
    derived = [name for name, value in content.items() if _can_be_derived(name, value)]
    if derived:
        notes = (*notes, f"left out {', '.join(derived[:3])}{' …' if len(derived) > 3 else ''}, which can be derived")
    return {name: value for name, value in content.items() if name not in derived}, notes


def _without_wrapper(content: object) -> tuple[object, tuple[str, ...]]:
    if not isinstance(content, Mapping) or "format" in content:
        return content, ()
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            others = sorted(str(key) for key in content if key != name)
            beside = f", beside {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else ""
            return inner, (f"took the weights under {name!r}{beside}",)
    return content, ()


def _can_be_derived(name: str, value: object) -> bool:
    """Whether a tensor is a mask that says what comes later, or counts positions: its values decide, not its name."""
    if not isinstance(value, Tensor) or not is_plain(value):
        return False
    if INDICES.search(name):
        flat = value.flatten()
        return not value.is_floating_point() and torch.equal(flat, torch.arange(len(flat), dtype=flat.dtype))
    return bool(MASKS.search(name)) and value.ndim >= 2 and _is_triangular(value)


def _is_triangular(value: Tensor) -> bool:
    square = value.reshape(-1, *value.shape[-2:])[0]
    if square.shape[0] != square.shape[1] or square.numel() != value.numel():
        return False
    kept = square != square[0, -1] if len(square) > 1 else square == square
    lower = torch.ones_like(kept).tril()
    return torch.equal(kept, lower) or torch.equal(kept, ~lower)
