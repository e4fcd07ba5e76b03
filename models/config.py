"""The shape of a model, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from kvx.runtime.errors import CheckpointError

LARGEST_SIZE = 2**24
MOST_LAYERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that the weights of a pre-norm encoder-decoder Transformer do not say by themselves.

    Sizes are counts; `d_model`, `d_ff` are widths. `source_positions` and `target_positions` are the rows of the two
    position tables, bos and eos included. Raises CheckpointError naming every field that is wrong.
    """

    source_vocab_size: int
    target_vocab_size: int
    d_model: int
    heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    source_positions: int
    target_positions: int
    attention_bias: bool = False

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise CheckpointError(
                f"model configuration with {'; '.join(problems)}",
                expected=f"sizes from 1 to {LARGEST_SIZE}, layers up to {MOST_LAYERS} and heads that divide d_model",
                remedy="Correct the configuration (--heads sets the head count).",
            )

    def _problems(self) -> list[str]:
        wrong = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = bool if field.name == "attention_bias" else int
            if type(value) is not kind:
                wrong.append(f"{field.name} = {value!r} (not {kind.__name__})")
            elif kind is int and not 1 <= value <= (MOST_LAYERS if field.name.endswith("_layers") else LARGEST_SIZE):
                wrong.append(f"{field.name} = {value}")
        if not wrong and self.d_model % self.heads:
            wrong.append(f"{self.heads} heads that do not divide d_model {self.d_model}")
        return wrong

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
                f"model configuration with missing fields {missing} and unknown fields {unknown}",
                expected=f"the fields {sorted(names)}",
                remedy="Write the checkpoint with this version of kvx.",
            )
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every type
