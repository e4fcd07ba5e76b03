"""A folder of random weights in the shape of NLLB-200-distilled-600M: what exporting, loading and translating cost.

    python benchmarks/large_model.py --work FOLDER                  # 12 + 12 layers, d_model 1,024, 256,206 tokens
    python benchmarks/large_model.py --work FOLDER --scale 0.1      # a tenth: 2 + 2 layers, 25,620 tokens

Writes the folder as save_pretrained leaves it, exports it in float32 and int8 with its proof, loads each bundle and
translates with it, each step in a process of its own, and prints a table of seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LANGUAGES = ("deu_Latn", "fra_Latn")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
STD = 0.02
SAMPLED = 0.02  # of the time a process has run, between two looks at its memory
EXPORT = """
import sys
from kvx.cli import main
sys.argv = ["kvx", "export", *sys.argv[1:], "--force"]
main()
"""
TRANSLATE = """
import sys, time
started = time.perf_counter()
from kvx import Translator
translator = Translator.load(sys.argv[1])
loaded = time.perf_counter()
options = {"source_language": "deu_Latn", "target_language": "fra_Latn", "max_new_tokens": 20}
[first] = translator.translate(["w17 w170 w1700"], **options)
done = time.perf_counter()
assert first.ids
import json
print(json.dumps({"load": loaded - started, "translate": done - loaded}))
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model."""

    layers: int
    d_model: int
    heads: int
    d_ff: int
    vocabulary: int

    @classmethod
    def of(cls, scale: float) -> Shape:
        """NLLB-200-distilled-600M, or about a tenth of its weights."""
        if scale >= 1:
            return cls(layers=12, d_model=1024, heads=16, d_ff=4096, vocabulary=256_206)
        return cls(layers=2, d_model=512, heads=8, d_ff=2048, vocabulary=int(256_206 * scale))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process took."""

    seconds: float
    peak_mib: float  # with the pages of mapped files
    anonymous_mib: float  # without them
    output: str


def write_folder(folder: Path, shape: Shape) -> None:
    """Configuration, weights and a tokenizer whose pieces are w4, w5, …"""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "generation_config.json", {"max_length": 200, "eos_token_id": 2, "decoder_start_token_id": 2})
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "NllbTokenizer"})
    _write_json(folder / "tokenizer.json", _tokenizer(shape))
    torch.manual_seed(0)
    save_file(dict(_tensors(shape)), folder / "model.safetensors")


def _config(shape: Shape) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", shape.layers), ("attention_heads", shape.heads), ("ffn_dim", shape.d_ff))
    }
    return {
        "model_type": "m2m_100",
        "d_model": shape.d_model,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "activation_function": "relu",
        **dict(zip(("bos_token_id", "pad_token_id", "eos_token_id"), range(3), strict=True)),
        "decoder_start_token_id": 2,
        **sides,
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.shared.weight", torch.randn(shape.vocabulary, shape.d_model) * STD
    for side in ("encoder", "decoder"):
        for layer in range(shape.layers):
            name = f"model.{side}.layers.{layer}"
            for attention in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield from _linear(f"{name}.{attention}.{projection}", shape.d_model, shape.d_model)
                yield from _norm(f"{name}.{attention}_layer_norm", shape.d_model)
            yield from _linear(f"{name}.fc1", shape.d_model, shape.d_ff)
            yield from _linear(f"{name}.fc2", shape.d_ff, shape.d_model)
            yield from _norm(f"{name}.final_layer_norm", shape.d_model)
        yield from _norm(f"model.{side}.layer_norm", shape.d_model)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", torch.randn(outputs, inputs) * STD
    yield f"{name}.bias", torch.randn(outputs) * STD


def _norm(name: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", 1 + torch.randn(width) * STD
    yield f"{name}.bias", torch.randn(width) * STD


def _tokenizer(shape: Shape) -> dict[str, Any]:
    words = shape.vocabulary - len(SPECIAL) - len(LANGUAGES) - 1
    pieces = [*SPECIAL, *(f"▁w{number}" for number in range(4, 4 + words)), *LANGUAGES, "<mask>"]
    special = {*SPECIAL, *LANGUAGES, "<mask>"}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": one, "content": piece, **flags} for one, piece in enumerate(pieces) if piece in special
        ],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [[piece, -float(number % 1000)] for number, piece in enumerate(pieces)],
            "byte_fallback": False,
        },
    }


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def run(script: str, *arguments: str | Path) -> Cost:
    """A Python process: its seconds, its memory at the peak and what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    started, seen = time.perf_counter(), [(0.0, 0.0)]
    with tempfile.TemporaryFile("w+") as printed, subprocess.Popen(command, stdout=printed) as process:
        while process.poll() is None:
            seen.append(_memory(process.pid))
            time.sleep(SAMPLED * (1 + time.perf_counter() - started))
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{arguments[0]}: status {process.returncode}")
        printed.seek(0)
        peak, anonymous = (max(values) for values in zip(*seen, strict=True))
        return Cost(seconds, peak, anonymous, printed.read())


def _memory(pid: int) -> tuple[float, float]:
    """MiB that a process occupies, every page counted once, with and without those of mapped files, as Linux says."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0, 0.0
    found = {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines[1:])}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0)


def measure(folder: Path, work: Path, precision: str, formats: str) -> Iterator[str]:
    """Lines of the table for one precision."""
    bundle = work / precision
    export = run(EXPORT, folder, "-o", bundle, "--precision", precision, "--format", formats)
    size = sum(path.stat().st_size for path in bundle.iterdir()) / 2**20
    memory = f"{export.peak_mib:,.0f} | {export.anonymous_mib:,.0f}"
    yield f"| {precision} | export with proof | {export.seconds:.0f} s | {memory} | {size:,.0f} |"
    costs = [run(TRANSLATE, bundle) for _ in range(3)]
    times = [json.loads(cost.output) for cost in costs]
    peak, anonymous = (max(getattr(cost, name) for cost in costs) for name in ("peak_mib", "anonymous_mib"))
    load, first = min(one["load"] for one in times), min(one["translate"] for one in times)
    yield f"| {precision} | import and load | {load:.2f} s | {peak:,.0f} | {anonymous:,.0f} | |"
    yield f"| {precision} | a sentence of 20 tokens | {first:.2f} s | | | |"


def main(given: Sequence[str] | None = None) -> None:
    """Writes, exports, loads, translates, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything that is written")
    parser.add_argument("--scale", type=float, default=1.0, help="1 for the whole size, below 1 for a small one")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--format", default="onnx", help="as kvx export has it; TorchScript takes as long again")
    arguments = parser.parse_args(given)
    folder = arguments.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, Shape.of(arguments.scale))
    print(
        "| precision | step | time | peak MiB | without files MiB | bundle MiB |\n|---|---|---:|---:|---:|---:|",
        flush=True,
    )
    for precision in arguments.precisions.split(","):
        for line in measure(folder, arguments.work, precision, arguments.format):
            print(line, flush=True)


if __name__ == "__main__":
    main()
