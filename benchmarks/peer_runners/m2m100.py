"""The weights of a kvx model in the architecture of transformers that computes the same function.

M2M100 is pre-norm with sinusoidal positions and last norms as kvx is. Its attention biases are set to zero, its
embeddings and head separated, its table of positions replaced and kvx's norm folded into γ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, M2M100Config, M2M100ForConditionalGeneration
from weights import Weights  # type: ignore[import-not-found]

PAD, BOS, EOS = 0, 2, 3
EPSILON = 2e-6  # added to the variance what kvx adds, 1e-6, to a standard deviation of about 1
PROJECTIONS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output"))
SIDES = (("encoder", "source_embedding"), ("decoder", "target_embedding"))


def build(folder: Path) -> Any:  # noqa: ANN401  # of a package without types
    """The model, ready for `generate`."""
    weights = Weights(folder)
    model = M2M100ForConditionalGeneration(_config(weights)).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=BOS
    )
    with torch.no_grad():
        for side, embedding in SIDES:
            _fill_stack(getattr(model.model, side), weights, side, embedding)
        model.lm_head = torch.nn.Linear(weights.config["d_model"], weights.config["target_vocab_size"], bias=False)
        _copy(model.lm_head.weight, weights["head.weight"])
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
            norm.eps = EPSILON
    return model


def _config(weights: Weights) -> Any:  # noqa: ANN401
    shape = weights.config
    return M2M100Config(
        vocab_size=shape["target_vocab_size"],
        d_model=shape["d_model"],
        max_position_embeddings=max(shape["source_positions"], shape["target_positions"]),
        encoder_layers=shape["encoder_layers"],
        decoder_layers=shape["decoder_layers"],
        encoder_attention_heads=shape["decoder_heads"],
        decoder_attention_heads=shape["decoder_heads"],
        encoder_ffn_dim=shape["decoder_d_ff"],
        decoder_ffn_dim=shape["decoder_d_ff"],
        activation_function="relu",
        scale_embedding=True,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )


def _fill_stack(stack: Any, weights: Weights, side: str, embedding: str) -> None:  # noqa: ANN401
    """Encoder or decoder: embedding, positions from 1 on (0 is padding's), layers, last norm."""
    table = torch.from_numpy(weights[f"{embedding}.tokens.weight"])
    scaled = type(stack.embed_tokens)(*table.shape, PAD, embed_scale=weights.config["d_model"] ** 0.5)
    scaled.weight.copy_(table)
    stack.embed_tokens = scaled
    positions = torch.from_numpy(weights[f"{embedding}.positions"])
    stack.embed_positions.weights[PAD + 1 : PAD + 1 + len(positions)].copy_(positions)
    _fill_norm(stack.layer_norm, weights, f"{side}_norm")
    for number, layer in enumerate(stack.layers):
        _fill_layer(layer, weights, f"{side}_layers.{number}", decoder=side == "decoder")


def _fill_layer(layer: Any, weights: Weights, name: str, *, decoder: bool) -> None:  # noqa: ANN401
    _fill_attention(layer.self_attn, weights, f"{name}.self_attention")
    _fill_norm(layer.self_attn_layer_norm, weights, f"{name}.self_attention_norm")
    if decoder:
        _fill_attention(layer.encoder_attn, weights, f"{name}.cross_attention")
        _fill_norm(layer.encoder_attn_layer_norm, weights, f"{name}.cross_attention_norm")
    for linear, part in ((layer.fc1, "up"), (layer.fc2, "down")):
        _copy(linear.weight, weights[f"{name}.feed_forward.{part}.weight"])
        _copy(linear.bias, weights[f"{name}.feed_forward.{part}.bias"])
    _fill_norm(layer.final_layer_norm, weights, f"{name}.feed_forward_norm")


def _fill_attention(attention: Any, weights: Weights, name: str) -> None:  # noqa: ANN401
    for theirs, ours in PROJECTIONS:
        linear = getattr(attention, theirs)
        _copy(linear.weight, weights[f"{name}.{ours}.weight"])
        linear.bias.zero_()


def _fill_norm(norm: Any, weights: Weights, name: str) -> None:  # noqa: ANN401
    for tensor, array in zip((norm.weight, norm.bias), weights.norm(name), strict=True):
        _copy(tensor, array)


def _copy(tensor: torch.Tensor, array: Any) -> None:  # noqa: ANN401
    tensor.copy_(torch.from_numpy(array))
