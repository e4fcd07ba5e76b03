"""What a model's weights alone ask of a machine: operations for its products, and bytes that a decoder step reads."""

from __future__ import annotations

from kvx.models.config import ModelConfig
from kvx.runtime.bundle.precision import Precision

BYTES: dict[Precision, float] = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}  # of a weight; scales are not counted


def weights(config: ModelConfig) -> tuple[int, int]:
    """How many weights the products of a source token and of a target token have, each multiplied once for a token.

    A source token goes through the encoder, and through the projections that make keys and values for the decoder's
    attention to it. A target token goes through a decoder step and the product with the vocabulary.
    """
    encoder = config.d_model * config.encoder_heads * config.encoder_head_width
    decoder = config.d_model * config.decoder_heads * config.decoder_head_width
    feed_forward = config.d_model * (3 if config.gated else 2)
    source = config.encoder_layers * (4 * encoder + feed_forward * config.encoder_d_ff)
    keys_values = config.decoder_layers * 2 * decoder
    target = config.decoder_layers * (4 * decoder + 2 * decoder + feed_forward * config.decoder_d_ff)
    return source + keys_values, target + config.d_model * config.target_vocab_size


def operations(config: ModelConfig, source_tokens: int, target_tokens: int) -> int:
    """Operations of all products with weights, two for each multiplication, as benchmarks/machine.py counts them."""
    source, target = weights(config)
    return 2 * (source_tokens * source + target_tokens * target)


def step_bytes(config: ModelConfig, precision: Precision) -> float:
    """Bytes of the weights that a decoder step reads, with any number of rows."""
    _, target = weights(config)
    return target * BYTES[precision]
