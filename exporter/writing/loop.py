"""The decoder step that feeds itself: greedy decoding whose whole state is bound in place.

ONNX Runtime does not know that an output is bound onto an input. So a node that writes over an input depends, by its
data, on every other reader of it: the token depends on all layers, the new length on the token, the place
of the token on the new length.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width, L decoder layers, V target
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvx.exporter.writing.graphs import caches_of, flatten
from kvx.models.operators import EAGER, Operators
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.manifest import SpecialIds
from kvx.runtime.bundle.signature import LOOP_FEATURES, Dimensions, step_signature

NOTHING = -1  # what a finished row has instead of a token


class LoopGraph(nn.Module):
    """One token for every row that is not finished, and the state from which the next one follows.

    `special_ids` are the target's: eos ends a row, pad is what a finished one gives.
    """

    def __init__(self, model: Transformer, special_ids: SpecialIds, ops: Operators = EAGER) -> None:
        super().__init__()
        self.model = model
        self.ops = ops
        self.special_ids = special_ids
        self.signature = step_signature(Dimensions.of_model(model.config.to_dict(), model.element), LOOP_FEATURES)

    def forward(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        source_lengths: Tensor,
        limits: Tensor,
        past_finished: Tensor,
        past_ids: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        """Ids, lengths, limits and finished [B], past_ids [B, T], then key and value per layer: L self [B, H, T, D],
        L cross [B, H, S, D] → next_ids, present_lengths, present_finished [B], present_ids [B, T], 2·L self caches.

        A finished row writes pad beyond its length, over what it wrote there before. So does a row whose logits are
        not finite: it is finished, but has neither ended nor reached its limit.
        """
        past, cross = caches_of(caches)
        positions = past_lengths.clamp(max=self.model.config.target_positions - 1)  # one finished there is beyond them
        lengths = past_lengths, source_lengths
        stepped = self.model.step(input_ids, *lengths, past, cross, self.ops, positions=positions)
        best = stepped.logits.argmax(dim=-1)
        finite = stepped.logits.gather(1, best[:, None])[:, 0].to(torch.float32).abs() < math.inf
        chosen = torch.where(past_finished | ~finite, NOTHING, best)
        over, advance = chosen < 0, (chosen >= 0).to(torch.int64)
        next_ids = torch.where(over, self.special_ids.pad, chosen)
        present_lengths = past_lengths + advance
        finished = over | (chosen == self.special_ids.eos) | (present_lengths >= limits)
        ids = past_ids.scatter(1, (present_lengths - advance)[:, None], next_ids[:, None])
        return next_ids, present_lengths, finished, ids, *flatten(stepped.presents)
