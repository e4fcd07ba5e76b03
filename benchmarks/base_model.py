"""A base-size model with random weights, for measurements that no trained model of that size is at hand for.

    python benchmarks/base_model.py FOLDER

Writes model.pt, source.model and target.model, which `kvx export` reads: 6 + 6 layers, d_model 512, 8 heads,
d_ff 2048, 32,000 words w4 … w31999. The end of a sentence is never the most probable token, so that every translation
is exactly as long as its limit.

Also writes sources.txt, 128 sentences of 18 words out of 75, and lexicon.txt, which gives each of these 20 targets of
its own: a table for `kvx shortlist import`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2

from kvx.models.config import ModelConfig
from kvx.models.importers import Checkpoint, save_checkpoint
from kvx.models.transformer import Transformer

BASE = ModelConfig(
    source_vocab_size=32_000,
    target_vocab_size=32_000,
    d_model=512,
    encoder_heads=8,
    decoder_heads=8,
    encoder_d_ff=2048,
    decoder_d_ff=2048,
    encoder_layers=6,
    decoder_layers=6,
    source_positions=1100,
    target_positions=1100,
)
CONTROL = ("<pad>", "<unk>", "<s>", "</s>")
EOS = CONTROL.index("</s>")
CHECKPOINT = "model.pt"
SENTENCES, LENGTH, WORDS, TARGETS = 128, 18, 75, 20


def write_base_model(folder: Path, *, max_new_tokens: int, seed: int = 0, config: ModelConfig = BASE) -> Path:
    """The checkpoint of a random model with its tokenizers beside it; its vocabularies are those of BASE."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.head.weight[EOS] = 0.0  # the largest of 32,000 random logits is always above it
    save_checkpoint(Checkpoint(model, max_new_tokens=max_new_tokens, notes=()), folder / CHECKPOINT)
    for name in ("source.model", "target.model"):
        (folder / name).write_bytes(_words(BASE.source_vocab_size))
    _write_text(folder, random.Random(seed))
    return folder / CHECKPOINT


def _write_text(folder: Path, rng: random.Random) -> None:
    """Sentences, and the targets that their words may become."""
    words = rng.sample(range(len(CONTROL), BASE.source_vocab_size), WORDS)
    targets = rng.sample(range(len(CONTROL), BASE.target_vocab_size), WORDS * TARGETS)
    entries = [f"▁w{target} ▁w{words[number // TARGETS]} {1 / TARGETS}\n" for number, target in enumerate(targets)]
    lines = [" ".join(f"w{word}" for word in rng.choices(words, k=LENGTH)) + "\n" for _ in range(SENTENCES)]
    (folder / "lexicon.txt").write_text("".join(entries), encoding="utf-8")
    (folder / "sources.txt").write_text("".join(lines), encoding="utf-8")


def _words(size: int) -> bytes:
    """A sentencepiece model of whole words."""
    formats: Any = sentencepiece_model_pb2  # its classes are made as it is imported
    model = formats.ModelProto()
    for index, piece in enumerate(CONTROL):
        kind = model.SentencePiece.UNKNOWN if piece == "<unk>" else model.SentencePiece.CONTROL
        model.pieces.add(piece=piece, score=-float(index), type=kind)
    for index in range(len(CONTROL), size):
        model.pieces.add(piece=f"▁w{index}", score=-float(index))
    model.trainer_spec.model_type = formats.TrainerSpec.WORD
    model.trainer_spec.vocab_size = size
    model.trainer_spec.pad_id, model.trainer_spec.unk_id = CONTROL.index("<pad>"), CONTROL.index("<unk>")
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = CONTROL.index("<s>"), EOS
    serialized: bytes = model.SerializeToString()
    return serialized


def main() -> None:
    """Writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    print(write_base_model(arguments.folder, max_new_tokens=arguments.max_new_tokens))


if __name__ == "__main__":
    main()
