"""The load of a service as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvx.runtime.measuring.arrivals import ArrivalsResult, explanation
from kvx.runtime.measuring.bench import headline
from kvx.runtime.measuring.curves import Chart, Series, charts_page

SERVICES = {"engine": "engine", "batches": "fixed batches"}
TIMES = {"request": "Time to the whole translation", "first_token": "Time to the first token"}
PERCENTILES = {"p50": "median", "p95": "95 %", "p99": "99 %"}


def arrivals_html(result: ArrivalsResult | Mapping[str, Any]) -> str:
    """What a service gives, or its JSON form → a page with the time to the whole translation and to the first token, in
    milliseconds from the moment of arrival, by rate: each percentile of the engine and of fixed batches.
    """
    values = result.to_dict() if isinstance(result, ArrivalsResult) else result
    return charts_page(values["subject"]["bundle"], (*headline(values), *explanation(values)), _charts(values))


def _charts(values: Mapping[str, Any]) -> Iterator[Chart]:
    for time, title in TIMES.items():
        for percentile, name in PERCENTILES.items():
            yield Chart(
                f"{title}, {name}",
                _note(values),
                "arrivals (requests/s)",
                "ms (logarithmic)",
                tuple(_series(values, service, time, percentile) for service in SERVICES),
                decades=True,
            )


def _note(values: Mapping[str, Any]) -> str:
    requests = [cost["requests"] for cost in values["rates"]]
    few, many = min(requests), max(requests)
    return f"{few if few == many else f'{few} to {many}'} requests at each rate"


def _series(values: Mapping[str, Any], service: str, time: str, percentile: str) -> Series:
    points = ((cost["rate"], cost[service][time][percentile]) for cost in values["rates"])
    return Series(SERVICES[service], tuple(points))
