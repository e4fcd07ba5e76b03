from __future__ import annotations

import pytest

from kvx.runtime.bundle.signature import (
    Dimensions,
    Signature,
    StepFeatures,
    TensorSpec,
    cache_specs,
    encoder_signature,
    key_value_names,
    step_signature,
)

DIMENSIONS = Dimensions(layers=2, heads=3, head_width=5, vocab_size=7)
INT, FLOAT = "int64", "float32"
OWN, SOURCE = ("B", 3, "T", 5), ("B", 3, "S", 5)
ENCODER_IN = [("input_ids", INT, ("B", "S")), ("source_lengths", INT, ("B",))]
ENCODER_OUT = [
    ("present.0.encoder.key", FLOAT, SOURCE),
    ("present.0.encoder.value", FLOAT, SOURCE),
    ("present.1.encoder.key", FLOAT, SOURCE),
    ("present.1.encoder.value", FLOAT, SOURCE),
]
CACHES = [
    ("past_key_values.0.decoder.key", FLOAT, OWN),
    ("past_key_values.0.decoder.value", FLOAT, OWN),
    ("past_key_values.1.decoder.key", FLOAT, OWN),
    ("past_key_values.1.decoder.value", FLOAT, OWN),
    ("past_key_values.0.encoder.key", FLOAT, SOURCE),
    ("past_key_values.0.encoder.value", FLOAT, SOURCE),
    ("past_key_values.1.encoder.key", FLOAT, SOURCE),
    ("past_key_values.1.encoder.value", FLOAT, SOURCE),
]
STEP_IN = [("input_ids", INT, ("B",)), ("past_lengths", INT, ("B",)), ("source_lengths", INT, ("B",)), *CACHES]
LOGITS = ("logits", FLOAT, ("B", 7))
STEP_PRESENTS = [
    ("present.0.decoder.key", FLOAT, OWN),
    ("present.0.decoder.value", FLOAT, OWN),
    ("present.1.decoder.key", FLOAT, OWN),
    ("present.1.decoder.value", FLOAT, OWN),
]


def rows(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str, tuple[str | int, ...]]]:
    return [(spec.name, spec.dtype, spec.axes) for spec in specs]


def test_the_encoder_is_the_contracts() -> None:
    signature = encoder_signature(DIMENSIONS)
    assert rows(signature.inputs) == ENCODER_IN
    assert rows(signature.outputs) == ENCODER_OUT


def test_the_step_is_the_contracts() -> None:
    signature = step_signature(DIMENSIONS, StepFeatures())
    assert rows(signature.inputs) == STEP_IN
    assert rows(signature.outputs) == [LOGITS, *STEP_PRESENTS]


def test_the_cache_holds_every_past_of_the_step_and_nothing_else() -> None:
    assert rows(cache_specs(DIMENSIONS)) == CACHES


@pytest.mark.parametrize("signature", [encoder_signature(DIMENSIONS), step_signature(DIMENSIONS, StepFeatures(True))])
def test_every_present_becomes_the_past_of_its_name(signature: Signature) -> None:
    presents = [spec for spec in signature.outputs if spec.name.startswith("present.")]
    pasts = {spec.name: spec for spec in cache_specs(DIMENSIONS)}
    assert signature.presents == {spec.name: spec.name.replace("present.", "past_key_values.", 1) for spec in presents}
    assert len(presents) == 2 * DIMENSIONS.layers
    for spec in presents:
        past = pasts[signature.presents[spec.name]]
        assert (spec.dtype, spec.axes) == (past.dtype, past.axes)


def test_key_and_value_names_are_the_contracts() -> None:
    assert key_value_names("present", 11, "encoder") == ("present.11.encoder.key", "present.11.encoder.value")


def test_a_shape_is_the_axes_with_their_letters_replaced() -> None:
    spec = TensorSpec("x", FLOAT, ("B", 3, "T", 5))
    assert spec.shape({"B": 2, "S": 9, "T": 4}) == (2, 3, 4, 5)
    with pytest.raises(KeyError):
        spec.shape({"B": 2})


def test_dimensions_come_from_the_decoder_side_of_a_model() -> None:
    model = {
        "d_model": 24,
        "encoder_heads": 6,
        "encoder_head_width": 4,
        "decoder_heads": 3,
        "decoder_head_width": 8,
        "encoder_layers": 9,
        "decoder_layers": 2,
        "source_vocab_size": 8,
        "target_vocab_size": 7,
    }
    assert Dimensions.of_model(model) == Dimensions(layers=2, heads=3, head_width=8, vocab_size=7, projection=24)
