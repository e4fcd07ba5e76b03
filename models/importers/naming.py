"""Names of tensors: ours, and those of a file by patterns, in which {} is the number of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import expected_shapes

SIDES = {"encoder": "source", "decoder": "target"}
NORM_PARAMETERS = {"gamma": "weight", "beta": "bias"}  # as torch calls them
NUMBER = re.compile(r"(?<=_layers\.|_biases\.)\d+(?=\.)")


class Named(NamedTuple):
    """The tensors of a model by our names, and the file's names of them for messages. What has no place in the model
    keeps the name that it has in the file.
    """

    state: dict[str, Tensor]
    names: dict[str, str]


def named(
    config: ModelConfig, tensors: Mapping[str, Tensor], patterns: Mapping[str, str], apart: re.Pattern[str]
) -> Named:
    """The tensors of a file that are a model's by these patterns of ours to theirs. Those whose names are `apart` are
    dealt with elsewhere, or known to mean nothing.
    """
    names = {ours: _theirs(ours, patterns) for ours in expected_shapes(config)}
    state = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    used = set(names.values())
    left = {name: tensor for name, tensor in tensors.items() if name not in used and not apart.fullmatch(name)}
    return Named(state | left, names)


def layer_patterns(
    side: str,
    theirs: str,
    *,
    attentions: Mapping[str, str],
    projections: Mapping[str, str],
    feed_forward: Mapping[str, str],
    norms: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Our names of what is in the layers of a side, and those of a file whose layers begin with `theirs`; the mappings
    say how it calls each part.
    """
    ours = f"{side}_layers.{{}}"
    for kind in ("weight", "bias"):
        for attention, called in attentions.items():
            for part, projection in projections.items():
                yield f"{ours}.{attention}.{part}.{kind}", f"{theirs}.{called}.{projection}.{kind}"
        for part, layer in feed_forward.items():
            yield f"{ours}.feed_forward.{part}.{kind}", f"{theirs}.{layer}.{kind}"
    for norm, called in norms.items():
        for parameter, kind in NORM_PARAMETERS.items():
            yield f"{ours}.{norm}.{parameter}", f"{theirs}.{called}.{kind}"


def _theirs(ours: str, patterns: Mapping[str, str]) -> str:
    """The file's name of one of our tensors; ours where the file never has it by itself."""
    number = NUMBER.search(ours)
    pattern = patterns.get(NUMBER.sub("{}", ours), ours)
    return pattern.format(number[0]) if number else pattern


def size(tensor: object, axis: int) -> int:
    """The size of an axis; what is missing has one, for an error that names it."""
    return tensor.shape[axis] if isinstance(tensor, Tensor) and tensor.ndim > axis and tensor.shape[axis] else 1


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many numbers of layers stand for {} in a prefix of names, one at the least."""
    pattern = re.compile(re.escape(prefix).replace(r"\{\}", r"(\d+)") + r"\.")
    return max(1, len({match[1] for name in names if (match := pattern.match(name))}))
