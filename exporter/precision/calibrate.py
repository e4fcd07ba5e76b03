"""Fixed scales for `int8`: how large the inputs of every projection get on real text.

Measured once at export, as Marian does for its int8 models (https://aclanthology.org/2020.ngt-1.26), they spare the
runtime a pass over every row for its largest magnitude.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvx.models.eager import TorchBackend
from kvx.models.layers import Linear
from kvx.models.transformer import Transformer
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.filters import without
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.decoding.search import Greedy


def calibrate(model: Transformer, sources: Sequence[tuple[int, ...]], plan: Plan) -> None:
    """Notes, in every projection, the largest magnitude that its input has while the sources are translated.

    Each source and its greedy translation run alone through the teacher-forced model: padding has no say.
    """
    numbered = [Sentence(index, ids) for index, ids in enumerate(sources)]
    outcomes = list(decode(TorchBackend(model), numbered, Greedy(), plan, filters=without(plan.never)))
    with _measuring(model), torch.inference_mode():
        for outcome in outcomes:
            source = torch.tensor([sources[outcome.sentence.number]])
            target = torch.tensor([(*plan.start, *outcome.best.ids[:-1])])  # the last one is never fed
            model(source, torch.tensor([source.shape[1]]), target)


@contextlib.contextmanager
def _measuring(model: Transformer) -> Iterator[None]:
    def note(projection: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(projection, Linear)
        projection.largest_input = max(projection.largest_input or 0.0, float(inputs[0].abs().max()))

    projections = [module for module in model.modules() if isinstance(module, Linear)]
    hooks = [projection.register_forward_pre_hook(note) for projection in projections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
