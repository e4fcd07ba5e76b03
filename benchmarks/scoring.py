"""Scoring token by token on the cache against one full pass: is a step over several tokens worth its keep?

    python benchmarks/scoring.py [--repeat 3]

A base-size model (6 + 6 layers, d_model 512, 32,000 tokens, random weights) scores targets of 100 tokens: kvx steps
over its rows on ONNX Runtime, eager PyTorch does all positions of all targets in one teacher-forced pass, both on the
threads given. Prints a Markdown table: minimum seconds of the interleaved repetitions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvx.exporter.lowerings.standard import StandardOperators
from kvx.exporter.writing.graphs import EncoderGraph, StepGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.config import ModelConfig
from kvx.models.transformer import Transformer
from kvx.runtime.backends.onnx import ENCODER_FILE, STEP_FILE, OnnxBackend
from kvx.runtime.bundle.manifest import CHUNK_FILE
from kvx.runtime.bundle.signature import CHUNK_FEATURES, Dimensions, StepFeatures
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.decode import score
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.results import Sentence
from kvx.runtime.measuring.tables import markdown_table

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
    source_positions=256,
    target_positions=256,
)
SOURCE_TOKENS, TARGET_TOKENS = 20, 100
BOS, EOS = 2, 3


def build(folder: Path, threads: int) -> tuple[Transformer, OnnxBackend]:
    """A random model, eager and as ONNX graphs."""
    torch.manual_seed(0)
    model = Transformer(BASE).eval().requires_grad_(requires_grad=False)
    write_onnx(EncoderGraph(model, StandardOperators()), folder / ENCODER_FILE)
    write_onnx(StepGraph(model, StandardOperators()), folder / STEP_FILE)
    chunk = StepGraph(model, StandardOperators(), CHUNK_FEATURES)
    write_onnx(chunk, folder / CHUNK_FILE, weights_of=folder / STEP_FILE)
    backend = OnnxBackend(folder, Dimensions.of_model(BASE.to_dict()), StepFeatures(), threads=threads)
    return model, backend


def by_steps(backend: OnnxBackend, targets: int, *, several: bool) -> list[float]:
    """The scores of equal targets of one source, a token at a time or several."""
    backend.query_tokens = several
    target = tuple(range(10, 10 + TARGET_TOKENS))
    plan = Plan(
        start=(BOS,),
        eos=EOS,
        pad=0,
        rows=targets,
        max_new_tokens=TARGET_TOKENS,
        source_positions=BASE.source_positions,
        cache_bytes=2**32,
        target_bytes=Capacity(1, 1, 0).bytes(backend.cache_specs),
        source_bytes=Capacity(1, 0, 1).bytes(backend.cache_specs),
    )
    source = Sentence(0, tuple(range(10, 10 + SOURCE_TOKENS)), (target,) * targets)
    return [found.best.score or 0.0 for found in score(backend, plan, [source])]


def by_one_pass(model: Transformer, targets: int) -> list[float]:
    """The same scores from one teacher-forced pass over all positions."""
    source = torch.arange(10, 10 + SOURCE_TOKENS).expand(targets, -1)
    target = torch.arange(10, 10 + TARGET_TOKENS).expand(targets, -1)
    given = torch.cat([torch.full((targets, 1), BOS), target[:, :-1]], dim=1)
    with torch.inference_mode():
        logits = model(source, torch.full((targets,), SOURCE_TOKENS), given)
        scores: list[float] = logits.log_softmax(-1).gather(-1, target[..., None]).sum((1, 2)).tolist()
        return scores


def seconds(run: Callable[[], list[float]]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Measures both ways for several numbers of targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, backend = build(Path(folder), arguments.threads)
        counts = (1, 4, 16, 64)
        ways = {
            "steps": lambda n: by_steps(backend, n, several=False),
            "chunks": lambda n: by_steps(backend, n, several=True),
            "one pass": lambda n: by_one_pass(model, n),
        }
        for count in counts:
            truth = ways["one pass"](count)
            for name in ("steps", "chunks"):
                worst = max(abs(a - b) for a, b in zip(ways[name](count), truth, strict=True))
                assert worst < 1e-2, (name, worst)
        times: dict[tuple[str, int], float] = {}
        for _ in range(arguments.repeat):
            for name, way in ways.items():
                for count in counts:
                    taken = seconds(lambda way=way, count=count: way(count))  # type: ignore[misc]
                    times[name, count] = min(taken, times.get((name, count), taken))
    header = ("targets of 100 tokens", "a token at a time, s", "several at a time, s", "one pass, eager, s")
    rows = ([count, *(f"{times[name, count]:.2f}" for name in ways)] for count in counts)
    print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    main()
