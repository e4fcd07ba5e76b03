from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from kvx import InputError, OptionError, Translation, Translator
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.engine.engine import Engine
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.measuring.arrivals import (
    AUTO,
    ROUNDS,
    SHARES,
    Arrival,
    ArrivalOptions,
    ArrivalsResult,
    Continuous,
    FixedBatches,
    Percentiles,
    Run,
    Service,
    ServiceTimes,
    arrivals_table,
    full_rate,
    measure_arrivals,
    moments,
    serve,
)
from kvx.runtime.measuring.arrivals_page import arrivals_html
from kvx.runtime.measuring.bench import Subject
from kvx.runtime.measuring.curves import Chart, Series, charts_page
from kvx.runtime.measuring.page import SVG_NAMESPACE
from kvx.runtime.options import TranslateOptions

TEXTS = ("one", "forty-two", "", "nine hundred", "seven thousand and eight")
SUBJECT = Subject(bundle="shop <b>", workers=2)
QUICK = ArrivalOptions(arrivals=(200.0, 400.0, 2000.0), requests=12)
GREEDY = TranslateOptions()
SVG = f"{{{SVG_NAMESPACE}}}"
SERVICES: dict[str, Callable[[Engine, Translator], Service[Any]]] = {
    "engine": lambda engine, translator: Continuous(engine, GREEDY),
    "batches": lambda engine, translator: FixedBatches(lambda batch: translator.translate(batch, GREEDY), 3),
}


@pytest.fixture(scope="module")
def model(numbers_bundle: Path) -> LoadedModel:
    return LoadedModel.load(Bundle.open(numbers_bundle), threads=2, workers=2)


@pytest.fixture
def engine(model: LoadedModel) -> Iterator[Engine]:
    with Translator(model).engine as engine:
        yield engine


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, engine: Engine, model: LoadedModel) -> Service[Any]:
    return SERVICES[request.param](engine, Translator(model))


@pytest.fixture(scope="module")
def result(model: LoadedModel) -> ArrivalsResult:
    return measure_arrivals(model, SUBJECT, TEXTS, QUICK)


def answered(*times: tuple[float, float, float, float]) -> Run:
    """Requests that were due, were sent, had their first token and were done at these seconds after the beginning."""
    return Run(
        100.0, [Arrival("one", 100 + due, 100 + sent, 100 + begun, 100 + done) for due, sent, begun, done in times]
    )


def test_the_same_seed_gives_the_same_moments() -> None:
    assert moments(7.0, 50, seed=3).tolist() == moments(7.0, 50, seed=3).tolist()
    assert moments(7.0, 50, seed=3).tolist() != moments(7.0, 50, seed=4).tolist()


def test_twice_the_rate_halves_every_moment() -> None:
    assert moments(14.0, 50) == pytest.approx(moments(7.0, 50) / 2)


def test_gaps_are_exponential() -> None:
    gaps = np.diff(moments(5.0, 20_000), prepend=0.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.03)
    assert np.mean(gaps > 2 / 5) == pytest.approx(math.exp(-2), rel=0.1)


def test_every_request_gets_the_translation_that_it_gets_alone(
    service: Service[Any], numbers_translator: Translator
) -> None:
    texts = [text for text in TEXTS if text]
    run = serve(service, texts, moments(500.0, 30))
    alone = {text: numbers_translator.translate([text])[0] for text in texts}
    assert [one.text for one in run.arrivals] == list(itertools.islice(itertools.cycle(texts), 30))
    assert [one.translation for one in run.arrivals] == [alone[one.text] for one in run.arrivals]


def test_what_happens_to_a_request_happens_in_order(service: Service[Any]) -> None:
    at = moments(500.0, 30)
    run = serve(service, ["one", "nine hundred and ninety-nine"], at)
    assert [one.due - run.begun for one in run.arrivals] == pytest.approx(at)
    for one in run.arrivals:
        assert one.due <= one.sent <= one.first <= one.done
        assert (one.first == one.done) == isinstance(service, FixedBatches)


def test_only_the_first_token_is_listened_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    handles, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *given: handles.append(submit(*given)) or handles[-1])  # type: ignore[func-returns-value]
    serve(Continuous(engine, GREEDY), ["seven thousand and eight"], np.zeros(6))
    assert [len(handle._reply.news) for handle in handles] == [1] * 6
    assert all(len(handle.result().ids) > 2 for handle in handles)


class Twice(SimpleQueue[Any]):
    """A queue that has everything two times."""

    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        super().put(item)


def test_a_request_that_is_heard_of_twice_is_answered_once(engine: Engine) -> None:
    service = Continuous(engine, GREEDY)
    service._news = Twice()
    run = serve(service, ["one", "nine hundred"], np.zeros(20))
    assert all(one.done and one.translation for one in run.arrivals)


def test_a_fixed_batch_is_what_waits_and_nobody_enters_it(model: LoadedModel) -> None:
    batches: list[int] = []
    translator = Translator(model)

    def translate(texts: list[str]) -> list[Translation]:
        batches.append(len(texts))
        if len(batches) == 1:
            for arrival in later:
                service.send(arrival)
        return translator.translate(texts)

    service = FixedBatches(translate, most=4)
    first, *later = (Arrival("one", 0.0) for _ in range(8))
    service.send(first)
    service.answer(8)
    assert batches == [1, 4, 3]
    assert len({one.done for one in later[:4]}) == len({one.done for one in later[4:]}) == 1
    assert first.done < later[0].done < later[4].done


def test_what_goes_wrong_in_a_service_ends_the_run(service: Service[Any], monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(first: object) -> int:
        raise OSError("broken")

    monkeypatch.setattr(service, "_answer", fail)
    with pytest.raises(OSError, match="broken"):
        serve(service, ["one"], moments(50.0, 20))


def test_a_request_that_cannot_be_sent_ends_the_run(service: Service[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    send, sent = service.send, itertools.count()

    def interrupted(arrival: Arrival) -> None:
        if next(sent) == 5:
            raise KeyboardInterrupt
        send(arrival)

    monkeypatch.setattr(service, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(service, ["one"], np.zeros(20))


def test_percentiles_lie_between_the_requests_around_them() -> None:
    assert Percentiles.of(n / 1000 for n in range(101)) == Percentiles(p50=50, p95=95, p99=99)
    assert Percentiles.of([0.25]) == Percentiles(p50=250, p95=250, p99=250)
    found = Percentiles.of([0.4, 0.1, 0.2, 0.3, 0.5])
    assert (found.p50, found.p95, found.p99) == pytest.approx((300, 480, 496))


def test_times_count_from_the_moment_of_arrival() -> None:
    found = ServiceTimes.of([answered((1, 1, 2, 3), (2, 2.5, 3, 6), (3, 3, 3.5, 5))])
    assert found.requests_per_second == pytest.approx(3 / 6)
    assert found.first_token.p50 == pytest.approx(1000)
    assert found.request.p50 == pytest.approx(2000)
    assert found.request.p95 == pytest.approx(3800)
    assert found.late_ms.p99 == pytest.approx(490)


def test_saturation_is_the_rate_of_the_middle_half() -> None:
    done = (4.0, 5.0, 6.0, 6.5, 7.0, 7.5, 10.0, 20.0)
    assert full_rate(answered(*((0, 0, 0, one) for one in done))) == pytest.approx(3 / 1.5)
    assert full_rate(answered((0, 0, 0, 2), (0, 0, 0, 2))) == pytest.approx(1)
    assert full_rate(answered((0, 0, 0, 4))) == pytest.approx(1 / 4)


def test_both_services_are_measured_at_every_rate(result: ArrivalsResult) -> None:
    assert [cost.rate for cost in result.rates] == [200, 400, 2000]
    assert (result.workers, result.texts, result.saturation) == (2, 4, None)
    for cost in result.rates:
        assert cost.requests == 12
        assert 0 < cost.ratio < math.inf
        assert cost.batches.first_token == cost.batches.request
        for times in (cost.engine, cost.batches):
            assert 0 < times.first_token.p50 <= times.request.p50
            for found in (times.first_token, times.request, times.late_ms):
                assert 0 <= found.p50 <= found.p95 <= found.p99 < math.inf


def test_auto_takes_shares_of_what_the_engine_can_serve(model: LoadedModel) -> None:
    runs: list[int] = []
    options = ArrivalOptions(arrivals=AUTO, requests=3)
    found = measure_arrivals(model, SUBJECT, TEXTS, options, progress=runs.append)
    assert found.saturation is not None
    assert [cost.rate for cost in found.rates] == pytest.approx([share * found.saturation for share in SHARES], rel=0.5)
    assert runs == list(range(1, options.runs + 1))
    assert any(line.startswith("saturation ") for line in arrivals_table(found))


def test_rates_may_be_written_with_commas() -> None:
    assert ArrivalOptions(arrivals="2,4.5, 10").rates == (2, 4.5, 10)
    assert ArrivalOptions(arrivals=AUTO).rates is None


def test_requests_arrive_for_some_seconds_at_every_rate_unless_there_is_a_number() -> None:
    options = ArrivalOptions(arrivals=AUTO)
    for rate, requests in ((0.01, ROUNDS), (5, 100), (400, 8000)):
        assert sum(options.requests_at(rate, number) for number in range(ROUNDS)) == requests
    assert sum(replace(options, requests=70).requests_at(400, number) for number in range(ROUNDS)) == 70


@pytest.mark.parametrize("rates", ["", "5,", "0", "-3", "2,x", "nan", "inf", "8,4", "4,4", (), (0.0,), (3, -1), [3], 3])
def test_rates_that_are_not_positive_numbers_are_refused(rates: object) -> None:
    with pytest.raises(OptionError, match=r"`arrivals` is .*Expected auto, or positive numbers in ascending order"):
        ArrivalOptions(arrivals=rates)  # type: ignore[arg-type]


def test_a_number_of_requests_needs_rates() -> None:
    with pytest.raises(OptionError, match="`requests` has no effect without `arrivals`"):
        ArrivalOptions(requests=5)
    with pytest.raises(OptionError, match=r"`requests` is 0.*`seed` is -1"):
        ArrivalOptions(arrivals=AUTO, requests=0, seed=-1)


@pytest.mark.parametrize("texts", [(), ("", "  ")])
def test_there_must_be_a_text(model: LoadedModel, texts: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="no text to translate"):
        measure_arrivals(model, SUBJECT, texts, QUICK)


def test_a_text_that_is_too_long_is_refused_by_its_line(model: LoadedModel) -> None:
    with pytest.raises(InputError, match="Line 3"):
        measure_arrivals(model, SUBJECT, ("one", "", "one " * 5000), QUICK)


def test_a_bundle_may_have_beams_and_languages_of_its_own(marked_bundle: Path) -> None:
    loaded = LoadedModel.load(Bundle.open(marked_bundle))
    found = measure_arrivals(loaded, SUBJECT, ("eins",), ArrivalOptions(arrivals=(500.0,), requests=2))
    assert found.rates[0].requests == ROUNDS


def test_a_batch_may_have_the_rows_of_all_workers(result: ArrivalsResult) -> None:
    assert result.rows == 2 * 64


def test_the_json_form_round_trips(result: ArrivalsResult) -> None:
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert arrivals_html(values) == arrivals_html(result)


def test_the_table_has_a_line_for_every_rate(result: ArrivalsResult) -> None:
    lines = [line for line in arrivals_table(result) if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["200", "400", "2000"]
    assert all(line.count(" / ") == 6 for line in lines[2:])
    assert any("4 texts" in line and "2 workers" in line for line in arrivals_table(result))


def drawings(page: str) -> list[ET.Element]:
    parts = page.split("<svg ")[1:]
    return [ET.fromstring("<svg " + part.partition("</svg>")[0] + "</svg>") for part in parts]


def test_the_page_draws_both_services_at_every_percentile(result: ArrivalsResult) -> None:
    found = drawings(arrivals_html(result))
    titles = [drawing.findtext(f"{SVG}title") for drawing in found]
    times = "Time to the whole translation", "Time to the first token"
    assert titles == [f"{time}, {share}" for time in times for share in ("median", "95 %", "99 %")]
    for drawing in found:
        texts = [text.text for text in drawing.findall(f"{SVG}text")]
        assert {"engine", "fixed batches"} <= set(texts)
        assert len(drawing.findall(f"{SVG}polyline")) == 2
        assert len(drawing.findall(f"{SVG}circle")) == 2 * 3


def test_points_lie_in_the_drawing(result: ArrivalsResult) -> None:
    for drawing in drawings(arrivals_html(result)):
        for circle in drawing.findall(f"{SVG}circle"):
            assert 64 <= float(circle.attrib["cx"]) <= 616
            assert 36 <= float(circle.attrib["cy"]) <= 328


def test_the_page_escapes_the_name_and_suits_light_and_dark(result: ArrivalsResult) -> None:
    page = arrivals_html(result)
    assert "<h1>kvx bench: shop &lt;b&gt;</h1>" in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((3.0, 70.0), ["2", "5", "10", "20", "50", "100"]),
        ((10.0,), ["10", "20"]),
        ((0.2, 0.9), ["0.2", "0.5", "1"]),
        ((0.03, 40_000.0), ["0.01", "0.1", "1", "10", "100", "1000", "10000", "100000"]),
    ],
)
def test_a_logarithmic_axis_is_marked_around_what_was_measured(values: tuple[float, ...], ticks: list[str]) -> None:
    points = tuple((float(x), y) for x, y in enumerate(values, 1))
    chart = Chart("title", "", "x", "y", (Series("one", points),), decades=True)
    (drawing,) = drawings(charts_page("shop", (), [chart]))
    labels = [text.text for text in drawing.findall(f"{SVG}text") if text.attrib["text-anchor"] == "end"]
    assert labels == ticks
