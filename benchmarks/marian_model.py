"""A folder of random weights in the shape of an OPUS-MT model, as save_pretrained leaves it.

    python benchmarks/marian_model.py build/opus-mt-random

6 + 6 layers, d_model 512, 8 heads, d_ff 2048, 58,101 tokens w2, w3, …, tied. The end of a sentence is never the most
probable token, so that every translation has as many tokens as it may have. Source sentences are in sources.txt.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from kvx.models.importers.naming import SIDES

LAYERS, D_MODEL, HEADS, D_FF, VOCABULARY, POSITIONS = 6, 512, 8, 2048, 58_101, 512
EOS, UNKNOWN, PAD = 0, 1, VOCABULARY - 1
FIRST_WORD = 2
NEVER = -1e4
STD = 0.05
SENTENCES, LENGTH = 128, 18


def write_marian_model(folder: Path, *, max_length: int, seed: int = 0) -> Path:
    """The folder with configuration, weights and tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config())
    ids = {"eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD, "bad_words_ids": [[PAD]]}
    _write_json(folder / "generation_config.json", {**ids, "max_length": max_length})
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer"})
    words = [f"▁w{number}" for number in range(FIRST_WORD, PAD)]
    pieces = ["</s>", "<unk>", *words, "<pad>"]
    _write_json(folder / "vocab.json", {piece: number for number, piece in enumerate(pieces)})
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(_sentencepiece(words))
    torch.manual_seed(seed)
    save_file(dict(_tensors()), folder / "model.safetensors")
    chance = random.Random(seed)
    lines = (" ".join(f"w{chance.randrange(FIRST_WORD, PAD)}" for _ in range(LENGTH)) for _ in range(SENTENCES))
    (folder / "sources.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _config() -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in SIDES
        for name, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", D_FF))
    }
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "d_model": D_MODEL,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "activation_function": "swish",
        "scale_embedding": True,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        **sides,
    }


def _tensors() -> Iterator[tuple[str, torch.Tensor]]:
    table = torch.randn(VOCABULARY, D_MODEL) * STD
    table[PAD] = 0
    bias = torch.randn(1, VOCABULARY) * STD
    bias[0, EOS], bias[0, PAD] = NEVER, 0
    yield "model.shared.weight", table
    yield "final_logits_bias", bias
    for side in SIDES:
        for layer in range(LAYERS):
            name = f"model.{side}.layers.{layer}"
            for attention in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield from _linear(f"{name}.{attention}.{projection}", D_MODEL, D_MODEL)
                yield from _norm(f"{name}.{attention}_layer_norm")
            yield from _linear(f"{name}.fc1", D_MODEL, D_FF)
            yield from _linear(f"{name}.fc2", D_FF, D_MODEL)
            yield from _norm(f"{name}.final_layer_norm")


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", torch.randn(outputs, inputs) * STD
    yield f"{name}.bias", torch.randn(outputs) * STD


def _norm(name: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", 1 + torch.randn(D_MODEL) * STD
    yield f"{name}.bias", torch.randn(D_MODEL) * STD


def _sentencepiece(words: list[str]) -> bytes:
    """A model of whole words."""
    formats: Any = sentencepiece_model_pb2  # its classes are made as it is imported
    model = formats.ModelProto()
    model.pieces.add(piece="<unk>", score=0.0, type=model.SentencePiece.UNKNOWN)
    for piece in ("<s>", "</s>"):
        model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.CONTROL)
    for number, piece in enumerate(words):
        model.pieces.add(piece=piece, score=-float(number))
    model.trainer_spec.model_type = formats.TrainerSpec.WORD
    model.trainer_spec.vocab_size = len(words) + 3
    serialized: bytes = model.SerializeToString()
    return serialized


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-length", type=int, default=POSITIONS)
    arguments = parser.parse_args()
    print(write_marian_model(arguments.folder, max_length=arguments.max_length))


if __name__ == "__main__":
    main()
