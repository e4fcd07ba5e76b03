"""The load of a service: requests that arrive at random moments, served by the engine and in fixed batches."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from queue import SimpleQueue
from typing import Annotated, Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.engine.core import MOST_WAITING, EngineOptions
from kvx.runtime.engine.engine import Engine
from kvx.runtime.engine.handle import Handle
from kvx.runtime.engine.loaded import LoadedModel, with_languages
from kvx.runtime.errors import InputError
from kvx.runtime.measuring.bench import LARGEST_SEED, Host, Subject, any_languages, headline
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.options import TranslateOptions
from kvx.runtime.rules import Option, Problem, Rule, count, number, refuse, wrong_values
from kvx.runtime.translation import Translation
from kvx.runtime.translator import Translator

AUTO = "auto"
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # of saturation
SECONDS = 20  # that requests arrive at each rate, by default
ROUNDS = 8  # in which each rate has its turn: a machine that others use is not always equally fast
FLOOD = 5  # times as many requests as there are rows show saturation
MOST_REQUESTS = MOST_WAITING
RATE = number(0, 1e6, above=True)

clock = time.perf_counter
Item = TypeVar("Item")


def rates_of(value: object) -> tuple[float, ...] | None:
    """Rates, as numbers or as a text with commas between, in requests/s; None for "auto". Raises ValueError where it
    is neither.
    """
    if value == AUTO:
        return None
    rates = tuple(map(float, value.split(","))) if isinstance(value, str) else value
    if not isinstance(rates, tuple) or not rates or not all(map(RATE.holds, rates)):
        raise ValueError(value)
    if any(low >= high for low, high in itertools.pairwise(rates)):
        raise ValueError(value)
    return rates


def _are_rates(value: object) -> bool:
    try:
        rates_of(value)
    except ValueError:
        return False
    return True


RATES = Rule(f"{AUTO}, or positive numbers in ascending order with commas between", _are_rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOptions:
    """Which load to measure, if any. Raises OptionError."""

    arrivals: Annotated[
        tuple[float, ...] | str | None,
        Option(
            RATES,
            "Measure only the load of a service, whose requests arrive at random moments: at each of these rates in "
            "requests/s, separated by commas, or with auto at 10 to 100 % of what it can serve.",
        ),
    ] = None
    requests: Annotated[
        int | None,
        Option(
            count(MOST_REQUESTS),
            "How many requests arrive at each rate of `arrivals`.",
            unset=f"as many as arrive in {SECONDS} s",
        ),
    ] = None
    seed: Annotated[
        int, Option(count(LARGEST_SEED, least=0), "What the moments of arrival are drawn from.", hidden=True)
    ] = 0

    def __post_init__(self) -> None:
        refuse(itertools.chain(wrong_values(self), self._contradictions()))

    def _contradictions(self) -> Iterator[Problem]:
        if self.requests is not None and self.arrivals is None:
            yield Problem("requests", "`requests` has no effect without `arrivals`", "`arrivals` beside `requests`")

    @property
    def rates(self) -> tuple[float, ...] | None:
        """In requests/s; None for shares of what is measured first."""
        return None if self.arrivals is None else rates_of(self.arrivals)

    @property
    def runs(self) -> int:
        """How often requests are served: to warm up, and in each round twice at each rate, which saturation is measured
        before.
        """
        return 1 + ROUNDS * (2 * len(self.rates) if self.rates else 3 * len(SHARES))

    def requests_at(self, rate: float, number: int) -> int:
        """How many requests arrive at a rate in requests/s in the round of this number."""
        requests = self.requests or min(max(1, round(rate * SECONDS)), MOST_REQUESTS)
        return max(1, (requests + ROUNDS - 1 - number) // ROUNDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Milliseconds within which half of all requests, 95 % and 99 % of them had what they waited for; between two
    requests, the value is interpolated.
    """

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Self:
        """Of the time of each request in seconds, at least one."""
        p50, p95, p99 = (1000 * np.percentile(list(seconds), (50, 95, 99))).tolist()
        return cls(p50=p50, p95=p95, p99=p99)


@dataclass(slots=True, eq=False)
class Arrival:
    """A request: its text, and its translation once it is there. It is `due` at the moment of its arrival; it was
    `sent`, had its `first` token and was `done` at these seconds of `clock`, 0 until then.
    """

    text: str
    due: float
    sent: float = 0.0
    first: float = 0.0
    done: float = 0.0
    translation: Translation | None = None


class Run(NamedTuple):
    """Requests that were served, in the order of their arrival, and when the first of them was waited for."""

    begun: float
    arrivals: list[Arrival]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTimes:
    """How requests were served: how many per second, from the beginning to the last answer, and the milliseconds from
    the moment of arrival to the first token and to the whole translation. `late_ms` is how late the requests were sent.
    """

    requests_per_second: float
    first_token: Percentiles
    request: Percentiles
    late_ms: Percentiles

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Self:
        """Of requests that are all answered, at least one."""
        arrivals = [one for run in runs for one in run.arrivals]
        seconds = sum(max(one.done for one in run.arrivals) - run.begun for run in runs)
        return cls(
            requests_per_second=len(arrivals) / seconds,
            first_token=Percentiles.of(one.first - one.due for one in arrivals),
            request=Percentiles.of(one.done - one.due for one in arrivals),
            late_ms=Percentiles.of(one.sent - one.due for one in arrivals),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCost:
    """The same `requests` at the same moments, at a rate in requests/s (the mean of all rounds), served by the engine
    and in fixed batches. `ratio` is the batches' 95th percentile of the time of a request over the engine's: the median
    of the rounds, in each of which both were served one after the other.
    """

    rate: float
    requests: int
    engine: ServiceTimes
    batches: ServiceTimes
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalsResult:
    """What a service with a bundle gives on a machine. `rows` of all its `workers` together, which is also the most in
    a fixed batch; `texts` in the file that are not empty; `saturation` in requests/s of the engine where twice as
    many requests as rows are always under way (the mean of all rounds), None where rates were given.
    """

    subject: Subject
    machine: Host
    backend: str
    precision: str
    lowering: str
    model: Mapping[str, int]
    options: ArrivalOptions
    workers: int
    rows: int
    texts: int
    saturation: float | None
    rates: tuple[RateCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        form: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return form


class _Served(NamedTuple):
    """The runs of one rate, in requests/s, in each round."""

    rates: list[float]
    engine: list[Run]
    batches: list[Run]

    def cost(self) -> RateCost:
        """What all of them together were."""
        engine, batches = ServiceTimes.of(self.engine), ServiceTimes.of(self.batches)
        return RateCost(
            rate=float(np.mean(self.rates)),
            requests=sum(len(run.arrivals) for run in self.engine),
            engine=engine,
            batches=batches,
            ratio=float(np.median([_p95(two) / _p95(one) for one, two in zip(self.engine, self.batches, strict=True)])),
        )


class Service(ABC, Generic[Item]):
    """Takes requests in one thread, and gives answers in another, which hears of them as items of a queue."""

    def __init__(self) -> None:
        self._news: SimpleQueue[Item | None] = SimpleQueue()  # None: it is stopped
        self._stopped = False
        self._room = threading.Semaphore(MOST_REQUESTS)

    def wait_for_room(self) -> None:
        """Waits until fewer requests are under way than there may be."""
        self._room.acquire()

    def allow(self, requests: int) -> None:
        """Lets this many be under way, from now on."""
        self._room = threading.Semaphore(requests)

    @abstractmethod
    def send(self, arrival: Arrival) -> None:
        """Takes a request, now. Raises what Engine.submit raises."""

    @abstractmethod
    def _answer(self, first: Item) -> int:
        """Finishes the requests of an item, and of others that are there → how many requests."""

    def answer(self, requests: int) -> None:
        """Answers this many requests, or all until it is stopped. Raises what went wrong in decoding."""
        while requests > 0 and not self._stopped and (first := self._news.get()) is not None:
            answered = self._answer(first)
            requests -= answered
            if answered:
                self._room.release(answered)

    def stop(self) -> None:
        """No further request is answered."""
        self._stopped = True
        self._news.put(None)


class Continuous(Service[tuple[Arrival, Handle]]):
    """Every request goes to the engine at once, and is answered as soon as it is over."""

    def __init__(self, engine: Engine, options: TranslateOptions) -> None:
        super().__init__()
        self._engine = engine
        self._options = options

    def send(self, arrival: Arrival) -> None:
        """See Service."""
        handle = self._engine.submit(arrival.text, self._options)
        reply = handle._reply  # which calls back at the first token: a thread for each request would cost too much
        reply.request.followed = True

        def hear() -> None:
            if not arrival.first and (reply.news or reply.done):
                arrival.first = clock()
                reply.request.followed = False  # further tokens need not be told
            if reply.done:
                self._news.put((arrival, handle))

        reply.listen(hear)

    def _answer(self, first: tuple[Arrival, Handle]) -> int:
        arrival, handle = first
        if arrival.done:  # heard of twice, by two threads
            return 0
        arrival.translation = handle.result()
        arrival.done = clock()
        return 1


class FixedBatches(Service[Arrival]):
    """All requests that wait, up to `most`, are translated together to the end of the last, and answered then. Only
    then come the next. `translate` gives the translation of each text.
    """

    def __init__(self, translate: Callable[[list[str]], list[Translation]], most: int) -> None:
        super().__init__()
        self._translate = translate
        self._most = most

    def send(self, arrival: Arrival) -> None:
        """See Service."""
        self._news.put(arrival)

    def _answer(self, first: Arrival) -> int:
        batch = [first]
        while len(batch) < self._most and not self._news.empty():
            if (another := self._news.get()) is not None:
                batch.append(another)
        translations = self._translate([one.text for one in batch])
        now = clock()
        for arrival, translation in zip(batch, translations, strict=True):
            arrival.translation, arrival.first, arrival.done = translation, now, now
        return len(batch)


def moments(rate: float, requests: int, seed: int = 0) -> NDArray[np.float64]:
    """Seconds from the beginning at which requests [n] arrive by chance, independently of each other, with this many
    per second on average.
    """
    return np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()


def serve(service: Service[Any], texts: Sequence[str], at: NDArray[np.float64]) -> Run:
    """Texts, again from the first where there are not enough, each sent at its moment [n] in seconds from now → the
    requests, all answered. Raises what Engine.submit and Handle.result raise.
    """
    begun = clock()
    arrivals = [
        Arrival(text, begun + moment) for text, moment in zip(itertools.cycle(texts), at.tolist(), strict=False)
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="kvx answering") as pool:
        answered = pool.submit(service.answer, len(arrivals))
        try:
            for arrival in arrivals:
                if answered.done():  # it has failed
                    break
                _wait_until(arrival.due)
                service.wait_for_room()
                arrival.sent = clock()
                service.send(arrival)
            answered.result()
        except BaseException:
            service.stop()
            raise
    return Run(begun, arrivals)


def full_rate(run: Run) -> float:
    """Requests/s of a service that always had enough to do, from requests that all were due at the beginning: those of
    the middle half, as at first none is over, and at the end rows are free.
    """
    done = sorted(one.done - run.begun for one in run.arrivals)
    first = len(done) // 4
    last = len(done) - 1 - first
    seconds = done[last] - done[first]
    return (last - first) / seconds if seconds > 0 else len(done) / done[-1]


def measure_arrivals(
    loaded: LoadedModel,
    subject: Subject,
    texts: Sequence[str],
    options: ArrivalOptions,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> ArrivalsResult:
    """Serves the texts, one request each, at every rate: by the engine, then, at the same moments, in fixed batches
    with the same engine. Empty texts are left out. `progress` is called with the number of runs that are done.

    Raises InputError where there is no text or one cannot be translated, OptionError and CapacityError.
    """
    done = itertools.count(1)
    greedy = TranslateOptions(**any_languages(loaded)).resolved(loaded.manifest.defaults, beam_size=1)
    used, (plan, workers) = _translatable(loaded, texts, greedy), loaded.plan(greedy, max_new_tokens=1)
    translator, rows = Translator(loaded, EngineOptions(max_waiting=MOST_WAITING)), plan.rows * workers
    fixed = partial(FixedBatches, lambda batch: translator.translate(batch, greedy), rows)
    costs: dict[float, _Served] = {}
    saturations: list[float] = []
    with translator.engine as engine:
        continuous = partial(Continuous, engine, greedy)
        serve(continuous(), used, np.zeros(rows))
        progress(next(done))
        for number, asked in itertools.product(range(ROUNDS), options.rates or SHARES):
            rate = asked
            if options.rates is None:
                full = continuous()
                full.allow(2 * rows)
                saturations.append(full_rate(serve(full, used, np.zeros(FLOOD * rows))))
                progress(next(done))
                rate *= saturations[-1]
            served = costs.setdefault(asked, _Served([], [], []))
            at = moments(rate, options.requests_at(rate, number), options.seed + number)
            served.rates.append(rate)
            for runs, service in ((served.engine, continuous()), (served.batches, fixed())):
                runs.append(serve(service, used, at))
                progress(next(done))
    return ArrivalsResult(
        subject=subject,
        machine=Host.here(),
        backend=loaded.backend.name,
        precision=loaded.manifest.precision,
        lowering=loaded.manifest.lowering,
        model=loaded.manifest.model,
        options=options,
        workers=workers,
        rows=rows,
        texts=len(used),
        saturation=float(np.mean(saturations)) if saturations else None,
        rates=tuple(served.cost() for served in costs.values()),
    )


def arrivals_table(result: ArrivalsResult) -> Iterator[str]:
    """The result as lines to read, with a Markdown table of both services side by side."""
    yield from headline(result.to_dict())
    yield from explanation(result.to_dict())
    yield ""
    header = (
        *("requests/s", "requests", "engine: served/s", "engine: first token", "engine: translation"),
        *("batches: served/s", "batches: translation", "batches ÷ engine at 95 %, median of rounds"),
    )
    yield from markdown_table(header, map(_row, result.rates))


def explanation(values: Mapping[str, Any]) -> Iterator[str]:
    """Of a result in its JSON form, what was served, and what its figures are."""
    said = f"{values['texts']} texts in order, at random moments (seed {values['options']['seed']}), greedy search, "
    yield f"{said}{_counted(values['workers'], 'worker')} with {_counted(values['rows'], 'row')} in all"
    if values["saturation"] is not None:
        saturation = _figure(values["saturation"])
        yield f"saturation {saturation} requests/s, measured before each rate with twice as many under way as rows"
    yield "times in ms from the moment of arrival, at the median / 95 % / 99 %"
    yield "a fixed batch takes all that wait when the last is over; its first tokens come with its translations"


def _p95(run: Run) -> float:
    return float(np.percentile([one.done - one.due for one in run.arrivals], 95))


def _wait_until(due: float) -> None:
    if (left := due - clock()) > 0:
        time.sleep(left)


def _translatable(loaded: LoadedModel, texts: Sequence[str], options: TranslateOptions) -> list[str]:
    """The texts that are not empty. Raises InputError, with the number of the text, for one that cannot be read."""
    for line, (text, source, target) in enumerate(with_languages(texts, options), 1):
        loaded.sources.read_one(
            text,
            line,
            options.on_long,
            source_language=source,
            target_language=target,
            text_prefix=options.text_prefix,
        )
    found = [text for text in texts if text.strip()]
    if not found:
        raise InputError("There is no text to translate", expected="at least one", remedy="Check the file.")
    return found


def _row(cost: RateCost) -> tuple[str, ...]:
    engine, batches = cost.engine, cost.batches
    return (
        _figure(cost.rate),
        str(cost.requests),
        _figure(engine.requests_per_second),
        _figures(engine.first_token),
        _figures(engine.request),
        _figure(batches.requests_per_second),
        _figures(batches.request),
        f"{cost.ratio:.2f}",
    )


def _figures(times: Percentiles) -> str:
    return " / ".join(map(_figure, (times.p50, times.p95, times.p99)))


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _counted(some: int, thing: str) -> str:
    return f"{some} {thing}{'' if some == 1 else 's'}"
