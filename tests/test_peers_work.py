"""What a model's weights ask of a machine, beside the weights that the model has."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from torch import nn

from kvx.benchmarks.work import operations, step_bytes, weights
from kvx.models.config import ModelConfig
from kvx.models.transformer import Transformer

SIZES: dict[str, Any] = {
    "source_vocab_size": 30,
    "target_vocab_size": 40,
    "d_model": 16,
    "encoder_heads": 2,
    "decoder_heads": 4,
    "encoder_d_ff": 24,
    "decoder_d_ff": 20,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "source_positions": 8,
    "target_positions": 8,
}
CONFIGS = {
    "plain": ModelConfig(**SIZES),
    "gated, heads of their own width": ModelConfig(
        **SIZES, gated=True, feed_forward_bias=False, encoder_head_width=6, decoder_head_width=3
    ),
}


def _of_sources(name: str) -> bool:
    """Whether a product is made once for each source token."""
    return name.startswith("encoder") or "cross_attention.key" in name or "cross_attention.value" in name


@pytest.fixture(params=CONFIGS.values(), ids=[*CONFIGS])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    found: ModelConfig = request.param
    return found


def test_each_weight_of_a_product_counts_once_and_on_one_side(config: ModelConfig) -> None:
    linear = {name: one for name, one in Transformer(config).named_modules() if isinstance(one, nn.Linear)}
    source = sum(one.weight.numel() for name, one in linear.items() if _of_sources(name))
    target = sum(one.weight.numel() for name, one in linear.items() if not _of_sources(name))
    assert weights(config) == (source, target)


def test_a_multiplication_of_a_token_is_two_operations(config: ModelConfig) -> None:
    source, target = weights(config)
    assert operations(config, 5, 0) == 10 * source
    assert operations(config, 0, 7) == 14 * target
    assert operations(config, 5, 7) == 10 * source + 14 * target


def test_a_step_reads_the_weights_of_a_target_token_in_their_bits(config: ModelConfig) -> None:
    _, target = weights(config)
    bits = {"fp32": 32, "int8": 8, "int4": 4}
    assert {name: step_bytes(config, name) * 8 / target for name in ("fp32", "int8", "int4")} == bits
