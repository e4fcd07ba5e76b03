"""kvx on a GPU: its loop in every precision, captured and not, beside eager PyTorch and CTranslate2.

    python benchmarks/gpu.py [--device cuda] [--model base] [--rows 1 8 32 128 512] [--steps 63] [--json FILE]

Everything has the same random weights, whose translations all have exactly `steps` tokens, and is given fresh random
sources of 20 tokens for every run. First the proof, on the device: what the loop chose, for ragged sources and limits,
against float32 PyTorch on the same device, captured against launched one by one. Then the time of `steps` greedy steps,
between two synchronisations of the whole device, so that one clock serves all, whatever streams they use: medians after
a warm-up. CTranslate2, where it is installed, decodes the same number of tokens, its encoder included. Bytes are those
that a step has to read (decoder weights, keys and values), in shares of what a copy on the device reaches. What does
not fit into `--seconds` is left out and said so. `--device cpu --model tiny` tries the script itself.

Letters: R rows, S source positions, T target positions, V target vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvx.benchmarks.base_model import BASE
from kvx.benchmarks.peers import Process
from kvx.exporter.lowerings.lowered import Lowered
from kvx.exporter.precision.halves import in_precision
from kvx.exporter.writing.graphs import EncoderGraph, StepGraph
from kvx.exporter.writing.loop import LoopGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.config import ModelConfig
from kvx.models.layers import KeyValue
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import IntArray
from kvx.runtime.backends.device import Device
from kvx.runtime.backends.onnx import ENCODER_FILE, STEP_FILE, OnnxBackend
from kvx.runtime.backends.ort import ort as onnxruntime
from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.bundle.manifest import LOOP_FILE
from kvx.runtime.bundle.precision import PRECISIONS, Precision
from kvx.runtime.bundle.signature import Dimensions, StepFeatures
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.device_loop import LoopRows, LoopState
from kvx.runtime.measuring.tables import markdown_table

IDS = SpecialIds(pad=0, bos=2, eos=3)
FRAMING = Framing.plain(IDS, IDS)
SOURCE = 20
SOURCE_CAPACITY = 32
TARGET_UNIT = 64
PROOF_ROWS, PROOF_IDLE = 24, 2
COPIES = 10
PROOF_COLUMNS = (
    *("proof", "tokens", "best of eager", "largest margin"),
    *("allowed", "captured as launched", "passed"),
)
TIME_COLUMNS = (
    *("precision", "rows", "", "ms a step"),
    *("lowest to highest", "tokens/s", "GB/s read", "of a copy"),
)
NO_CACHE_ROWS = 128  # beyond, the earlier positions of all rows fill the device for minutes
MODELS = {
    "base": dataclasses.replace(BASE, source_positions=256, target_positions=256),
    "tiny": ModelConfig(
        source_vocab_size=64,
        target_vocab_size=64,
        d_model=32,
        encoder_heads=2,
        decoder_heads=2,
        encoder_d_ff=48,
        decoder_d_ff=48,
        encoder_layers=1,
        decoder_layers=2,
        source_positions=64,
        target_positions=64,
    ),
}


class Contestant(Protocol):
    """Greedy decoding of fresh sources, `steps` tokens for each."""

    def begin(self, input_ids: IntArray, lengths: IntArray) -> None:
        """input_ids [R, S], lengths [R]: encodes them, which is not timed."""
        ...

    def go(self, steps: int) -> None:
        """So many tokens for every row, which is."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `seconds` of all steps, the median, and its lowest and highest."""

    name: str
    precision: str
    rows: int
    steps: int
    seconds: float
    lowest: float
    highest: float
    step_bytes: int

    @property
    def step_milliseconds(self) -> float:
        """Of one step of all rows."""
        return self.seconds / self.steps * 1e3

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.rows * self.steps / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """What was read of weights, keys and values."""
        return self.step_bytes * self.steps / self.seconds


# Contestants


class Loop:
    """The graph that feeds itself, over rows of the runtime."""

    def __init__(self, backend: OnnxBackend, rows: LoopRows) -> None:
        self._backend = backend
        self._rows = rows

    def begin(self, input_ids: IntArray, lengths: IntArray, limits: IntArray | None = None) -> None:
        """Seats the sources in the leading rows; the others stay idle."""
        capacity, n = self._rows.capacity, len(input_ids)
        padded = np.full((n, capacity.source), IDS.pad, np.int64)
        padded[:, : input_ids.shape[1]] = input_ids
        self._rows.encode(0, padded, lengths)
        state = LoopState.idle(capacity, forced=0)
        state.input_ids[:n] = IDS.bos
        state.source_lengths[:n] = lengths
        state.limits[:n] = capacity.target - 1 if limits is None else limits
        state.past_finished[:n] = False
        self._rows.write(state)

    def go(self, steps: int) -> None:
        """The steps; the rows themselves wait for the last."""
        self._rows.run(steps)

    def state(self) -> LoopState:
        """Where the rows are."""
        return self._rows.read()


class Eager:
    """PyTorch, with the cache or computing every earlier position again."""

    def __init__(self, model: Transformer, device: torch.device, target: int, *, cached: bool) -> None:
        self._model = model
        self._device = device
        self._target = target
        self._cached = cached
        self._type = model.decoder[0].cross_attention.key.weight.dtype

    @torch.inference_mode()
    def begin(self, input_ids: IntArray, lengths: IntArray) -> None:
        """Encodes, and makes empty caches."""
        config = self._model.config
        self._lengths = torch.from_numpy(lengths).to(self._device)
        self._cross = self._model.encode(torch.from_numpy(input_ids).to(self._device), self._lengths)
        self._ids = torch.full((len(lengths), self._target + 1), IDS.bos, device=self._device)
        shape = (len(lengths), config.decoder_heads, self._target, config.decoder_head_width)
        self._past = [
            KeyValue(*(torch.zeros(shape, dtype=self._type, device=self._device) for _ in range(2)))
            for _ in range(config.decoder_layers if self._cached else 0)
        ]

    @torch.inference_mode()
    def go(self, steps: int) -> None:
        """The steps, without a look at any token."""
        positions = torch.zeros_like(self._lengths)
        for step in range(steps):
            if self._cached:
                tokens = self._ids[:, step]
                logits = self._model.step(tokens, positions, self._lengths, self._past, self._cross).logits
            else:
                hidden = self._model.decode(self._ids[:, : step + 1], self._cross, self._lengths)
                logits = self._model.logits(hidden[:, -1])
            self._ids[:, step + 1] = logits.argmax(dim=-1)
            positions += 1


class CTranslate2:
    """CTranslate2 in a process of its own, which times itself: its encoder is part of that."""

    def __init__(self, process: Process, key: str, rows: int) -> None:
        self._process = process
        self._key = key
        self._rows = rows
        self.seconds = 0.0

    def begin(self, input_ids: IntArray, lengths: IntArray) -> None:
        """Keeps the sources."""
        self._sentences = [ids[:length].tolist() for ids, length in zip(input_ids, lengths, strict=True)]

    def go(self, steps: int) -> None:
        """All of it, with so many tokens for each sentence."""
        options = {"sentences": self._sentences, "max_new_tokens": steps, "rows": self._rows}
        reply = self._process.ask("run", key=self._key, **options)
        tokens = sum(map(len, reply["ids"]))
        if tokens != steps * len(self._sentences):
            raise SystemExit(f"CTranslate2 gave {tokens} tokens for {len(self._sentences)} × {steps}: not comparable.")
        self.seconds = reply["seconds"]


# The model


def random_model(config: ModelConfig) -> Transformer:
    """Random weights with which the end of a sentence is never the best token."""
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(requires_grad=False)
    model.head.weight[IDS.eos] = 0.0
    return model


def write_graphs(folder: Path, model: Transformer) -> None:
    """The encoder, the step and the loop of a model in its own precision."""
    lowered = Lowered.of("cuda", model)
    folder.mkdir()
    write_onnx(EncoderGraph(model, lowered.step), folder / ENCODER_FILE)
    write_onnx(StepGraph(model, lowered.step), folder / STEP_FILE)
    write_onnx(
        LoopGraph(model, FRAMING, StepFeatures().loop, lowered.loop), folder / LOOP_FILE, weights_of=folder / STEP_FILE
    )


def step_bytes(model: Transformer, rows: int, steps: int) -> int:
    """Bytes of the decoder's weights, and of the keys and values that the rows have on average."""
    layers = [parameter for layer in model.decoder for parameter in layer.parameters()]
    weights = sum(parameter.nbytes for parameter in (*layers, *model.head.parameters()))
    element = model.decoder[0].cross_attention.key.weight.element_size()
    position = 2 * model.config.decoder_layers * model.config.d_model * element
    return int(weights + rows * position * (SOURCE + (steps + 1) / 2))


def draw(random: np.random.Generator, config: ModelConfig, rows: int) -> tuple[IntArray, IntArray]:
    """Fresh sources [R, S] of one length, and the lengths [R]."""
    return random.integers(4, config.source_vocab_size, (rows, SOURCE)), np.full(rows, SOURCE)


# The proof


def prove(model: Transformer, loops: dict[str, Loop], precision: Precision, steps: int) -> dict[str, Any]:
    """What the loops chose, each row for itself, against float32 PyTorch: `model` on the same device."""
    random, config, device = np.random.default_rng(1), model.config, model.head.weight.device
    lengths, limits = random.integers(1, SOURCE + 1, PROOF_ROWS), random.integers(1, steps + 1, PROOF_ROWS)
    input_ids = random.integers(4, config.source_vocab_size, (PROOF_ROWS, SOURCE))
    states = []
    for loop in loops.values():
        loop.begin(input_ids, lengths, limits)
        loop.go(steps)
        states.append(loop.state())
    state = states[0]
    given = np.full((PROOF_ROWS, steps), IDS.bos)
    given[:, 1:] = state.past_ids[:PROOF_ROWS, : steps - 1]
    with torch.inference_mode():
        tensors = (torch.from_numpy(array).to(device) for array in (input_ids, lengths, given))
        logits = model(*tensors).float().cpu().numpy()
    inside = np.arange(steps) < limits[:, None]
    chosen = np.take_along_axis(logits, state.past_ids[:PROOF_ROWS, :steps, None], axis=-1)[..., 0]
    margins = (logits.max(axis=-1) - chosen)[inside]
    allowed = 2 * PRECISIONS[precision].limits.tolerance * max(1.0, float(np.abs(logits).max()))
    places = np.array_equal(state.past_lengths, [*limits, *[0] * PROOF_IDLE]) and bool(state.past_finished.all())
    alike = all(_equal(state, other, inside) for other in states)
    return {
        "precision": precision,
        "tokens": int(inside.sum()),
        "best_of_eager": float((margins == 0).mean()),
        "largest_margin": float(margins.max()),
        "allowed_margin": allowed,
        "lengths_and_ends": places,
        "alike": alike,
        "passed": places and alike and bool((margins <= allowed).all()),
    }


def _equal(one: LoopState, other: LoopState, inside: NDArray[np.bool_]) -> bool:
    rows, steps = inside.shape
    ids, others = (state.past_ids[:rows, :steps][inside] for state in (one, other))
    return np.array_equal(ids, others) and np.array_equal(one.past_lengths, other.past_lengths)


# Measuring


@dataclass(frozen=True, slots=True)
class Clock:
    """Measures between synchronisations of the whole device, until the time for all of it is over."""

    device: torch.device
    deadline: float
    repeat: int

    @property
    def over(self) -> bool:
        """Whether to begin nothing more."""
        return time.monotonic() > self.deadline

    def seconds(self, run: Callable[[], None]) -> float:
        """Wall time of one run on an idle device."""
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, contestant: Contestant, config: ModelConfig, rows: int, steps: int) -> list[float]:
        """Seconds of the repetitions, after one that warms up."""
        found, random = [], np.random.default_rng(rows)
        for _ in range(self.repeat + 1):
            contestant.begin(*draw(random, config, rows))
            taken = self.seconds(lambda: contestant.go(steps))
            found.append(contestant.seconds if isinstance(contestant, CTranslate2) else taken)
        return found[1:]


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second that a copy reads and writes on the device."""
    size = 2**30 if clock.device.type == "cuda" else 2**26
    one, other = (torch.zeros(size, dtype=torch.uint8, device=clock.device) for _ in range(2))

    def copy() -> None:
        for _ in range(COPIES):
            other.copy_(one)

    times = [clock.seconds(copy) for _ in range(4)]
    return 2 * COPIES * size / statistics.median(times[1:])


def measure(arguments: argparse.Namespace, model: Transformer, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Proof and times of every precision."""
    device = torch.device(arguments.device)
    clock = Clock(device, time.monotonic() + arguments.seconds, arguments.repeat)
    reference = model.to(device)
    found: dict[str, Any] = {"copy_bytes_per_second": copy_bandwidth(clock), "proofs": [], "rows": [], "left_out": []}
    for precision in arguments.precisions:
        if precision == "bf16" and device.type == "cpu":
            found["left_out"].append("bf16 on a CPU, where ONNX Runtime has no kernels for it")
            continue
        measure_precision(precision, reference, folder, clock, arguments, found)
    if device.index:
        found["left_out"].append(f"CTranslate2, whose process runs on GPU 0, not {device.index}")
    elif importlib.util.find_spec("ctranslate2") is not None:
        measure_ctranslate2(model, folder, clock, arguments, found, stack)
    else:
        found["left_out"].append("CTranslate2, which is not installed")
    return found


def measure_precision(
    precision: Precision,
    reference: Transformer,
    folder: Path,
    clock: Clock,
    arguments: argparse.Namespace,
    found: dict[str, Any],
) -> None:
    """The proof, then loops and eager at every number of rows."""
    steps, config = arguments.steps, reference.config
    say(f"{precision}: writing the graphs")
    write_graphs(folder / precision, in_precision(reference.cpu(), precision))
    model = in_precision(reference, precision).to(clock.device)
    reference.to(clock.device)
    backends = dict(open_backends(folder / precision, config, precision, arguments.device))
    target = -(-(steps + 1) // TARGET_UNIT) * TARGET_UNIT
    with ExitStack() as proven:
        capacity = Capacity(PROOF_ROWS + PROOF_IDLE, target, SOURCE_CAPACITY)
        loops = {
            name: Loop(backend, proven.enter_context(backend.loop_rows(capacity))) for name, backend in backends.items()
        }
        found["proofs"].append(prove(reference, loops, precision, steps))
        say(f"{precision}: {found['proofs'][-1]}")
    for rows in arguments.rows:
        contestants: dict[str, Contestant] = {}
        with ExitStack() as seated:
            for name, backend in backends.items():
                held = seated.enter_context(backend.loop_rows(Capacity(rows, target, SOURCE_CAPACITY)))
                contestants[name] = Loop(backend, held)
            contestants["eager, cache"] = Eager(model, clock.device, target, cached=True)
            if rows <= NO_CACHE_ROWS:
                contestants["eager, no cache"] = Eager(model, clock.device, target, cached=False)
            for name, contestant in contestants.items():
                run(name, precision, contestant, model, rows, clock, arguments, found)


def open_backends(
    folder: Path, config: ModelConfig, precision: Precision, device: str
) -> Iterator[tuple[str, OnnxBackend]]:
    """kvx with captured steps, where there is a device to capture them, and with steps launched one by one."""
    dimensions = Dimensions.of_model(config.to_dict(), PRECISIONS[precision].element)
    place = Device.parse(device)
    for name, capture in (("kvx, captured", True), ("kvx", False)):
        if not capture or place.kind != "cpu":
            yield name, OnnxBackend(folder, dimensions, StepFeatures(), device=place, capture=capture)


def measure_ctranslate2(
    model: Transformer,
    folder: Path,
    clock: Clock,
    arguments: argparse.Namespace,
    found: dict[str, Any],
    stack: ExitStack,
) -> None:
    """CTranslate2 in float16, or float32 where the device is a CPU."""
    process = stack.enter_context(Process("ctranslate2", Path(sys.executable)))
    np.savez(folder / "weights.npz", **{name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    kind, precision = clock.device.type, "float16" if clock.device.type == "cuda" else "float32"
    place = {"model": str(folder / "ctranslate2"), "precision": precision}
    process.ask("prepare", weights=str(folder), **place)
    process.ask("load", key="ctranslate2", device=kind, inter=1, intra=0, **place)
    half = in_precision(model, "fp16" if kind == "cuda" else "fp32")
    for rows in arguments.rows:
        contestant = CTranslate2(process, "ctranslate2", rows)
        run("CTranslate2, encoder included", precision, contestant, half, rows, clock, arguments, found)


def run(
    name: str,
    precision: str,
    contestant: Contestant,
    model: Transformer,
    rows: int,
    clock: Clock,
    arguments: argparse.Namespace,
    found: dict[str, Any],
) -> None:
    """One line of the table, if there is time for it."""
    steps = arguments.steps
    if clock.over:
        found["left_out"].append(f"{name}, {precision}, {rows} rows, for want of time")
        return
    times = clock.times(contestant, model.config, rows, steps)
    size = step_bytes(model, rows, steps)
    row = Row(name, precision, rows, steps, statistics.median(times), min(times), max(times), size)
    found["rows"].append(row)
    say(f"{precision}, {rows} rows, {name}: {row.step_milliseconds:.3f} ms a step")


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


# Results


def table(found: dict[str, Any]) -> Iterator[str]:
    """The proofs and the times as Markdown."""
    bandwidth = found["copy_bytes_per_second"]
    yield f"A copy on {found['device']} reads and writes {bandwidth / 1e9:,.0f} GB/s."
    yield ""
    yield from markdown_table(PROOF_COLUMNS, map(_proof_cells, found["proofs"]), text={0, 5, 6})
    yield ""
    rows = sorted(found["rows"], key=lambda row: row.rows)
    yield from markdown_table(TIME_COLUMNS, (_time_cells(row, bandwidth) for row in rows), text={0, 2, 4})
    for missing in found["left_out"]:
        yield f"\nLeft out: {missing}."


def _proof_cells(proof: dict[str, Any]) -> tuple[object, ...]:
    best, margin, allowed = proof["best_of_eager"], proof["largest_margin"], proof["allowed_margin"]
    figures = proof["tokens"], f"{best:.2%}", f"{margin:.2g}", f"{allowed:.2g}"
    return proof["precision"], *figures, proof["alike"], proof["passed"]


def _time_cells(row: Row, bandwidth: float) -> tuple[object, ...]:
    spread = f"{row.lowest / row.steps * 1e3:.3f} to {row.highest / row.steps * 1e3:.3f}"
    read = f"{row.bytes_per_second / 1e9:.1f}", f"{row.bytes_per_second / bandwidth:.0%}"
    speed = f"{row.tokens_per_second:,.0f}", *read
    return row.precision, row.rows, row.name, f"{row.step_milliseconds:.3f}", spread, *speed


def as_json(found: dict[str, Any]) -> str:
    """Everything, with what the table derives."""
    derived = ("step_milliseconds", "tokens_per_second", "bytes_per_second")
    rows = [dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in found["rows"]]
    return json.dumps({**found, "rows": rows}, indent=1)


def device_name(device: str) -> str:
    """What the table calls the device."""
    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else platform.machine()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<index> or cpu")
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32", "fp16", "bf16"])
    parser.add_argument("--steps", type=int, default=63)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no measurement later than this")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Proves, measures, prints; 1 where a proof failed."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        found = measure(options, random_model(MODELS[options.model]), Path(work), stack)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    found |= {"device": device_name(options.device), "model": options.model, "versions": versions}
    print("\n".join(table(found)))
    if options.json is not None:
        options.json.write_text(as_json(found) + "\n", encoding="utf-8")
    return 0 if all(proof["passed"] for proof in found["proofs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
