"""CTranslate2 on the weights of a kvx model, written through its own model specifications, or on what its own converter
makes of a Hugging Face folder.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2  # type: ignore[import-not-found]
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec  # type: ignore[import-not-found]
from numpy.typing import NDArray
from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]
from weights import Weights  # type: ignore[import-not-found]

CONTROL = ["<blank>", "<unk>", "<s>", "</s>"]  # the names that CTranslate2 knows for pad, unk, bos and eos
EPSILON = 1e-6


def prepare(request: Request) -> None:
    """Converts the weights to a model folder in the precision asked for."""
    quantization = None if request["precision"] == "float32" else request["precision"]
    if "huggingface" in request:
        converter = ctranslate2.converters.TransformersConverter(request["huggingface"])
        converter.convert(request["model"], quantization=quantization, force=True)
        return
    weights = Weights(Path(request["weights"]))
    config = weights.config
    layers = config["encoder_layers"], config["decoder_layers"]
    spec = transformer_spec.TransformerSpec.from_config(
        layers, config["decoder_heads"], pre_norm=True, activation=common_spec.Activation.RELU
    )
    _fill_stack(spec.encoder, weights, "encoder", "source_embedding")
    _fill_stack(spec.decoder, weights, "decoder", "target_embedding")
    spec.decoder.projection.weight = weights["head.weight"]
    spec.config.layer_norm_epsilon = EPSILON
    spec.register_source_vocabulary(vocabulary(config["source_vocab_size"]))
    spec.register_target_vocabulary(vocabulary(config["target_vocab_size"]))
    spec.validate()
    spec.optimize(quantization=quantization)
    folder = Path(request["model"])
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def vocabulary(size: int) -> list[str]:
    """A token for each id."""
    return CONTROL + [str(index) for index in range(len(CONTROL), size)]


def load(request: Request) -> Any:  # noqa: ANN401  # of a package without types
    """A translator of `inter` batches side by side with `intra` threads each, and the tokens of its vocabulary."""
    translator = ctranslate2.Translator(
        request["model"],
        device=request.get("device", "cpu"),
        compute_type=request["precision"],
        inter_threads=request["inter"],
        intra_threads=request["intra"],
    )
    shared = Path(request["model"]) / "shared_vocabulary.json"
    return translator, json.loads(shared.read_text(encoding="utf-8")) if shared.exists() else None


def run(loaded: Any, request: Request) -> Timed:  # noqa: ANN401
    """Greedy translations: all in batches of `rows`, or one by one where rows is 0."""
    translator, tokens = loaded
    ids = {token: index for index, token in enumerate(tokens)} if tokens else None
    sentences = [[tokens[one] if tokens else _token(one) for one in each] for each in request["sentences"]]
    options: dict[str, object] = {
        "beam_size": 1,
        "max_decoding_length": request["max_new_tokens"],
        "max_input_length": 0,
        "return_end_token": True,
    }
    rows = request["rows"]
    started = time.perf_counter()
    if rows:
        results = translator.translate_batch(sentences, max_batch_size=rows, batch_type="examples", **options)
    else:
        results = [translator.translate_batch([sentence], **options)[0] for sentence in sentences]
    seconds = time.perf_counter() - started
    found = [[ids[token] if ids else _index(token) for token in result.hypotheses[0]] for result in results]
    return Timed(seconds, found)


def _token(index: int) -> str:
    return CONTROL[index] if index < len(CONTROL) else str(index)


def _index(token: str) -> int:
    return CONTROL.index(token) if token in CONTROL else int(token)


def _fill_stack(spec: Any, weights: Weights, side: str, embedding: str) -> None:  # noqa: ANN401
    """Encoder or decoder: embedding, layers, last norm."""
    embeddings = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embeddings.weight = weights[f"{embedding}.tokens.weight"]
    spec.scale_embeddings = True
    spec.position_encodings.encodings = weights[f"{embedding}.positions"]
    _fill_norm(spec.layer_norm, weights, f"{side}_norm")
    for number, layer in enumerate(spec.layer):
        _fill_layer(layer, weights, f"{side}_layers.{number}", decoder=side == "decoder")


def _fill_layer(layer: Any, weights: Weights, name: str, *, decoder: bool) -> None:  # noqa: ANN401
    own = layer.self_attention
    _fill_norm(own.layer_norm, weights, f"{name}.self_attention_norm")
    own.linear[0].weight = _stacked(weights, f"{name}.self_attention", "query", "key", "value")
    own.linear[1].weight = weights[f"{name}.self_attention.output.weight"]
    if decoder:
        cross = layer.attention
        _fill_norm(cross.layer_norm, weights, f"{name}.cross_attention_norm")
        cross.linear[0].weight = weights[f"{name}.cross_attention.query.weight"]
        cross.linear[1].weight = _stacked(weights, f"{name}.cross_attention", "key", "value")
        cross.linear[2].weight = weights[f"{name}.cross_attention.output.weight"]
    _fill_norm(layer.ffn.layer_norm, weights, f"{name}.feed_forward_norm")
    for linear, part in ((layer.ffn.linear_0, "up"), (layer.ffn.linear_1, "down")):
        linear.weight = weights[f"{name}.feed_forward.{part}.weight"]
        linear.bias = weights[f"{name}.feed_forward.{part}.bias"]


def _fill_norm(spec: Any, weights: Weights, name: str) -> None:  # noqa: ANN401
    spec.gamma, spec.beta = weights.norm(name)


def _stacked(weights: Weights, name: str, *parts: str) -> NDArray[np.float32]:
    return np.concatenate([weights[f"{name}.{part}.weight"] for part in parts])


if __name__ == "__main__":
    serve(Runner(prepare, load, run))
