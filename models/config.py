"""The sizes and parts of a model, checked when they are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from kvx.runtime.bundle.model import upgraded
from kvx.runtime.errors import CheckpointError
from kvx.runtime.rules import Option, choice, count, flag, number, wrong_values

LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
SIZE, LAYERS = count(LARGEST_SIZE), count(MOST_LAYERS)
DERIVED = 0  # a head width that follows from d_model and the heads

Block = Literal["pre", "post"]
Norm = Literal["reference", "layer", "rms"]
Positions = Literal["interleaved", "halves", "halves_inclusive", "learned", "relative"]
Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes of an encoder-decoder Transformer and the parts that it is built of, by default those of the reference.

    Raises one CheckpointError that names every field that is wrong.
    """

    source_vocab_size: Annotated[int, Option(SIZE, "The rows of the source embedding.")]
    target_vocab_size: Annotated[int, Option(SIZE, "The rows of the target embedding.")]
    d_model: Annotated[int, Option(SIZE, "The width of the model.")]
    encoder_layers: Annotated[int, Option(LAYERS, "The layers of the encoder.")]
    encoder_heads: Annotated[int, Option(SIZE, "The heads of an attention in the encoder.")]
    encoder_d_ff: Annotated[int, Option(SIZE, "The width within the encoder's feed-forward parts.")]
    decoder_layers: Annotated[int, Option(LAYERS, "The layers of the decoder.")]
    decoder_heads: Annotated[int, Option(SIZE, "The heads of an attention in the decoder.")]
    decoder_d_ff: Annotated[int, Option(SIZE, "The width within the decoder's feed-forward parts.")]
    source_positions: Annotated[int, Option(SIZE, "The positions of a source.")]
    target_positions: Annotated[int, Option(SIZE, "The positions of a target.")]
    encoder_head_width: Annotated[int, Option(count(LARGEST_SIZE, least=0), "The channels of an encoder's head.")] = 0
    decoder_head_width: Annotated[int, Option(count(LARGEST_SIZE, least=0), "The channels of a decoder's head.")] = 0
    block: Annotated[
        Block, Option(choice(get_args(Block)), "Whether norms stand before each part or after what it is added to.")
    ] = "pre"
    final_norm: Annotated[bool, Option(flag(), "Whether each stack ends with a norm.")] = True
    norm: Annotated[Norm, Option(choice(get_args(Norm)), "The kind of all norms.")] = "reference"
    norm_epsilon: Annotated[float, Option(number(0, 1), "The ε of all norms.")] = 1e-6
    positions: Annotated[
        Positions,
        Option(choice(get_args(Positions)), "What is added to tokens, or to scores where positions are relative."),
    ] = "interleaved"
    relative_distance: Annotated[
        int, Option(count(LARGEST_SIZE, least=0), "The distance from which on relative positions are alike.")
    ] = 0
    relative_by_layer: Annotated[bool, Option(flag(), "Whether each layer has relative positions of its own.")] = False
    scaled_embedding: Annotated[bool, Option(flag(), "Whether tokens are multiplied by √d_model.")] = True
    embedding_norm: Annotated[bool, Option(flag(), "Whether a norm comes after tokens and positions.")] = False
    attention_bias: Annotated[bool, Option(flag(), "Whether the projections of attention have biases.")] = False
    activation: Annotated[
        Activation, Option(choice(get_args(Activation)), "The function within the feed-forward parts.")
    ] = "relu"
    gated: Annotated[bool, Option(flag(), "Whether a second projection multiplies the activation.")] = False
    feed_forward_bias: Annotated[bool, Option(flag(), "Whether the feed-forward parts have biases.")] = True
    head_bias: Annotated[bool, Option(flag(), "Whether the product with the vocabulary has a bias.")] = False
    head_scale: Annotated[
        float, Option(number(0, LARGEST_SIZE, above=True), "What hidden states are multiplied by before that product.")
    ] = 1.0
    shared_embeddings: Annotated[bool, Option(flag(), "Whether source and target have one table of tokens.")] = False
    tied_head: Annotated[bool, Option(flag(), "Whether the product is with the target's table of tokens.")] = False

    def __post_init__(self) -> None:
        wrong = [f"{problem.option} = {getattr(self, problem.option)!r:.80}" for problem in wrong_values(self)]
        if not wrong:
            self._derive_head_widths()
            wrong = list(self._contradictions())
        if wrong:
            raise CheckpointError(
                f"The model configuration has {'; '.join(wrong)}",
                expected=f"sizes from 1 to {LARGEST_SIZE}, layers up to {MOST_LAYERS}, heads that divide d_model or "
                "have a width of their own, and parts that kvx knows",
                remedy="Correct the configuration. The option `heads` sets the head count of a state dict.",
            )

    def _derive_head_widths(self) -> None:
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_heads")
            if getattr(self, f"{side}_head_width") == DERIVED and self.d_model % heads == 0:
                object.__setattr__(self, f"{side}_head_width", self.d_model // heads)

    def _contradictions(self) -> Iterator[str]:
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_heads")
            if getattr(self, f"{side}_head_width") == DERIVED:
                yield f"{heads} heads in the {side} that do not divide d_model {self.d_model}"
        if (self.positions == "relative") is not (self.relative_distance > 0):
            yield f"positions {self.positions} with the relative_distance {self.relative_distance}"
        if self.shared_embeddings and self.source_vocab_size != self.target_vocab_size:
            yield (
                f"shared_embeddings, but vocabularies of {self.source_vocab_size} and {self.target_vocab_size} tokens"
            )

    @property
    def distinct_positions(self) -> tuple[int, int]:
        """The positions of a source and of a target that the model tells apart."""
        sides = self.source_positions, self.target_positions
        if self.positions != "relative":
            return sides
        source, target = (min(positions, self.relative_distance + 2) for positions in sides)
        return source, target

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The configuration that `to_dict` wrote, also in earlier releases. Raises CheckpointError for missing or
        unknown fields.
        """
        values = upgraded(values)
        names = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        missing, unknown = sorted(required - values.keys()), sorted(map(str, values.keys() - names))
        if missing or unknown:
            raise CheckpointError(
                f"The model configuration has missing fields {missing} and unknown fields {unknown}",
                expected=f"the fields {sorted(names)}",
                remedy="Write the checkpoint with this version of kvx.",
            )
        return cls(**values)
