"""Train a small English → German number-words Transformer and write model.pt, source.model and target.model.

The words, and the split into training and held-out numbers, need no torch.

Letters: N numbers, B rows, S source positions, T target positions.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

if TYPE_CHECKING:
    from torch import Tensor

    from kvx.models.transformer import Transformer

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "artifacts" / "numbers-checkpoint"
SEED = 1
LIMIT = 1_000_000
HELD_OUT = 2_000
PAD, UNKNOWN, BOS, EOS = range(4)
SOURCE_VOCAB_SIZE = 64
TARGET_VOCAB_SIZE = 72
POSITIONS = 64
MAX_NEW_TOKENS = 32
REPORT_STEPS = 100

# Zero is never held out: no other number has its words in it.
HELD_OUT_COUNTS = {range(10**digits, 10 ** (digits + 1)): count for digits, count in enumerate((1, 9, 90, 300, 400))}
TRAINING_COUNTS = {range(10_000): 9_000, range(10_000, 100_000): 20_000, range(100_000, LIMIT): 40_000}

ENGLISH_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
ENGLISH_UNITS += ["twelve", *(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine"))]
ENGLISH_TENS = [f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
GERMAN_UNITS = ["null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf"]
GERMAN_UNITS += ["zwölf", *(f"{stem}zehn" for stem in ("drei", "vier", "fünf", "sech", "sieb", "acht", "neun"))]
GERMAN_TENS = ["zwanzig", "dreißig", *(f"{stem}zig" for stem in ("vier", "fünf", "sech", "sieb", "acht", "neun"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """Hold what decides the trained weights beyond the model's shape, for one machine and one version of torch."""

    seed: int = SEED
    threads: int = 1
    steps: int = 1_000
    batch_size: int = 128
    peak_learning_rate: float = 3e-3
    warmup_share: float = 0.1
    gradient_norm: float = 1.0
    label_smoothing: float = 0.05


class Split(NamedTuple):
    """Keep the numbers to learn from apart from those to test with; both are sorted."""

    training: list[int]
    held_out: list[int]


class Tokenizers(NamedTuple):
    """Hold one sentencepiece model per language."""

    source: SentencePieceProcessor
    target: SentencePieceProcessor


class Examples(NamedTuple):
    """Hold padded token ids [N, S] and [N, T], bos and eos included, and the source lengths [N]."""

    source_ids: Tensor
    source_lengths: Tensor
    target_ids: Tensor


def english(number: int) -> str:
    """Spell 0 … 999,999 in British style: 1101 → "one thousand one hundred and one"."""
    thousands, rest = divmod(number, 1_000)
    parts = [f"{_english_below_thousand(thousands)} thousand"] if thousands else []
    parts += ["and"] if thousands and 0 < rest < 100 else []
    parts += [_english_below_thousand(rest)] if rest or not thousands else []
    return " ".join(parts)


def _english_below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    tens, unit = divmod(rest, 10)
    parts = [f"{ENGLISH_UNITS[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        parts.append(ENGLISH_TENS[tens - 2] + (f"-{ENGLISH_UNITS[unit]}" if unit else ""))
    elif rest or not hundreds:
        parts.append(ENGLISH_UNITS[rest])
    return " and ".join(parts)


def german(number: int) -> str:
    """Spell 0 … 999,999 as one word: 1101 → "eintausendeinhunderteins"."""
    if number == 0:
        return GERMAN_UNITS[0]
    thousands, rest = divmod(number, 1_000)
    ending = "s" if rest % 100 == 1 else ""
    return (f"{_german_below_thousand(thousands)}tausend" if thousands else "") + _german_below_thousand(rest) + ending


def _german_below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    tens, unit = divmod(rest, 10)
    prefix = f"{GERMAN_UNITS[hundreds]}hundert" if hundreds else ""
    if rest < 20:
        return prefix + (GERMAN_UNITS[rest] if rest else "")
    return prefix + (f"{GERMAN_UNITS[unit]}und" if unit else "") + GERMAN_TENS[tens - 2]


def split(seed: int = SEED) -> Split:
    """Draw the training numbers and the 2,000 held-out ones, both with numbers of every length."""
    generator = random.Random(seed)
    held_out: set[int] = set()
    training = {0}
    for numbers, count in HELD_OUT_COUNTS.items():
        _draw(generator, numbers, count, held_out, training)
    _draw(generator, range(LIMIT), HELD_OUT - len(held_out), held_out, training)
    for numbers, count in TRAINING_COUNTS.items():
        _draw(generator, numbers, count, training, held_out)
    return Split(sorted(training), sorted(held_out))


def _draw(generator: random.Random, numbers: range, count: int, drawn: set[int], excluded: set[int]) -> None:
    """Add `count` new numbers to `drawn`."""
    size = len(drawn) + count
    while len(drawn) < size:
        # Of a seeded generator, Python promises the same results in every version for random() alone.
        number = numbers[int(generator.random() * len(numbers))]
        if number not in excluded:
            drawn.add(number)


def train_tokenizers(numbers: list[int]) -> Tokenizers:
    """Train on the words of these numbers: English splits into whole words, German into parts of words."""
    source = _train_tokenizer(map(english, numbers), "unigram", SOURCE_VOCAB_SIZE)
    return Tokenizers(source, _train_tokenizer(map(german, numbers), "bpe", TARGET_VOCAB_SIZE))


def _train_tokenizer(sentences: Iterable[str], kind: str, vocab_size: int) -> SentencePieceProcessor:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        character_coverage=1.0,
        # The default rule would add a quarter of a megabyte of Unicode tables to each file.
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        pad_id=PAD,
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def encode_examples(numbers: list[int], tokenizers: Tokenizers) -> Examples:
    """Spell and tokenize numbers [N]."""
    target_ids, _ = _encode(tokenizers.target, map(german, numbers))
    return Examples(*_encode(tokenizers.source, map(english, numbers)), target_ids)


def _encode(tokenizer: SentencePieceProcessor, texts: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Tokenize N texts → ids [N, longest] and lengths [N]."""
    import torch

    rows = [torch.tensor([BOS, *tokenizer.encode(text), EOS]) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return padded, torch.tensor([len(row) for row in rows])


def build_model() -> Transformer:
    """Build a model with fresh weights, drawn from torch's global generator."""
    from kvx.models.config import ModelConfig
    from kvx.models.transformer import Transformer

    config = ModelConfig(
        source_vocab_size=SOURCE_VOCAB_SIZE,
        target_vocab_size=TARGET_VOCAB_SIZE,
        d_model=64,
        encoder_heads=4,
        decoder_heads=4,
        encoder_d_ff=128,
        decoder_d_ff=128,
        encoder_layers=2,
        decoder_layers=2,
        source_positions=POSITIONS,
        target_positions=POSITIONS,
    )
    model = Transformer(config)
    for embedding in (model.source_embedding, model.target_embedding):
        # The model multiplies by the root of the width; smaller tokens keep the positions from drowning in them.
        embedding.tokens.weight.data.normal_(std=config.d_model**-0.5)
    return model


def sampling_weights(numbers: list[int]) -> list[float]:
    """Weigh numbers [N] for drawing: every length in digits gets a share that grows as its square."""
    counts = Counter(len(str(number)) for number in numbers)
    return [len(str(number)) ** 2 / counts[len(str(number))] for number in numbers]


def train_model(numbers: list[int], tokenizers: Tokenizers, options: TrainingOptions) -> Transformer:
    """Train a fresh model on these numbers and make it ready for inference."""
    import torch

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    examples, model = encode_examples(numbers, tokenizers), build_model()
    weights = torch.tensor(sampling_weights(numbers))
    drawn = weights.multinomial(options.steps * options.batch_size, replacement=True).reshape(options.steps, -1)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        options.peak_learning_rate,
        total_steps=options.steps,
        pct_start=options.warmup_share,
        cycle_momentum=False,
    )
    for step, rows in enumerate(drawn, 1):
        loss = batch_loss(model, Examples(*(part[rows] for part in examples)), options.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_norm)
        optimizer.step()
        schedule.step()
        if step % REPORT_STEPS == 0:
            print(f"step {step}/{options.steps}: loss {loss.item():.4f}", flush=True)
    return model.eval().requires_grad_(requires_grad=False)


def batch_loss(model: Transformer, batch: Examples, label_smoothing: float) -> Tensor:
    """Average the smoothed cross-entropy over the target tokens after bos → a scalar."""
    from torch.nn.functional import cross_entropy

    logits, labels = model(batch.source_ids, batch.source_lengths, batch.target_ids[:, :-1]), batch.target_ids[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=label_smoothing)


def translate(model: Transformer, texts: list[str], tokenizers: Tokenizers) -> list[str]:
    """Translate N texts greedily, all in one batch and without a cache."""
    import torch

    source_ids, source_lengths = _encode(tokenizers.source, texts)
    cross = model.encode(source_ids, source_lengths)
    target_ids = torch.full((len(texts), 1), BOS)
    for _ in range(MAX_NEW_TOKENS):
        logits = model.logits(model.decode(target_ids, cross, source_lengths)[:, -1])
        target_ids = torch.cat([target_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    rows = [[*row[1:], EOS] for row in target_ids.tolist()]
    return [tokenizers.target.decode(row[: row.index(EOS)]) for row in rows]


def main() -> None:
    """Train, write and measure on the held-out numbers."""
    from kvx.models.importers import Checkpoint, save_checkpoint

    parser = argparse.ArgumentParser(description="Train a small English → German number-words Transformer.")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=SEED, help="decides the split, the weights and the batches")
    parser.add_argument("--steps", type=int, default=TrainingOptions().steps, help="training steps")
    arguments = parser.parse_args()
    options = TrainingOptions(seed=arguments.seed, steps=arguments.steps)
    start, numbers = time.perf_counter(), split(options.seed)
    tokenizers = train_tokenizers(numbers.training)
    model = train_model(numbers.training, tokenizers, options)
    print(f"trained on {len(numbers.training)} numbers in {time.perf_counter() - start:.0f} s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_checkpoint(Checkpoint(model, MAX_NEW_TOKENS), arguments.output / "model.pt")
    for name, tokenizer in tokenizers._asdict().items():
        (arguments.output / f"{name}.model").write_bytes(tokenizer.serialized_model_proto())
    translations = translate(model, [english(number) for number in numbers.held_out], tokenizers)
    right = sum(map(str.__eq__, translations, map(german, numbers.held_out)))
    print(f"exact match: {right} of {len(numbers.held_out)} held-out numbers")


if __name__ == "__main__":
    main()
