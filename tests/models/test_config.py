"""The model configuration refuses what cannot work, and says everything that is wrong at once."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from kvx import CheckpointError
from kvx.models.config import ModelConfig

SIZES = {
    "source_vocab_size": 11,
    "target_vocab_size": 13,
    "d_model": 12,
    "encoder_heads": 3,
    "decoder_heads": 3,
    "encoder_d_ff": 20,
    "decoder_d_ff": 20,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "source_positions": 8,
    "target_positions": 9,
}


def config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**SIZES, **changes})


def test_a_head_is_as_wide_as_the_model_divided_by_its_heads() -> None:
    assert config().decoder_head_width == 4
    assert config(heads=12).encoder_head_width == 1


def test_attention_has_no_bias_unless_the_configuration_says_so() -> None:
    assert config().attention_bias is False
    assert config(attention_bias=True).attention_bias is True


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_each_size_must_be_a_positive_int(field: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        config(**{field: value})
    assert f"{field} = {value!r}" in caught.value.got


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_attention_bias_must_be_a_bool(value: object) -> None:
    with pytest.raises(CheckpointError, match="attention_bias"):
        config(attention_bias=value)


def test_every_wrong_field_is_named_at_once_and_no_right_one() -> None:
    wrong = {"decoder_d_ff": 0, "encoder_heads": -2, "source_positions": "8", "attention_bias": 1}
    with pytest.raises(CheckpointError) as caught:
        config(**wrong)
    names = (field.name for field in dataclasses.fields(ModelConfig))
    named = {name for name in names if re.search(rf"\b{name} = ", caught.value.got)}
    assert named == wrong.keys()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CheckpointError, match="5 heads in the encoder that do not divide d_model 12") as caught:
        config(heads=5)
    assert "`heads`" in caught.value.remedy


def test_a_configuration_cannot_be_changed_unchecked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().decoder_heads = 5  # type: ignore[misc]


@pytest.mark.parametrize("bias", [False, True])
def test_a_configuration_survives_json(bias: bool) -> None:
    original = config(attention_bias=bias)
    assert ModelConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_missing_and_unknown_fields_are_all_named() -> None:
    values = {name: size for name, size in SIZES.items() if name not in ("encoder_heads", "decoder_d_ff")}
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**values, "dropout": 1, "experts": 2})
    for name in ("encoder_heads", "decoder_d_ff", "dropout", "experts"):
        assert name in caught.value.got


def test_unknown_fields_need_not_be_called_by_strings() -> None:
    with pytest.raises(CheckpointError, match="dropout"):
        ModelConfig.from_dict({**SIZES, "dropout": 1, 7: 2})  # type: ignore[dict-item]
