"""kvx beside CTranslate2, transformers, Optimum-ONNX and its own eager model, in one interleaved run on the CPU.

    python benchmarks/peers.py [--seed-model FOLDER] [--repeat 5] [--work FOLDER] [--json FILE]
    python benchmarks/peers.py --quick --models marian --precisions int8

All have the same weights, sentences and limit, which is checked, and are given ids, so that no tokenizer counts. Two
models: one of base size with random weights, whose translations all have exactly the limit of tokens, and a trained
one, FOLDER, with best_transformer.pt, source.model, target.model and test_2016.de. With --models marian, a folder of
random weights in the shape of OPUS-MT, which each peer reads by itself. Every contestant is first tried in each of its
settings; only its best runs in the repetitions, each of which runs every contestant once. Each peer has a process that
outlives the runs, and an environment that begins with kvx's packages and adds those that differ. Prints Markdown
tables; compare rows of one run only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from kvx.benchmarks import machine
from kvx.benchmarks.base_model import BASE, CONTROL, write_base_model
from kvx.benchmarks.marian_model import write_marian_model
from kvx.benchmarks.work import operations, step_bytes
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.models.config import ModelConfig
from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import Precision
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.system import bytes_saturate, cpu_model
from kvx.runtime.text.lines import open_lines, read_lines
from kvx.runtime.text.sources import SourceReader

Task = Literal["alone", "together"]
Compared = Literal["alone", "together", "memory"]
Ids = list[list[int]]
Options = Mapping[str, object]

RUNNERS = Path(__file__).parent / "peer_runners"
EXPORTING = ("exporter", "models", "runtime/bundle", "runtime/text")  # what has a say in a bundle
REQUIREMENTS = {
    "ctranslate2": ("ctranslate2", "numpy", "transformers==5.24.0", "sentencepiece", "torch"),
    "transformers": ("transformers==5.24.0", "torch", "numpy"),
    "optimum": ("optimum-onnx", "onnxruntime", "torch", "numpy"),  # takes an older transformers
}
UNCACHED_PEER = "uncached"  # kvx's eager model without its cache, which needs no environment
PEERS = (*REQUIREMENTS, UNCACHED_PEER)
QUICK_PEERS = ("ctranslate2",)
MODELS = ("base", "seed", "marian")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
NAMED_VERSIONS = {
    "ctranslate2": ("ctranslate2",),
    "transformers": ("transformers", "torch"),
    "optimum": ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch"),
    "kvx": ("kvx", "onnxruntime", "onnxruntime-gpu", "torch"),
}
HUGGINGFACE = "huggingface"  # the folder that a peer converts by itself
THREADS = 2
ROWS = 64  # of the throughput run whose memory is measured
TRIALS = 2  # runs in each setting, before the best is chosen
FIRST_RUNS = 3  # fresh processes for the time to a first translation
BOS, EOS, FIRST_WORD = CONTROL.index("<s>"), CONTROL.index("</s>"), len(CONTROL)
WORDS, BASE_SENTENCES, BASE_LIMIT, BASE_CALIBRATION = 18, 128, 24, 32
QUICK: Mapping[Task, int] = {"alone": 10, "together": 2 * ROWS}  # enough to fill the rows of two decodes
QUICK_SLOW: Mapping[Task, int] = {"alone": 2, "together": ROWS}
SEED_LIMIT, SEED_HEADS, SEED_CALIBRATION = 59, 4, 500
SEED_FILES = ("best_transformer.pt", "source.model", "target.model", "test_2016.de")
CT2, CT2_INT8 = "CTranslate2 float32", "CTranslate2 int8"
TRANSFORMERS, OPTIMUM = "transformers float32", "Optimum-ONNX float32"
KVX, CACHED, UNCACHED = "kvx fp32", "kvx eager, cache", "kvx eager, no cache"
KVX_INT8 = ("kvx int8", "kvx int8 calibrated")
KVX_INT4 = ("kvx int4", "kvx int4 calibrated")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a contestant: what it is loaded with, what each run is given."""

    label: str
    load: Options
    run: Options


@dataclass(frozen=True, slots=True)
class Contestant:
    """A runtime in one precision. `rival` is what its ratio is taken to; `slow` ones get fewer sentences."""

    name: str
    peer: str
    precision: Precision
    rival: str
    settings: Mapping[Task, tuple[Setting, ...]]
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and what it translates. `exact`: every translation has exactly `limit` tokens.

    `counts` and `slow_counts` are the sentences for each task, all of the others and of slow contestants; `few` those
    of a trial one at a time.
    """

    name: str
    title: str
    folder: Path
    config: ModelConfig
    sentences: Ids
    limit: int
    exact: bool
    counts: Mapping[Task, int]
    slow_counts: Mapping[Task, int]
    few: int
    calibration: str

    def of(self, contestant: Contestant, task: Task) -> Ids:
        """The sentences that a contestant translates."""
        return self.sentences[: (self.slow_counts if contestant.slow else self.counts)[task]]


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that kvx takes part with."""

    contestant: str
    folder: str
    precision: Precision
    calibrated: bool


BUNDLES = (
    Exported(KVX, "fp32", "fp32", calibrated=False),
    Exported(KVX_INT8[0], "int8", "int8", calibrated=False),
    Exported(KVX_INT8[1], "int8-calibrated", "int8", calibrated=True),
    Exported(KVX_INT4[0], "int4", "int4", calibrated=False),
    Exported(KVX_INT4[1], "int4-calibrated", "int4", calibrated=True),
)


@dataclass(frozen=True, slots=True)
class Scope:
    """Who takes part. `quick`: few sentences, and only the first setting of each."""

    peers: Sequence[str]
    precisions: Sequence[str]
    quick: bool

    @property
    def bundles(self) -> list[Exported]:
        """kvx's bundles."""
        return [bundle for bundle in BUNDLES if bundle.precision in self.precisions]


@dataclass(frozen=True, slots=True)
class Goal:
    """The best of `ours` is to be some factor times as fast as `theirs`, or to take at most this share of its memory.

    `factors`: on a processor with VNNI and on one without; none: only reported.
    """

    model: str
    task: Compared
    ours: tuple[str, ...]
    theirs: str
    factors: tuple[float, float] | None

    def best(self, ratios: Mapping[str, float]) -> str:
        """The name of the best ratio."""
        return (min if self.task == "memory" else max)(ratios, key=lambda name: ratios[name])

    def verdict(self, ratio: float, factor: float | None) -> str:
        """What to say of a ratio."""
        if factor is None:
            return "reported"
        return "met" if (ratio <= factor if self.task == "memory" else ratio >= factor) else "missed"


GOALS = (
    *(Goal(model, "together", KVX_INT8, CT2_INT8, (1.5, 1.35)) for model in MODELS),
    *(Goal(model, "together", (KVX,), CT2, (1.15, 1.2)) for model in MODELS),
    *(Goal(model, "alone", KVX_INT8, CT2_INT8, (2.5, 2.2)) for model in ("base", "marian")),
    Goal("seed", "alone", KVX_INT8, CT2_INT8, (1.2, 2.0)),
    Goal("base", "alone", KVX_INT4, CT2_INT8, (4.0, 4.0)),
    *(Goal(model, "memory", (KVX,), CT2, (1.0, 1.0)) for model in MODELS),
    *(Goal(model, "memory", KVX_INT8, CT2_INT8, (1.0, 1.0)) for model in MODELS),
    Goal("base", "together", (KVX,), OPTIMUM, (3.0, 3.0)),
    Goal("base", "together", (KVX,), TRANSFORMERS, (4.0, 4.0)),
    *(Goal(model, task, (CACHED,), UNCACHED, None) for model in ("base", "seed") for task in ("alone", "together")),
)
TITLES: dict[Compared, str] = {
    "alone": "One sentence at a time",
    "together": "Throughput",
    "memory": f"Peak memory at {ROWS} rows",
}
UNITS: dict[Task, str] = {"alone": "ms per sentence", "together": "tokens/s"}


@dataclass(frozen=True, slots=True)
class Measured:
    """A contestant's repetitions in its best setting, and what it translated to in the first."""

    contestant: str
    setting: str
    values: list[float]
    sentences: int
    tokens: int
    ids: Ids = field(repr=False)

    @property
    def median(self) -> float:
        """The median of the repetitions."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a fresh process needs: the peak memory of a throughput run, seconds from the load to a first translation."""

    contestant: str
    peak_mb: float | None
    first_seconds: list[float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How much of a contestant's throughput run is equal to the eager model's translations."""

    contestant: str
    sentences: int
    equal: int
    tokens: int
    reference_tokens: int


@dataclass(frozen=True, slots=True)
class Peaks:
    """What THREADS threads do a second: operations in products of float32 and of bytes, bytes read from memory."""

    float32: float
    int8: float
    memory: float

    @classmethod
    def measured(cls) -> Self:
        """Those of this machine."""
        say("measuring what the machine can do at most")
        works = (
            partial(machine.products, "float32"),
            partial(machine.products, "int8"),
            partial(machine.reading, machine.MEBIBYTES[-1]),
        )
        return cls(*(machine.best(make, THREADS) for make in works))


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the machine's peaks a contestant's work with its weights accounts for: in products while it
    translates many sentences, in reading while it translates one at a time.
    """

    contestant: str
    products: float
    reading: float


@dataclass(slots=True)
class Results:
    """All that was measured with one model."""

    workload: Workload
    contestants: Sequence[Contestant]
    measured: dict[Task, dict[str, Measured]] = field(default_factory=dict)
    tried: dict[Task, dict[str, dict[str, float]]] = field(default_factory=dict)
    fresh: list[Fresh] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)

    def figures(self, compared: Compared) -> dict[str, float]:
        """Each contestant's median, or its peak where the system told it."""
        if compared == "memory":
            return {fresh.contestant: fresh.peak_mb for fresh in self.fresh if fresh.peak_mb is not None}
        return {name: measured.median for name, measured in self.measured[compared].items()}


class Process:
    """A runner in the Python of its environment."""

    def __init__(self, peer: str, python: Path) -> None:
        self._peer = peer
        self._pipes = subprocess.Popen(
            [python, "-W", "ignore", RUNNERS / f"{peer}_runner.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._pipes:
            self._pipes.kill()

    def ask(self, command: str, **options: object) -> dict[str, Any]:
        """The reply to a command. Ends the program where the runner reports an error or has died."""
        assert self._pipes.stdin is not None
        assert self._pipes.stdout is not None
        try:
            self._pipes.stdin.write(json.dumps({command: options}) + "\n")
            self._pipes.stdin.flush()
            line = self._pipes.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply: dict[str, Any] = json.loads(line) if line else {"error": "the runner has died; see its message above"}
        if "error" in reply:
            raise SystemExit(f"{self._peer}: {command} failed: {reply['error']}. Leave the peer out with --peers.")
        return reply


@dataclass(frozen=True, slots=True)
class Bench:
    """The environments of all peers and the processes that outlive the runs."""

    pythons: Mapping[str, Path]
    processes: Mapping[str, Process]
    repeat: int

    def load(self, contestant: Contestant, setting: Setting) -> None:
        """Loads the contestant in this setting, under its name."""
        self.processes[contestant.peer].ask("load", key=contestant.name, **setting.load)

    def unload(self, contestant: Contestant) -> None:
        """Frees what `load` took."""
        self.processes[contestant.peer].ask("unload", key=contestant.name)

    def run(self, contestant: Contestant, setting: Setting, workload: Workload, sentences: Ids) -> tuple[float, Ids]:
        """Seconds and ids. Ends the program where an exact workload comes out of another length."""
        return run(self.processes[contestant.peer], contestant, setting, workload, sentences)


def run(
    process: Process, contestant: Contestant, setting: Setting, workload: Workload, sentences: Ids
) -> tuple[float, Ids]:
    """Seconds and ids of one run of what the process has loaded under the contestant's name."""
    reply = process.ask("run", key=contestant.name, sentences=sentences, max_new_tokens=workload.limit, **setting.run)
    ids: Ids = reply["ids"]
    tokens = sum(map(len, ids))
    if len(ids) != len(sentences) or (workload.exact and tokens != workload.limit * len(sentences)):
        raise SystemExit(
            f"{contestant.name} gave {len(ids)} translations of {tokens} tokens, expected {len(sentences)} of "
            f"{workload.limit} each: its times cannot be compared. Leave the peer out with --peers."
        )
    return reply["seconds"], ids


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


# Environments


def site_packages(folder: Path) -> Path:
    """Where an environment has its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "installed_base": str(folder)}))


def environment(peer: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made where it is not there or has other requirements."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    requirements = "\n".join(REQUIREMENTS[peer])
    marker = folder / "requirements.txt"
    if python.exists() and marker.exists() and marker.read_text(encoding="utf-8") == requirements:
        return python
    say(f"installing {', '.join(REQUIREMENTS[peer])} in {folder}")
    if not python.exists():
        venv.create(folder, with_pip=True)
    # kvx's own packages count as installed, so that pip fetches only what they lack: torch is large
    (site_packages(folder) / "kvx.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]], check=False)
    if done.returncode:
        raise SystemExit(
            f"{peer}: pip could not install {' '.join(REQUIREMENTS[peer])} in {folder}; see its message above. "
            "Check the network, or leave the peer out with --peers."
        )
    marker.write_text(requirements, encoding="utf-8")
    return python


# Settings: the usual one of each task stands first, and is the only one with --quick


def ctranslate2_contestants(folder: Path) -> list[Contestant]:
    """CTranslate2 in float32 and int8."""

    def setting(kind: str, inter: int, intra: int, rows: int) -> Setting:
        model = str(folder / f"ctranslate2-{kind}")
        label = f"{inter} × {intra} thread{'s' * (inter * intra > 1)}" + (f", {rows} rows" if rows else "")
        load: Options = {"model": model, "precision": kind, "inter": inter, "intra": intra}
        return Setting(label, load, {"rows": rows})

    kinds: tuple[tuple[str, str, Precision], ...] = ((CT2, "float32", "fp32"), (CT2_INT8, "int8", "int8"))
    together = [(inter, intra, rows) for inter, intra in ((THREADS, 1), (1, THREADS)) for rows in (64, 32, 128)]
    return [
        Contestant(
            name,
            "ctranslate2",
            precision,
            name,
            {
                "alone": tuple(setting(kind, 1, intra, 0) for intra in (THREADS, 1)),
                "together": tuple(setting(kind, *sizes) for sizes in together),
            },
        )
        for name, kind, precision in kinds
    ]


def python_contestant(name: str, peer: str, load: Options) -> Contestant:
    """transformers or Optimum-ONNX, which differ only in what they load."""

    def setting(threads: int, rows: int) -> Setting:
        label = f"{threads} thread{'s' * (threads > 1)}" + (f", {rows} rows" if rows else "")
        return Setting(label, {**load, "threads": threads}, {"threads": threads, "rows": rows})

    alone = tuple(setting(threads, 0) for threads in (THREADS, 1))
    together = tuple(setting(THREADS, rows) for rows in (64, 32))
    return Contestant(name, peer, "fp32", CT2, {"alone": alone, "together": together}, slow=True)


def kvx_contestant(exported: Exported, folder: Path) -> Contestant:
    """kvx on a bundle's graphs."""
    bundle = str(folder / exported.folder)

    def setting(label: str, run: Options, **load: object) -> Setting:
        return Setting(label, {"bundle": bundle, "workers": None, "spin": False, **load}, run)

    alone = (
        setting(f"{THREADS} threads, spin", {"rows": 0}, threads=THREADS, spin=True),
        setting(f"{THREADS} threads", {"rows": 0}, threads=THREADS),
        setting("1 thread", {"rows": 0}, threads=1),
    )
    together = (
        *(
            setting(
                f"{THREADS} workers, {rows} rows",
                {"rows": rows, "workers": THREADS},
                threads=THREADS,
                workers=THREADS,
            )
            for rows in (64, 32)
        ),
        setting(f"1 worker of {THREADS} threads, 64 rows", {"rows": 64, "workers": 1}, threads=THREADS),
    )
    rival = CT2 if exported.precision == "fp32" else CT2_INT8
    tasks: Mapping[Task, tuple[Setting, ...]] = {"alone": alone, "together": together}
    return Contestant(exported.contestant, "kvx", exported.precision, rival, tasks)


def eager_contestant(name: str, folder: Path, bundle: Exported, *, cache: bool) -> Contestant:
    """kvx's eager model, which takes its limits from any bundle."""
    load: Options = {
        "bundle": str(folder / bundle.folder),
        "checkpoint": str(folder / "model.pt"),
        "cache": cache,
        "threads": THREADS,
    }
    together = Setting(f"{THREADS} threads, {ROWS} rows", load, {"rows": ROWS, "workers": 1})
    alone = Setting(f"{THREADS} threads", load, {"rows": 0})
    return Contestant(name, "kvx", "fp32", CT2, {"alone": (alone,), "together": (together,)}, slow=True)


def given(folder: Path) -> Options:
    """What a peer takes the model from: the folder that it reads by itself, or else the weights of kvx's model."""
    own = folder / HUGGINGFACE
    return {"huggingface": str(own)} if own.exists() else {"weights": str(folder)}


def contestants(folder: Path, scope: Scope) -> list[Contestant]:
    """All that take part with the model in this folder."""
    found: list[Contestant] = []
    if "ctranslate2" in scope.peers:
        found += ctranslate2_contestants(folder)
    found += [kvx_contestant(bundle, folder) for bundle in scope.bundles]
    if "transformers" in scope.peers:
        found.append(python_contestant(TRANSFORMERS, "transformers", given(folder)))
    if "optimum" in scope.peers:
        found.append(python_contestant(OPTIMUM, "optimum", {"model": str(folder / "optimum")}))
    found.append(eager_contestant(CACHED, folder, scope.bundles[0], cache=True))
    if UNCACHED_PEER in scope.peers:
        found.append(eager_contestant(UNCACHED, folder, scope.bundles[0], cache=False))
    return [first_settings(contestant) for contestant in found] if scope.quick else found


def first_settings(contestant: Contestant) -> Contestant:
    """The contestant with one setting for each task, which then needs no trial."""
    settings = {task: settings[:1] for task, settings in contestant.settings.items()}
    return dataclasses.replace(contestant, settings=settings)


# Models


def model_folder(work: Path, name: str, model: Transformer) -> Path:
    """Where all that is made of a model is kept: a folder for these weights and these runners."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict()).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for runner in sorted(RUNNERS.glob("*.py")):
        digest.update(runner.read_bytes())
    folder = work / "models" / f"{name}-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_model(work: Path, name: str, source: Path, model: Transformer, limit: int) -> Path:
    """The checkpoint, its tokenizers, and its weights for the peers."""
    folder = model_folder(work, name, model)
    save_checkpoint(Checkpoint(model, max_new_tokens=limit, notes=()), folder / "model.pt")
    for tokenizer in ("source.model", "target.model"):
        (folder / tokenizer).unlink(missing_ok=True)
        shutil.copyfile(source / tokenizer, folder / tokenizer)
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    np.savez(folder / "weights.npz", **arrays)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    return folder


def export_bundles(folder: Path, limit: int, bundles: Iterable[Exported], *, checkpoint: Path | None = None) -> None:
    """The bundles as this checkout makes them. One that is there stays unless what it comes from has changed."""
    origin = digest_of_export(folder / "calibration.txt", limit)
    for bundle in bundles:
        marker = folder / f"{bundle.folder}.origin"
        if (folder / bundle.folder).exists() and marker.exists() and marker.read_text(encoding="utf-8") == origin:
            continue
        say(f"exporting {bundle.folder}")
        export(
            ExportOptions(
                checkpoint=checkpoint or folder / "model.pt",
                output=folder / bundle.folder,
                format="onnx",
                precision=bundle.precision,
                calibration=folder / "calibration.txt" if bundle.calibrated else None,
                max_new_tokens=limit,
                verify=False,
                force=True,
            )
        )
        marker.write_text(origin, encoding="utf-8")


def digest_of_export(calibration: Path, limit: int) -> str:
    """Of all that a bundle comes from but the model, for which the folder stands."""
    digest = hashlib.sha256(f"{limit} ".encode() + calibration.read_bytes())
    for package in EXPORTING:
        for source in sorted((RUNNERS.parents[1] / package).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def base_workload(work: Path, scope: Scope) -> Workload:
    """The base-size model and random sentences."""
    made = work / "base-model"
    checkpoint = load_checkpoint(write_base_model(made, max_new_tokens=BASE_LIMIT))
    folder = write_model(work, "base", made, checkpoint.model, BASE_LIMIT)
    words = random.Random(0)
    drawn = [
        [words.randrange(FIRST_WORD, BASE.source_vocab_size) for _ in range(WORDS)]
        for _ in range(BASE_SENTENCES + BASE_CALIBRATION)
    ]
    calibration = [" ".join(f"w{word}" for word in sentence) for sentence in drawn[BASE_SENTENCES:]]
    (folder / "calibration.txt").write_text("\n".join(calibration) + "\n", encoding="utf-8")
    export_bundles(folder, BASE_LIMIT, scope.bundles)
    return Workload(
        name="base",
        title="Base size, random weights (6 + 6 layers, d_model 512, 32,000 words)",
        folder=folder,
        config=checkpoint.model.config,
        sentences=[[BOS, *sentence, EOS] for sentence in drawn[:BASE_SENTENCES]],
        limit=BASE_LIMIT,
        exact=True,
        counts=QUICK if scope.quick else {"alone": 40, "together": BASE_SENTENCES},
        slow_counts=QUICK_SLOW if scope.quick else {"alone": 10, "together": 64},
        few=8,
        calibration=f"{BASE_CALIBRATION} random sentences that are not among those translated",
    )


def marian_workload(work: Path, scope: Scope) -> Workload:
    """A random model in the shape of OPUS-MT, from its folder, and random sentences."""
    made = write_marian_model(work / "marian-model", max_length=BASE_LIMIT + 1)
    checkpoint = load_checkpoint(made)
    folder = model_folder(work, "marian", checkpoint.model)
    save_checkpoint(checkpoint, folder / "model.pt")
    shutil.copytree(made, folder / HUGGINGFACE, dirs_exist_ok=True)
    lines = (made / "sources.txt").read_text(encoding="utf-8").split("\n")[:-1]
    (folder / "calibration.txt").write_text("\n".join(lines[:BASE_CALIBRATION]) + "\n", encoding="utf-8")
    export_bundles(folder, BASE_LIMIT, scope.bundles, checkpoint=folder / HUGGINGFACE)
    sentences = [list(text.ids) for text in SourceReader(Bundle.open(folder / scope.bundles[0].folder)).read(lines)]
    return Workload(
        name="marian",
        title="The shape of OPUS-MT, random weights (6 + 6 layers, d_model 512, 58,101 tokens, tied)",
        folder=folder,
        config=checkpoint.model.config,
        sentences=sentences,
        limit=BASE_LIMIT,
        exact=True,
        counts=QUICK if scope.quick else {"alone": 40, "together": len(sentences)},
        slow_counts=QUICK_SLOW if scope.quick else {"alone": 10, "together": 64},
        few=8,
        calibration=f"{BASE_CALIBRATION} of the sentences",
    )


def seed_workload(work: Path, seed: Path, calibration: Path | None, scope: Scope) -> Workload:
    """The trained model and its test text."""
    absent = [name for name in SEED_FILES if not (seed / name).is_file()]
    if absent:
        raise SystemExit(f"{seed} has no {', '.join(absent)}. Name the model's folder with --seed-model.")
    checkpoint = load_checkpoint(seed / SEED_FILES[0], heads=SEED_HEADS)
    folder = write_model(work, "seed", seed, checkpoint.model, SEED_LIMIT)
    with open_lines(seed / SEED_FILES[-1]) as stream:
        lines = list(read_lines(stream))
    calibrating = lines[:SEED_CALIBRATION]
    if calibration is not None:
        with open_lines(calibration) as stream:
            calibrating = list(read_lines(stream))
    (folder / "calibration.txt").write_text("\n".join(calibrating) + "\n", encoding="utf-8")
    export_bundles(folder, SEED_LIMIT, scope.bundles)
    texts = SourceReader(Bundle.open(folder / scope.bundles[0].folder)).read(lines)
    sentences = [list(text.ids) for text in texts if text.ids]
    return Workload(
        name="seed",
        title=f"Reference model, {len(sentences)} lines of {SEED_FILES[-1]}",
        folder=folder,
        config=checkpoint.model.config,
        sentences=sentences,
        limit=SEED_LIMIT,
        exact=False,
        counts=QUICK if scope.quick else {"alone": 40, "together": len(sentences)},
        slow_counts=QUICK_SLOW if scope.quick else {"alone": 40, "together": 256},
        few=20,
        calibration=f"{len(calibrating)} lines of the user's text"
        if calibration
        else f"the first {len(calibrating)} lines of the text that is translated",
    )


def prepare_peers(folder: Path, pythons: Mapping[str, Path]) -> None:
    """What the peers make of the weights, once: a model that is there is complete."""
    wanted: list[tuple[str, str, Options]] = [
        ("ctranslate2", "ctranslate2-float32", {"precision": "float32"}),
        ("ctranslate2", "ctranslate2-int8", {"precision": "int8"}),
        ("optimum", "optimum", {}),
    ]
    for peer, name, options in wanted:
        if peer not in pythons or (folder / name).exists():
            continue
        say(f"preparing {name}")
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with Process(peer, pythons[peer]) as process:
            process.ask("prepare", model=str(partial), **options, **given(folder))
        partial.rename(folder / name)


# Measuring


def value(task: Task, seconds: float, ids: Ids) -> float:
    """Milliseconds per sentence, or tokens per second."""
    return seconds * 1000 / len(ids) if task == "alone" else sum(map(len, ids)) / seconds


def best(task: Task) -> Callable[[Iterable[float]], float]:
    """What the best of several values is."""
    return min if task == "alone" else max


def ratio(compared: Compared, ours: float, theirs: float) -> float:
    """How many times as fast ours is, or how many times as much memory it takes."""
    return theirs / ours if compared == "alone" else ours / theirs


def try_settings(bench: Bench, contestant: Contestant, task: Task, workload: Workload) -> dict[str, float]:
    """Each setting's best value over the trials; nothing for a contestant with one setting."""
    sentences = workload.of(contestant, task)
    if task == "alone":
        sentences = sentences[: workload.few]
    tried: dict[str, float] = {}
    settings = contestant.settings[task]
    for setting in settings if len(settings) > 1 else ():
        say(f"{workload.name}, {TITLES[task].lower()}: trying {contestant.name}, {setting.label}")
        bench.load(contestant, setting)
        bench.run(contestant, setting, workload, sentences[:1])
        values = [value(task, *bench.run(contestant, setting, workload, sentences)) for _ in range(TRIALS)]
        tried[setting.label] = best(task)(values)
        bench.unload(contestant)
    return tried


def choose(contestant: Contestant, task: Task, tried: Mapping[str, float]) -> Setting:
    """The setting that was best in its trial."""
    if not tried:
        return contestant.settings[task][0]
    winner = best(task)(tried.values())
    return next(setting for setting in contestant.settings[task] if tried[setting.label] == winner)


def measure(
    bench: Bench, chosen: Sequence[tuple[Contestant, Setting]], task: Task, workload: Workload
) -> dict[str, Measured]:
    """Repetitions that run every contestant once each, all of them loaded and warm."""
    for contestant, setting in chosen:
        bench.load(contestant, setting)
        warming = workload.of(contestant, task)[: 2 if task == "alone" else ROWS]
        bench.run(contestant, setting, workload, warming)
    measured: dict[str, Measured] = {}
    for repetition in range(bench.repeat):
        say(f"{workload.name}, {TITLES[task].lower()}: repetition {repetition + 1} of {bench.repeat}")
        for contestant, setting in chosen:
            seconds, ids = bench.run(contestant, setting, workload, workload.of(contestant, task))
            tokens = sum(map(len, ids))
            new = Measured(contestant.name, setting.label, [], len(ids), tokens, ids)
            measured.setdefault(contestant.name, new).values.append(value(task, seconds, ids))
    for contestant, _ in chosen:
        bench.unload(contestant)
    return measured


def measure_fresh(bench: Bench, chosen: Sequence[tuple[Contestant, Setting]], workload: Workload) -> list[Fresh]:
    """Each contestant in fresh processes: seconds to a first translation, and once the peak of a throughput run."""
    found = {contestant.name: Fresh(contestant.name, None, []) for contestant, _ in chosen}
    for repetition in range(min(bench.repeat, FIRST_RUNS)):
        say(f"{workload.name}, fresh processes: repetition {repetition + 1}")
        for contestant, setting in chosen:
            fresh = found[contestant.name]
            with Process(contestant.peer, bench.pythons[contestant.peer]) as process:
                loaded = process.ask("load", key=contestant.name, **setting.load)
                seconds, _ = run(process, contestant, setting, workload, workload.sentences[:1])
                fresh.first_seconds.append(loaded["seconds"] + seconds)
                if repetition == 0:
                    peak = _peak(process, contestant, setting, workload)
                    found[contestant.name] = dataclasses.replace(fresh, peak_mb=peak)
    return list(found.values())


def _peak(process: Process, contestant: Contestant, setting: Setting, workload: Workload) -> float | None:
    sentences = workload.of(contestant, "together")
    options = {**setting.run, "rows": ROWS}
    reply = process.ask("run", key=contestant.name, sentences=sentences, max_new_tokens=workload.limit, **options)
    peak: float | None = reply["peak_mb"]
    return peak


def compare(bench: Bench, results: Results) -> list[Agreement]:
    """The throughput translations of all beside those of the eager model with its cache."""
    workload, everyone = results.workload, results.contestants
    eager = next(contestant for contestant in everyone if contestant.name == CACHED)
    setting = eager.settings["together"][0]
    most = max(len(workload.of(contestant, "together")) for contestant in everyone)
    bench.load(eager, setting)
    _, reference = bench.run(eager, setting, workload, workload.sentences[:most])
    bench.unload(eager)
    return [
        Agreement(
            name,
            sentences=len(measured.ids),
            equal=sum(a == b for a, b in zip(measured.ids, reference, strict=False)),
            tokens=measured.tokens,
            reference_tokens=sum(map(len, reference[: len(measured.ids)])),
        )
        for name, measured in results.measured["together"].items()
    ]


def shares(results: Results, peaks: Peaks) -> list[Share]:
    """Those of CTranslate2 and of kvx's graphs."""
    config, found = results.workload.config, []
    for contestant in results.contestants:
        if contestant.slow:
            continue
        alone, together = (results.measured[task][contestant.name] for task in ("alone", "together"))
        source_tokens = sum(map(len, results.workload.of(contestant, "together")))
        done = operations(config, source_tokens, together.tokens) * together.median / together.tokens
        steps = alone.tokens / alone.sentences * 1000 / alone.median
        read = step_bytes(config, contestant.precision) * steps
        peak = peaks.float32 if contestant.precision == "fp32" else peaks.int8
        found.append(Share(contestant.name, products=done / peak, reading=read / peaks.memory))
    return found


def measure_model(bench: Bench, workload: Workload, scope: Scope, peaks: Peaks) -> Results:
    """Everything with one model."""
    prepare_peers(workload.folder, bench.pythons)
    everyone = contestants(workload.folder, scope)
    results = Results(workload, everyone)
    chosen: list[tuple[Contestant, Setting]] = []
    for task in ("alone", "together"):
        tried = {contestant.name: try_settings(bench, contestant, task, workload) for contestant in everyone}
        chosen = [(contestant, choose(contestant, task, tried[contestant.name])) for contestant in everyone]
        results.tried[task] = tried
        results.measured[task] = measure(bench, chosen, task, workload)
    results.agreement = compare(bench, results)
    results.shares = shares(results, peaks)
    results.fresh = measure_fresh(bench, chosen, workload)
    return results


# Printing


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table; the first column is text, the others are to the right."""
    print(*markdown_table(columns, rows, text={0}), "", sep="\n")


def spread(values: Sequence[float]) -> str:
    """Smallest to largest."""
    return f"{shown(min(values))}–{shown(max(values))}"


def shown(number: float) -> str:
    """Three digits that mean something."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def print_task(results: Results, task: Task) -> None:
    """The table of one task."""
    measured = results.measured[task]
    print(f"### {TITLES[task]}\n")
    rows = []
    for contestant in results.contestants:
        own, rival = measured[contestant.name], measured.get(contestant.rival)
        times = f"{ratio(task, own.median, rival.median):.2f}" if rival else "–"
        rows.append((contestant.name, own.setting, str(own.sentences), shown(own.median), spread(own.values), times))
    table(("", "setting", "sentences", UNITS[task], "spread", "times CTranslate2"), rows)


def print_agreement(results: Results) -> None:
    """What the contestants translate to."""
    limit = f", {results.workload.limit} each as required" if results.workload.exact else ""
    print("### The same translations\n")
    print(f"Of the throughput run, compared with kvx's eager model with its cache{limit}.\n")
    rows = [
        (
            own.contestant,
            str(own.sentences),
            f"{own.equal / own.sentences:.1%}",
            f"{own.tokens:,}",
            f"{own.reference_tokens:,}",
        )
        for own in results.agreement
    ]
    table(("", "sentences", "equal", "tokens", "tokens, eager"), rows)
    exact = (CT2, TRANSFORMERS, OPTIMUM, KVX, CACHED, UNCACHED)
    different = [own.contestant for own in results.agreement if own.contestant in exact and own.equal < own.sentences]
    if different:
        print(f"**Not all translations of {', '.join(different)} are equal, though in float32.**\n")
    else:
        print("All translations in float32 are equal.\n")


def print_fresh(results: Results) -> None:
    """Memory and start."""
    print("### Fresh processes\n")
    print(f"Peak memory of a throughput run at {ROWS} rows; time from before the load to a first translation.\n")
    timed = {CT2, CT2_INT8, KVX, *KVX_INT8, *KVX_INT4}
    rows = []
    for fresh in results.fresh:
        first = ("–", "–")
        if fresh.contestant in timed:
            first = (f"{statistics.median(fresh.first_seconds):.2f}", spread(fresh.first_seconds))
        rows.append((fresh.contestant, "–" if fresh.peak_mb is None else f"{fresh.peak_mb:,.0f}", *first))
    table(("", "peak MiB", "first translation, s", "spread"), rows)


def print_shares(results: Results) -> None:
    """How near the contestants are to what the machine can do."""
    print("### Of what the machine can do\n")
    print(
        f"In throughput, the products with weights as a share of those that {THREADS} threads can do in this time; for "
        "one sentence at a time, reading the decoder's weights once a token as a share of what they can read.\n"
    )
    rows = [(own.contestant, f"{own.products:.0%}", f"{own.reading:.0%}") for own in results.shares]
    table(("", "products", "reading"), rows)


def print_results(results: Results) -> None:
    """All tables of one model."""
    workload = results.workload
    print(f"## {workload.title}\n")
    print(f"At most {workload.limit} new tokens. Calibrated on {workload.calibration}.\n")
    for task in results.measured:
        print_task(results, task)
    print_shares(results)
    print_agreement(results)
    print_fresh(results)


def judge(all_results: Sequence[Results], *, vnni: bool) -> list[dict[str, object]]:
    """Each goal whose contestants took part, with what was reached."""
    by_name = {results.workload.name: results for results in all_results}
    found: list[dict[str, object]] = []
    for goal in GOALS:
        figures = by_name[goal.model].figures(goal.task) if goal.model in by_name else {}
        present = [name for name in goal.ours if name in figures]
        if not present or goal.theirs not in figures:
            continue
        ratios = {name: ratio(goal.task, figures[name], figures[goal.theirs]) for name in present}
        ours = goal.best(ratios)
        factor = None if goal.factors is None else goal.factors[0 if vnni else 1]
        found.append(
            {
                "model": goal.model,
                "task": goal.task,
                "ours": ours,
                "theirs": goal.theirs,
                "factor": factor,
                "ratio": ratios[ours],
                "verdict": goal.verdict(ratios[ours], factor),
            }
        )
    return found


def print_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    """The table of goals."""
    print("## Goals\n")
    rows = [
        (
            f"{goal['model']}, {TITLES[goal['task']].lower()}: {goal['ours']} to {goal['theirs']}",
            "–" if goal["factor"] is None else f"{'≤' if goal['task'] == 'memory' else '≥'} {goal['factor']}",
            f"{goal['ratio']:.2f}",
            goal["verdict"],
        )
        for goal in goals
    ]
    table(("", "goal", "reached", ""), rows)


def print_head(arguments: argparse.Namespace, versions: Mapping[str, Mapping[str, str]], peaks: Peaks) -> None:
    """Machine and packages."""
    print(f"# Peers\n\n{cpu_model()}, {os.cpu_count()} CPUs, Python {platform.python_version()}. ", end="")
    print(f"{arguments.repeat} interleaved repetitions: median, smallest–largest. Up to {THREADS} threads.\n")
    for peer, packages in versions.items():
        named = [f"{name} {packages[name]}" for name in NAMED_VERSIONS[peer] if name in packages]
        print(f"- {peer}: {', '.join(named)}")
    print(
        "\ntransformers and Optimum-ONNX run a Hugging Face folder as it is and kvx's weights as M2M100; Optimum-ONNX "
        "by its own export, batches of both longest first. Slow contestants translate fewer sentences than the others, "
        "as the tables say.\n"
    )
    print(
        f"{THREADS} threads do {peaks.float32 / 1e9:,.0f} G operations/s in products of float32 and "
        f"{peaks.int8 / 1e9:,.0f} in products of bytes, and read {peaks.memory / 1e9:,.0f} GB/s of "
        f"{machine.MEBIBYTES[-1]} MiB (benchmarks/machine.py).\n"
    )


def report(
    arguments: argparse.Namespace,
    versions: Mapping[str, Mapping[str, str]],
    peaks: Peaks,
    all_results: Sequence[Results],
) -> None:
    """Tables on stdout, and everything as JSON where asked for."""
    print_head(arguments, versions, peaks)
    for results in all_results:
        print_results(results)
    goals = judge(all_results, vnni=not bytes_saturate())
    print_goals(goals)
    if arguments.json is not None:
        content = {
            "processor": cpu_model(),
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "repeat": arguments.repeat,
            "versions": versions,
            "peaks": dataclasses.asdict(peaks),
            "models": {results.workload.name: as_dict(results) for results in all_results},
            "goals": goals,
        }
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def as_dict(results: Results) -> dict[str, object]:
    """What was measured, without the ids and the paths."""
    tasks = {
        task: [
            {
                **{key: own for key, own in dataclasses.asdict(measured).items() if key != "ids"},
                "median": measured.median,
            }
            for measured in found.values()
        ]
        for task, found in results.measured.items()
    }
    return {
        "title": results.workload.title,
        "limit": results.workload.limit,
        "calibration": results.workload.calibration,
        "units": UNITS,
        "measured": tasks,
        "tried": results.tried,
        "fresh": [dataclasses.asdict(fresh) for fresh in results.fresh],
        "agreement": [dataclasses.asdict(agreement) for agreement in results.agreement],
        "shares": [dataclasses.asdict(share) for share in results.shares],
    }


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The reader of a list of some of the known names."""

    def read(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        if not set(given) <= set(known):
            raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(known)}")
        return given

    return read


def default_work() -> Path:
    """A folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvx-peers"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed-model", type=Path, help="folder of the trained model; without it, only base runs")
    parser.add_argument("--calibration", type=Path, help="text for the trained model's fixed scales")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, default=default_work(), help="environments and models, kept for later runs"
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--models", type=names(MODELS), default=["base", "seed"])
    parser.add_argument(
        "--peers",
        type=names(PEERS),
        help=f"who takes part beside kvx: some of {','.join(PEERS)}; {UNCACHED_PEER} is kvx's eager model without its "
        f"cache (default: all; with --quick {','.join(QUICK_PEERS)})",
    )
    parser.add_argument(
        "--precisions",
        type=names(PRECISIONS),
        default=list(PRECISIONS),
        help=f"kvx's bundles that are exported and take part: some of {','.join(PRECISIONS)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a first impression: few sentences, one repetition, the usual setting of each without a trial, and only "
        f"{','.join(QUICK_PEERS)} unless --peers names others",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeat = 1
    if arguments.peers is None:
        arguments.peers = list(QUICK_PEERS if arguments.quick else PEERS)
    if not arguments.precisions:
        parser.error(f"--precisions: expected some of {','.join(PRECISIONS)}")
    if arguments.repeat < 1:
        parser.error("--repeat: expected 1 or more")
    if arguments.seed_model is None and arguments.models == ["seed"]:
        parser.error("--models seed needs --seed-model")
    arguments.work = arguments.work.absolute()
    return arguments


def main() -> None:
    """Makes what is missing, measures, prints."""
    arguments = parse()
    scope = Scope(arguments.peers, arguments.precisions, arguments.quick)
    venvs = arguments.work / "venvs"
    pythons = {peer: environment(peer, venvs / peer) for peer in REQUIREMENTS if peer in scope.peers}
    pythons["kvx"] = Path(sys.executable)
    peaks = Peaks.measured()
    workloads: list[Workload] = []
    if "base" in arguments.models:
        workloads.append(base_workload(arguments.work, scope))
    if "marian" in arguments.models:
        workloads.append(marian_workload(arguments.work, scope))
    if "seed" in arguments.models and arguments.seed_model is not None:
        workloads.append(seed_workload(arguments.work, arguments.seed_model, arguments.calibration, scope))
    with ExitStack() as stack:
        processes = {peer: stack.enter_context(Process(peer, python)) for peer, python in pythons.items()}
        versions = {peer: process.ask("versions") for peer, process in processes.items()}
        bench = Bench(pythons, processes, arguments.repeat)
        all_results = [measure_model(bench, workload, scope, peaks) for workload in workloads]
    report(arguments, versions, peaks, all_results)


if __name__ == "__main__":
    main()
