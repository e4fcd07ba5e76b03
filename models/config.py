"""The shape of a model, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from kvx.runtime.errors import CheckpointError
from kvx.runtime.rules import Option, count, flag, wrong_values

LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
SIZE, LAYERS = count(LARGEST_SIZE), count(MOST_LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that the weights of a pre-norm encoder-decoder Transformer do not say by themselves.

    Raises one CheckpointError that names every field that is wrong.
    """

    source_vocab_size: Annotated[int, Option(SIZE, "The rows of the source embedding.")]
    target_vocab_size: Annotated[int, Option(SIZE, "The rows of the target embedding.")]
    d_model: Annotated[int, Option(SIZE, "The width of the model.")]
    heads: Annotated[int, Option(SIZE, "The heads of each attention, which divide d_model.")]
    d_ff: Annotated[int, Option(SIZE, "The width within the feed-forward parts.")]
    encoder_layers: Annotated[int, Option(LAYERS, "The layers of the encoder.")]
    decoder_layers: Annotated[int, Option(LAYERS, "The layers of the decoder.")]
    source_positions: Annotated[int, Option(SIZE, "The rows of the source's position table, bos and eos included.")]
    target_positions: Annotated[int, Option(SIZE, "The rows of the target's position table, bos and eos included.")]
    attention_bias: Annotated[bool, Option(flag(), "Whether the projections of attention have biases.")] = False

    def __post_init__(self) -> None:
        wrong = [f"{problem.option} = {getattr(self, problem.option)!r}" for problem in wrong_values(self)]
        if not wrong and self.d_model % self.heads:
            wrong.append(f"{self.heads} heads that do not divide d_model {self.d_model}")
        if wrong:
            raise CheckpointError(
                f"The model configuration has {'; '.join(wrong)}",
                expected=f"sizes from 1 to {LARGEST_SIZE}, layers up to {MOST_LAYERS} and heads that divide d_model",
                remedy="Correct the configuration. The option `heads` sets the head count of a state dict.",
            )

    @property
    def head_width(self) -> int:
        """D: channels of one attention head."""
        return self.d_model // self.heads

    def to_dict(self) -> dict[str, int]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The configuration that `to_dict` wrote. Raises CheckpointError for missing or unknown fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        missing, unknown = sorted(required - values.keys()), sorted(map(str, values.keys() - names))
        if missing or unknown:
            raise CheckpointError(
                f"The model configuration has missing fields {missing} and unknown fields {unknown}",
                expected=f"the fields {sorted(names)}",
                remedy="Write the checkpoint with this version of kvx.",
            )
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every type
