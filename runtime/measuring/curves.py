"""A benchmark's curves as one HTML page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kvx.runtime.measuring.bench import BenchResult, headline
from kvx.runtime.measuring.page import DIGIT, SVG_NAMESPACE, page

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 616, 36, 328  # the plot's edges, in units of the SVG
MARK = 4
TICKS = 5
MOST_POWERS = 9


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name and its points (x, y), x ascending."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Up to two lines over the same x; `doubling` puts each doubling of x at the same distance. y starts at 0, or has
    a power of ten at the same distance where it is in `decades`.
    """

    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    doubling: bool = False
    decades: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """The values marked on an axis, whose first and last are its ends, and where they lie in the SVG."""

    ticks: tuple[float, ...]
    begin: float
    end: float
    scale: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        """The value's coordinate."""
        low, high = self.scale(self.ticks[0]), self.scale(self.ticks[-1])
        return self.begin + (self.scale(value) - low) / (high - low) * (self.end - self.begin)


def curves_html(result: BenchResult | Mapping[str, Any]) -> str:
    """A benchmark, or its JSON form → a page with the milliseconds per step by rows and per token by target length."""
    values = result.to_dict() if isinstance(result, BenchResult) else result
    charts = (chart for chart in _charts(values) if chart.series[0].points)
    return charts_page(str(values["subject"]["bundle"]), _facts(values), charts)


def charts_page(bundle: str, facts: Iterable[str], charts: Iterable[Chart]) -> str:
    """The charts of a bundle's benchmark, below lines of text → a page."""
    figures = "\n".join(_figure(chart, number) for number, chart in enumerate(charts))
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in facts)
    return page(f"kvx bench: {escape(bundle)}", f"{lines}\n<main>\n{figures}\n</main>")


def _charts(values: Mapping[str, Any]) -> tuple[Chart, Chart]:
    rows, curve, options = values["rows"], values["lengths"], values["options"]
    by_rows = Chart(
        "Milliseconds per step, by rows",
        f"{options['source_tokens']} source tokens, {options['tokens']} steps, repeat {options['repeat']}",
        "rows (sentences decoded side by side, logarithmic)",
        "ms per step",
        (_series("median", rows, "rows", "step_ms"), _series("least", rows, "rows", "least_step_ms")),
        doubling=True,
    )
    by_length = Chart(
        "Milliseconds per token, by target length",
        _length_note(curve),
        "target length (tokens)",
        "ms per token",
        (_series("mean up to this length", curve["costs"], "length", "token_ms"),),
    )
    return by_rows, by_length


def _series(name: str, costs: Sequence[Mapping[str, float]], x: str, y: str) -> Series:
    return Series(name, tuple((cost[x], cost[y]) for cost in costs))


def _length_note(curve: Mapping[str, Any]) -> str:
    if not curve["costs"]:
        return ""
    first, last = curve["costs"][0]["length"], curve["costs"][-1]["length"]
    return f"{curve['rows']} rows, a token of each; at {last} it costs {curve['ratio']:.2f} × what it costs at {first}"


def _facts(values: Mapping[str, Any]) -> Iterator[str]:
    yield from headline(values)
    if left_out := values["lengths"]["left_out"]:
        yield f"Beyond the model's target positions: {', '.join(map(str, left_out))}"


def _figure(chart: Chart, number: int) -> str:
    title = escape(chart.title)
    return f"""<figure>
<figcaption><h2>{title}</h2><p>{escape(chart.note)}</p></figcaption>
<svg xmlns="{SVG_NAMESPACE}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart-{number}">
<title id="chart-{number}">{title}</title>
{_drawing(chart)}
</svg>
</figure>"""


def _drawing(chart: Chart) -> str:
    xs, ys = ([point[i] for series in chart.series for point in series.points] for i in (0, 1))
    x_ticks = _powers_of_two(min(xs), max(xs)) if chart.doubling else _round_ticks(max(xs))
    x = Axis(x_ticks, LEFT, RIGHT, math.log2 if chart.doubling else float)
    y = (
        Axis(_decades(min(ys), max(ys)), BOTTOM, TOP, math.log10)
        if chart.decades
        else Axis(_round_ticks(max(ys)), BOTTOM, TOP)
    )
    lines = itertools.chain(
        _grid(x, y),
        (_text((LEFT + RIGHT) / 2, HEIGHT - 8, chart.x_label), _text(LEFT, 14, chart.y_label, anchor="start")),
        _legend(chart.series) if len(chart.series) > 1 else (),
        *(_curve(series, css, x, y) for series, css in reversed(_styled(chart.series))),
        _values(chart.series[0], x, y),
    )
    return "\n".join(lines)


def _styled(series: Sequence[Series]) -> list[tuple[Series, str]]:
    return list(zip(series, ("first", "second"), strict=False))


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for value in y.ticks:
        yield _rule("axis" if value == y.ticks[0] else "grid", LEFT, y(value), RIGHT, y(value))
        yield _text(LEFT - 10, y(value) + 4, _number(value), anchor="end")
    for value in x.ticks:
        yield _rule("axis", x(value), BOTTOM, x(value), BOTTOM + 5)
        yield _text(x(value), BOTTOM + 22, _number(value))


def _legend(series: Sequence[Series]) -> Iterator[str]:
    left = RIGHT
    for entry, css in reversed(_styled(series)):
        left -= DIGIT * len(entry.name) + 48
        yield f'<path class="{css} line" d="M{left},10 h24"/>'
        yield _text(left + 30, 14, entry.name, anchor="start")


def _curve(series: Series, css: str, x: Axis, y: Axis) -> Iterator[str]:
    places = [(x(across), y(up)) for across, up in series.points]
    yield f'<polyline class="{css} line" points="{" ".join(f"{left:.1f},{top:.1f}" for left, top in places)}"/>'
    for (left, top), (across, up) in zip(places, series.points, strict=True):
        tooltip = escape(f"{series.name}, {_number(across)}: {up:.3g} ms")
        yield f'<circle class="{css} point" cx="{left:.1f}" cy="{top:.1f}" r="{MARK}"><title>{tooltip}</title></circle>'


def _values(series: Series, x: Axis, y: Axis) -> Iterator[str]:
    """The values above their points, to the left, where a rising line does not cross them; those that would cover
    the one before are left out.
    """
    free = float(LEFT)
    for across, up in series.points:
        label = f"{up:.3g}"
        left = max(x(across) + MARK - DIGIT * len(label), LEFT)
        if left >= free:
            yield _text(left, y(up) - 10, label, anchor="start", css="value")
            free = left + DIGIT * len(label) + MARK


def _rule(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "label") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _powers_of_two(low: float, high: float) -> tuple[float, ...]:
    """Powers of two with the same ratio between them, from one at most `low` to one at least `high`."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    apart = math.ceil(max(1, last - first) / (MOST_POWERS - 1))
    count = max(1, math.ceil((last - first) / apart))
    return tuple(2.0 ** (first + apart * i) for i in range(count + 1))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 × 10ⁿ from at most `low` to at least `high`, or powers of ten where these would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        marks = [factor * 10.0**power for power in powers for factor in factors]
        first = max(i for i, mark in enumerate(marks) if mark <= low)
        last = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
        ticks = tuple(marks[first : max(last, first + 1) + 1])
        if len(ticks) <= MOST_POWERS:
            break
    return ticks


def _round_ticks(high: float) -> tuple[float, ...]:
    """About TICKS equal steps of 1, 2 or 5 × 10ⁿ from 0 to at least `high`."""
    rough = high / TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    return tuple(step * i for i in range(math.ceil(high / step) + 1))


def _number(value: float) -> str:
    return f"{value:.6g}"
