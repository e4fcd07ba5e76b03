"""The decoder step that feeds itself: greedy decoding whose whole state is bound in place.

ONNX Runtime does not know that an output is bound onto an input. So a node that writes over an input depends, by its
data, on every other reader of it: the token depends on all layers, the new length on the token, the place
of the token on the new length.

Letters: B rows, S source positions, T capacity of a row's cache, H heads, D head width, L decoder layers, V target
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvx.exporter.writing.graphs import caches_of, flatten
from kvx.models.operators import EAGER, Operators
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.framing import Framing
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, step_signature

NOTHING = -1  # what a finished row has instead of a token


class LoopGraph(nn.Module):
    """One token for every row that is not finished, and the state from which the next one follows.

    Of the `framing`, eos ends a row, pad is what a finished one gives, and what never comes is never chosen.
    """

    def __init__(self, model: Transformer, framing: Framing, features: StepFeatures, ops: Operators = EAGER) -> None:
        super().__init__()
        self.model = model
        self.ops = ops
        self.framing = framing
        self.signature = step_signature(Dimensions.of_model(model.config.to_dict(), model.element), features)
        self.register_buffer("never", torch.tensor(framing.never, dtype=torch.int64), persistent=False)
        self.never: Tensor

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
        return self._next(input_ids, past_lengths, source_lengths, limits, past_finished, past_ids, None, caches)

    def _next(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        source_lengths: Tensor,
        limits: Tensor,
        past_finished: Tensor,
        past_ids: Tensor,
        forced_ids: Tensor | None,
        caches: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        past, cross = caches_of(caches)
        positions = past_lengths.clamp(max=self.model.config.target_positions - 1)  # one finished there is beyond them
        lengths = past_lengths, source_lengths
        stepped = self.model.step(input_ids, *lengths, past, cross, self.ops, positions=positions)
        logits = stepped.logits
        if len(self.framing.never):
            logits = logits.index_fill(1, self.never, -math.inf)
        best = logits.argmax(dim=-1)
        finite = logits.gather(1, best[:, None])[:, 0].to(torch.float32).abs() < math.inf
        if forced_ids is not None:
            best = _forced(best, past_lengths, forced_ids)
        chosen = torch.where(past_finished | ~finite, NOTHING, best)
        over, advance = chosen < 0, (chosen >= 0).to(torch.int64)
        next_ids = torch.where(over, self.framing.pad, chosen)
        present_lengths = past_lengths + advance
        finished = over | (chosen == self.framing.eos) | (present_lengths >= limits)
        ids = past_ids.scatter(1, (present_lengths - advance)[:, None], next_ids[:, None])
        return next_ids, present_lengths, finished, ids, *flatten(stepped.presents)


class ForcedLoopGraph(LoopGraph):
    """The same, of a model whose targets begin with tokens that are not chosen."""

    def forward(  # type: ignore[override]  # the signature has one input more
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        source_lengths: Tensor,
        limits: Tensor,
        past_finished: Tensor,
        past_ids: Tensor,
        forced_ids: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        """As for a LoopGraph, with forced_ids [B, F]: the first F tokens of each row."""
        return self._next(input_ids, past_lengths, source_lengths, limits, past_finished, past_ids, forced_ids, caches)


def _forced(best: Tensor, past_lengths: Tensor, forced_ids: Tensor) -> Tensor:
    """best and past_lengths [B], forced_ids [B, F] → the next tokens [B]."""
    last = forced_ids.shape[1] - 1
    forced = forced_ids.gather(1, past_lengths.clamp(max=last)[:, None])[:, 0]
    return torch.where(past_lengths <= last, forced, best)
