"""How fast a bundle is on this machine: by rows, by target length, on texts. Only the library, numpy and a clock."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

import kvx
from kvx.runtime.arrays import FloatArray
from kvx.runtime.decoding.backend import Backend, StepOutput
from kvx.runtime.decoding.decode import decode
from kvx.runtime.decoding.device_loop import feeds_itself
from kvx.runtime.decoding.plan import Plan, rung
from kvx.runtime.decoding.results import DecodeStats, Sentence
from kvx.runtime.decoding.rows import ActiveRows, Choice
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.engine.core import core_for
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.translating import translate
from kvx.runtime.errors import CapacityError, OptionError
from kvx.runtime.measuring.tables import MEBIBYTE, markdown_table, mebibytes
from kvx.runtime.options import TranslateKeywords, TranslateOptions
from kvx.runtime.rules import Option, Problem, Rule, count, refuse, wrong_values
from kvx.runtime.system import available_threads, cpu_model, peak_bytes, reset_peak

FIRST_TEXT = "Hello."
RUNS_OVER_TEXTS = 3
MOST_ROWS = 2**16
MOST_REPEATS = 10_000
LARGEST_SEED = 2**64 - 1
ROW_COUNT = count(MOST_ROWS)
POSITIONS = count(2**24)


def _ascending(least: int) -> Rule:
    """Whole numbers in ascending order, at least this many of them."""

    def holds(value: object) -> bool:
        if not isinstance(value, tuple) or len(value) < least or not all(map(ROW_COUNT.holds, value)):
            return False
        return all(low < high for low, high in itertools.pairwise(value))

    some = "one or more whole numbers" if least else "whole numbers"
    return Rule(f"{some} from 1 to {MOST_ROWS} in ascending order", holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. Every source has drawn ids. Raises OptionError."""

    rows: Annotated[tuple[int, ...], Option(_ascending(1), "Batch sizes to measure, separated by commas.")] = (
        1,
        8,
        32,
        128,
    )
    lengths: Annotated[
        tuple[int, ...],
        Option(
            _ascending(0),
            "Translation lengths at which to measure the time per token, separated by commas. An empty list measures "
            "none.",
        ),
    ] = (50, 100, 200, 400, 700, 1000)
    tokens: Annotated[int, Option(POSITIONS, "Decoder steps to measure at each batch size.")] = 24
    source_tokens: Annotated[int, Option(POSITIONS, "The length of every source in tokens, bos and eos included.")] = 20
    length_rows: Annotated[
        int,
        Option(
            ROW_COUNT,
            "The batch size at which to measure `lengths`. It is lowered where the default cache has too little room.",
        ),
    ] = 32
    repeat: Annotated[int, Option(count(MOST_REPEATS), "How often to measure each batch size.")] = 5
    length_repeat: Annotated[
        int, Option(count(MOST_REPEATS), "How often to measure the translation lengths.", hidden=True)
    ] = 3
    seed: Annotated[int, Option(count(LARGEST_SEED, least=0), "What the ids are drawn from.", hidden=True)] = 0

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: the bundle's name, and the `threads`, `workers` and `spin` that it is loaded with (None:
    the default).
    """

    bundle: str
    threads: int | None = None
    workers: int | None = None
    spin: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What it was measured on: the CPU's model, the cores available, and the versions of what ran."""

    cpu: str
    cores: int
    kvx: str
    onnxruntime: str
    numpy: str

    @classmethod
    def here(cls) -> Self:
        """This machine and this process."""
        return cls(
            cpu=cpu_model(),
            cores=available_threads(),
            kvx=kvx.__version__,
            onnxruntime=_onnxruntime_version(),
            numpy=np.__version__,
        )


def _onnxruntime_version() -> str:
    """Of the package that is installed, whichever it is."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "not installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCost:
    """Seconds from the start of loading until the model was there, and until its first translation was;
    `peak_mib` of resident memory by then, None where the system does not say.
    """

    load_seconds: float
    first_translation_seconds: float
    peak_mib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpeed:
    """The fastest of several runs over the texts. `occupancy` of the planned rows, 0 to 1; `peak_mib` of resident
    memory since the start of loading, None where the system does not say.
    """

    sentences: int
    tokens: int
    seconds: float
    sentences_per_second: float
    tokens_per_second: float
    occupancy: float
    peak_mib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """A decode of this many `rows`, in milliseconds: the median and the least of its steps, and the median over the
    repeats of encoding and all steps together, divided by the rows.
    """

    rows: int
    step_ms: float
    least_step_ms: float
    sentence_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthCost:
    """All steps up to a target length, in milliseconds, and their mean for one token of every row."""

    length: int
    total_ms: float
    token_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthCurve:
    """The cost of target lengths with this many `rows`. `left_out` are the lengths beyond the model's target positions;
    `ratio` is a token's mean cost at the longest length over that at the shortest, None without lengths.
    """

    rows: int
    costs: tuple[LengthCost, ...]
    left_out: tuple[int, ...]
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What a bundle cost on a machine. `model` is its configuration, `texts` None where none were given."""

    subject: Subject
    machine: Host
    backend: str
    precision: str
    lowering: str
    model: Mapping[str, int]
    options: BenchOptions
    start: StartCost
    texts: TextSpeed | None
    rows: tuple[RowCost, ...]
    lengths: LengthCurve
    peak_mib: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        form: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return form


@dataclass(frozen=True, slots=True)
class Unending(Greedy):
    """Greedy, but a row that would end goes on with another token: every decode is as long as its limit."""

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """logits [n, V] → argmax [n], the lowest other id instead of eos."""
        ids = Greedy.choose(self, output, logits, rows).ids
        return Choice(np.where(ids == rows.eos, int(rows.eos == 0), ids), np.zeros(len(ids), bool))


class DecodeTimes(NamedTuple):
    """Seconds of encoding and seating all sources, and of each step [steps]."""

    encode: float
    steps: NDArray[np.float64]


def bench(
    make_model: Callable[[], LoadedModel],
    subject: Subject,
    texts: Sequence[str] | None = None,
    options: BenchOptions | None = None,
    *,
    make_bulk: Callable[[], LoadedModel] | None = None,
) -> BenchResult:
    """Loads the subject and measures it; `texts` are translated as `translate_iter` does by default, by a model of
    their own where `make_bulk` gives one.

    Raises OptionError for what the model has no positions for, CapacityError for rows that cannot fit, InputError for
    texts that cannot be translated.
    """
    options = options or BenchOptions()
    reset_peak()
    start, loaded = _start(make_model, next((text for text in texts or () if text.strip()), FIRST_TEXT))
    manifest = loaded.manifest
    if feeds_itself(loaded.backend):
        raise OptionError(
            "The steps on this device feed themselves and cannot be measured one by one",
            expected="a backend whose cache is on the host",
            remedy="Use `device` cpu, or measure the device with benchmarks/gpu.py.",
            option="device",
        )
    _check_positions(options, manifest.model)
    plans = [_plan(loaded, options, rows=rows, tokens=options.tokens) for rows in options.rows]
    return BenchResult(
        subject=subject,
        machine=Host.here(),
        backend=loaded.backend.name,
        precision=manifest.precision,
        lowering=manifest.lowering,
        model=manifest.model,
        options=options,
        start=start,
        texts=_text_speed(make_bulk() if make_bulk else loaded, texts, subject.workers) if texts else None,
        rows=tuple(_row_cost(loaded, plan, options) for plan in plans),
        lengths=_length_curve(loaded, options),
        peak_mib=_peak_mib(),
    )


class StepClock:
    """Notes when each step of a decode begins: `decode` asks before each of them whether it is cancelled."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def __call__(self) -> bool:
        """Notes the time; nothing is cancelled."""
        self.begun.append(time.perf_counter())
        return False


def decode_times(backend: Backend, plan: Plan, sources: Sequence[Sentence]) -> DecodeTimes:
    """Decodes as many sources as the plan has rows, each to the plan's limit, repacking included."""
    clock, started = StepClock(), time.perf_counter()
    for _ in decode(backend, sources, Unending(), plan, cancelled=clock):
        pass
    ended = time.perf_counter()
    return DecodeTimes(clock.begun[0] - started, np.diff([*clock.begun, ended]))


def table(result: BenchResult) -> Iterator[str]:
    """The result as lines to read, its curves as Markdown tables."""
    yield from headline(result.to_dict())
    start, options = result.start, result.options
    yield (
        f"loaded in {start.load_seconds:.2f} s, first translation after {start.first_translation_seconds:.2f} s, "
        f"peak {_mib(start.peak_mib)}"
    )
    yield ""
    yield from _row_lines(result.rows)
    yield f"{options.source_tokens} source tokens, {options.tokens} steps, repeat {options.repeat}"
    yield ""
    yield from _length_lines(result.lengths)
    yield ""
    if result.texts is not None:
        yield _text_line(result.texts)
    yield f"peak of all {_mib(result.peak_mib)}"


def headline(result: Mapping[str, Any]) -> tuple[str, str]:
    """Of a result in its JSON form, a line on the bundle and one on the machine."""
    model, machine, subject = result["model"], result["machine"], result["subject"]
    threads, workers = (subject[name] or "default" for name in ("threads", "workers"))
    return (
        f"{subject['bundle']} on {result['backend']}: {model['encoder_layers']} + {model['decoder_layers']} layers, "
        f"d_model {model['d_model']}, {result['precision']}, lowering {result['lowering']}",
        f"{machine['cpu']}, {machine['cores']} cores; threads {threads}, workers {workers}"
        f"{', spinning' if subject['spin'] else ''}; kvx {machine['kvx']}, ONNX Runtime {machine['onnxruntime']}, "
        f"numpy {machine['numpy']}",
    )


def _check_positions(options: BenchOptions, model: Mapping[str, int]) -> None:
    """Raises OptionError unless the model has the positions for the steps by row count."""
    needs = (("source_tokens", "source_positions"), ("tokens", "target_positions"))
    refuse(
        Problem(
            name,
            f"`{name}` is {getattr(options, name)}",
            f"at most {model[positions]} for `{name}`, the model's {positions.replace('_', ' ')}",
        )
        for name, positions in needs
        if getattr(options, name) > model[positions]
    )


def _start(make_model: Callable[[], LoadedModel], text: str) -> tuple[StartCost, LoadedModel]:
    started = time.perf_counter()
    loaded = make_model()
    load_seconds = time.perf_counter() - started
    _translate_all(loaded, [text], TranslateOptions(**any_languages(loaded)))
    seconds = time.perf_counter() - started
    cost = StartCost(load_seconds=load_seconds, first_translation_seconds=seconds, peak_mib=_peak_mib())
    return cost, loaded


def any_languages(loaded: LoadedModel) -> TranslateKeywords:
    """Any languages of a model that has no default ones: they do not change what a translation costs."""
    languages, found = loaded.manifest.languages, TranslateKeywords()
    if languages.source and languages.default_source is None:
        found["source_language"] = next(iter(languages.source))
    if languages.target and languages.default_target is None:
        found["target_language"] = next(iter(languages.target))
    return found


def _text_speed(loaded: LoadedModel, texts: Sequence[str], workers: int | None) -> TextSpeed:
    options = TranslateOptions(**any_languages(loaded)).changed(workers=workers)
    runs = [_translate_all(loaded, texts, options) for _ in range(RUNS_OVER_TEXTS)]
    seconds, stats = min(runs, key=lambda run: run[0])
    return TextSpeed(
        sentences=len(texts),
        tokens=stats.tokens,
        seconds=seconds,
        sentences_per_second=len(texts) / seconds,
        tokens_per_second=stats.tokens / seconds,
        occupancy=stats.occupancy,
        peak_mib=_peak_mib(),
    )


def _translate_all(loaded: LoadedModel, texts: Sequence[str], options: TranslateOptions) -> tuple[float, DecodeStats]:
    stats, started = DecodeStats(), time.perf_counter()
    with core_for(loaded, options) as core:
        for _ in translate(core, texts, options, stats=stats):
            pass
    return time.perf_counter() - started, stats


def _row_cost(loaded: LoadedModel, plan: Plan, options: BenchOptions) -> RowCost:
    """The first decode, which allocates, is not counted."""
    sources = _sources(options, loaded.manifest.model, plan.rows)
    _, *runs = (decode_times(loaded.backend, plan, sources) for _ in range(options.repeat + 1))
    steps = np.concatenate([run.steps for run in runs])
    sentences = [(run.encode + run.steps.sum()) / plan.rows for run in runs]
    return RowCost(
        rows=plan.rows,
        step_ms=1000 * float(np.median(steps)),
        least_step_ms=1000 * float(steps.min()),
        sentence_ms=1000 * float(np.median(sentences)),
    )


def _length_curve(loaded: LoadedModel, options: BenchOptions) -> LengthCurve:
    """One decode to the longest length passes all others; a step's cost is the median of its repeats."""
    model = loaded.manifest.model
    lengths = [length for length in options.lengths if length <= model["target_positions"]]
    left_out = options.lengths[len(lengths) :]
    if not lengths:
        return LengthCurve(rows=options.length_rows, costs=(), left_out=left_out, ratio=None)
    rows = max(1, min(options.length_rows, _rows_that_fit(loaded, options, lengths[-1])))
    plan = _plan(loaded, options, rows=rows, tokens=lengths[-1])
    sources = _sources(options, model, rows)
    runs = [decode_times(loaded.backend, plan, sources).steps for _ in range(options.length_repeat)]
    totals = 1000 * np.median(runs, axis=0).cumsum()
    costs = tuple(_length_cost(length, float(totals[length - 1])) for length in lengths)
    return LengthCurve(rows=rows, costs=costs, left_out=left_out, ratio=costs[-1].token_ms / costs[0].token_ms)


def _length_cost(length: int, total_ms: float) -> LengthCost:
    return LengthCost(length=length, total_ms=total_ms, token_ms=total_ms / length)


def _plan(loaded: LoadedModel, options: BenchOptions, *, rows: int, tokens: int) -> Plan:
    """A plan in which all rows run side by side. Raises CapacityError where they do not fit."""
    fit = _rows_that_fit(loaded, options, tokens)
    if rows > fit:
        raise CapacityError(
            f"The default cache has no room for {rows} rows of {tokens} target and {options.source_tokens} source "
            "positions",
            expected=f"at most {fit} such rows",
            remedy="Measure fewer `rows` or fewer `tokens`.",
            option="rows",
        )
    return Plan.of(loaded.manifest, loaded.backend.cache_specs, rows=rows, max_new_tokens=tokens)


def _rows_that_fit(loaded: LoadedModel, options: BenchOptions, tokens: int) -> int:
    plan = Plan.of(loaded.manifest, loaded.backend.cache_specs, rows=1, max_new_tokens=tokens)
    source = rung(options.source_tokens, plan.source_positions)
    return plan.cache_bytes // plan.seat_bytes(source)


def _sources(options: BenchOptions, model: Mapping[str, int], count: int) -> list[Sentence]:
    """Sentences of drawn ids; any id is valid, as padding is by length."""
    drawn = np.random.default_rng(options.seed).integers(
        model["source_vocab_size"], size=(count, options.source_tokens)
    )
    return [Sentence(index, tuple(ids)) for index, ids in enumerate(drawn.tolist())]


def _peak_mib() -> float | None:
    peak = peak_bytes()
    return None if peak is None else peak / MEBIBYTE


def _mib(mebi: float | None) -> str:
    return mebibytes(None if mebi is None else mebi * MEBIBYTE)


def _row_lines(costs: Sequence[RowCost]) -> list[str]:
    header = ("rows", "ms/step", "least", "ms/sentence", "tokens/s")
    rows = (
        (
            cost.rows,
            f"{cost.step_ms:.2f}",
            f"{cost.least_step_ms:.2f}",
            f"{cost.sentence_ms:.2f}",
            f"{1000 * cost.rows / cost.step_ms:.0f}",
        )
        for cost in costs
    )
    return markdown_table(header, rows)


def _length_lines(curve: LengthCurve) -> Iterator[str]:
    if curve.costs:
        rows = ((cost.length, f"{cost.total_ms:.1f}", f"{cost.token_ms:.3f}") for cost in curve.costs)
        yield from markdown_table(("target length", "ms in all", "ms/token"), rows)
        first, last = curve.costs[0].length, curve.costs[-1].length
        yield f"{curve.rows} rows; a token of {last} costs {curve.ratio:.2f} × one of {first}"
    if curve.left_out:
        yield f"beyond the model's target positions: {', '.join(map(str, curve.left_out))}"


def _text_line(speed: TextSpeed) -> str:
    return (
        f"{speed.sentences} texts in {speed.seconds:.2f} s: {speed.sentences_per_second:.1f} sentences/s, "
        f"{speed.tokens_per_second:.0f} tokens/s, {speed.occupancy:.0%} of rows in use, "
        f"peak {_mib(speed.peak_mib)}"
    )
