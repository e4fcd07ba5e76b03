"""What Prometheus may ask: no label holds a client, a key or anything of a text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.serving.admission import Admission
from kvx.runtime.serving.models import Model

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labelled = TypeVar("Labelled", Counter, Histogram)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """The counters of a service. Counters of engines that were closed since are kept."""

    def __init__(self, models: Callable[[], Iterable[Model]], admission: Admission) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("kvx_requests", "Requests that were answered.", ("route", "status"), registry=registry)
        self.refused = Counter("kvx_refused", "Requests that were not let in.", ("reason",), registry=registry)
        self.cancelled = Counter("kvx_cancelled", "Requests whose client went away.", registry=registry)
        self.characters = Counter("kvx_characters", "Characters of texts that were let in.", registry=registry)
        self.tokens = Counter("kvx_tokens", "Tokens of translations.", registry=registry)
        self.seconds = Histogram(
            "kvx_request_seconds", "Time of a request.", ("route",), buckets=SECONDS, registry=registry
        )
        self.waited = Histogram(
            "kvx_queue_seconds", "Time until a request was let in.", buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "kvx_first_token_seconds",
            "Time to the first token of a streamed request.",
            buckets=SECONDS,
            registry=registry,
        )
        self._children: dict[tuple[object, tuple[str, ...]], object] = {}
        self._registry.register(_Now(models, admission))

    def note(self, route: str, status: int, seconds: float, tokens: int) -> None:
        """A request that was answered."""
        self._of(self.requests, route, str(status)).inc()
        self._of(self.seconds, route).observe(seconds)
        if tokens:
            self.tokens.inc(tokens)

    def _of(self, metric: Labelled, *labels: str) -> Labelled:
        """That of these labels: looking it up is the library's slowest part."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return found  # type: ignore[return-value]

    def page(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Now(Collector):
    """What engines and admission say when they are asked."""

    def __init__(self, models: Callable[[], Iterable[Model]], admission: Admission) -> None:
        self._models = models
        self._admission = admission
        self._last: dict[str, tuple[weakref.ref[Model], DecodeStats]] = {}  # which must not keep a model in memory
        self._before: dict[str, DecodeStats] = {}  # of models that were loaded earlier under the same name

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("kvx_active_requests", "Requests that are worked on.", self._admission.active)
        yield GaugeMetricFamily("kvx_waiting_requests", "Requests that wait to be let in.", self._admission.waiting)
        models = list(self._models())
        gauges = {
            "waiting": GaugeMetricFamily("kvx_waiting_sentences", "Sentences that wait for a row.", labels=("model",)),
            "rows": GaugeMetricFamily("kvx_rows_in_use", "Rows that a step takes now.", labels=("model",)),
            "cache_bytes": GaugeMetricFamily("kvx_cache_bytes", "Bytes of the caches.", labels=("model",)),
        }
        for model in models:
            busy = model.engine.busy_with
            for name, gauge in gauges.items():
                gauge.add_metric([model.name], getattr(busy, name))
        yield from gauges.values()
        yield from self._counted(models)

    def _counted(self, models: Iterable[Model]) -> Iterator[Metric]:
        counters = {
            "steps": CounterMetricFamily("kvx_steps", "Decoder steps.", labels=("model",)),
            "row_steps": CounterMetricFamily("kvx_row_steps", "Rows of all steps: tokens.", labels=("model",)),
            "row_places": CounterMetricFamily(
                "kvx_row_places",
                "Rows that there was room for in all steps. row_steps / row_places is the occupancy.",
                labels=("model",),
            ),
        }
        for model in models:
            total = self._total(model)
            for name, counter in counters.items():
                counter.add_metric([model.name], getattr(total, name))
        yield from counters.values()

    def _total(self, model: Model) -> DecodeStats:
        """What a model has done, with those that it took the place of."""
        last = self._last.get(model.name)
        if last is not None and (earlier := last[0]()) is not model:
            done = last[1] if earlier is None else earlier.engine.stats
            self._before.setdefault(model.name, DecodeStats()).add(done)
        stats = model.engine.stats
        self._last[model.name] = weakref.ref(model), stats
        total = DecodeStats()
        total.add(stats)
        total.add(self._before.get(model.name, DecodeStats()))
        return total
