from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import cast
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from kvx import CapacityError, InputError, OptionError, Translator
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.backend import Backend, Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.rows import Rows
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.measuring.bench import BenchOptions, BenchResult, Subject, Unending, bench, table
from kvx.runtime.measuring.curves import curves_html
from kvx.runtime.measuring.page import SVG_NAMESPACE

TEXTS = ("one", "", "forty-two", "nine hundred")
SVG = f"{{{SVG_NAMESPACE}}}"
QUICK = BenchOptions(
    rows=(1, 3), source_tokens=5, tokens=4, lengths=(6, 12, 20, 21, 400), length_rows=2, repeat=2, length_repeat=2
)
SUBJECT = Subject(bundle="tiny")


def measure(bundle: Path, options: BenchOptions = QUICK, texts: tuple[str, ...] | None = None) -> BenchResult:
    return bench(lambda: LoadedModel.load(Bundle.open(bundle)), SUBJECT, texts, options)


@pytest.fixture(scope="module")
def result(tiny_bundle: Path) -> BenchResult:
    return measure(tiny_bundle, texts=TEXTS)


@pytest.fixture(scope="module")
def page(result: BenchResult) -> str:
    return curves_html(result)


class Counting:
    """A backend that counts, for each decode, the steps by the rows that ran."""

    def __init__(self, backend: Backend) -> None:
        self.stepped: list[Counter[int]] = []
        self.encoded = 0
        self._backend = backend

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        assert (source_lengths == input_ids.shape[1]).all()
        self.encoded += input_ids.size
        return self._backend.encode(input_ids, source_lengths)

    def bind(self, cache: KVCache) -> Step:
        inner, steps = self._backend.bind(cache), Counter[int]()
        self.stepped.append(steps)

        def step(input_ids: IntArray) -> StepOutput:
            steps[len(input_ids)] += 1
            return inner(input_ids)

        return step


@pytest.fixture(scope="module")
def counted(tiny_bundle: Path) -> Counting:
    """What the backend saw of the quick measurement, the first translation left out."""
    loaded = LoadedModel.load(Bundle.open(tiny_bundle))
    counting = Counting(loaded.backend)

    def load() -> LoadedModel:
        loaded.backends = (cast(Backend, counting),)
        return loaded

    bench(load, SUBJECT, None, QUICK)
    del counting.stepped[0]
    return counting


def figures(value: object) -> Iterator[float]:
    match value:
        case bool() | str() | None:
            return
        case int() | float():
            yield value
        case dict():
            for inner in value.values():
                yield from figures(inner)
        case list():
            for inner in value:
                yield from figures(inner)


def test_the_row_counts_are_those_asked_for(result: BenchResult) -> None:
    assert [cost.rows for cost in result.rows] == [1, 3]


def test_every_figure_is_positive_and_finite(result: BenchResult) -> None:
    values = result.to_dict()
    measured = [values[name] for name in ("start", "texts", "rows", "lengths", "peak_mib")]
    found = list(figures(measured))
    assert len(found) > 30
    assert all(math.isfinite(figure) and figure > 0 for figure in found)
    for cost in result.rows:
        assert cost.least_step_ms <= cost.step_ms
    assert result.start.load_seconds < result.start.first_translation_seconds


def test_lengths_beyond_the_models_positions_are_named_as_left_out(result: BenchResult) -> None:
    assert [cost.length for cost in result.lengths.costs] == [6, 12, 20]
    assert result.lengths.left_out == (21, 400)
    assert any("target positions: 21, 400" in line for line in table(result))
    assert "target positions: 21, 400" in curves_html(result)


def test_the_ratio_is_the_longest_to_the_first(result: BenchResult) -> None:
    costs = result.lengths.costs
    assert result.lengths.ratio == costs[-1].token_ms / costs[0].token_ms
    assert [cost.total_ms for cost in costs] == sorted(cost.total_ms for cost in costs)


@pytest.mark.parametrize("lengths", [(), (21, 400)])
def test_a_model_may_have_none_of_the_lengths(tiny_bundle: Path, lengths: tuple[int, ...]) -> None:
    found = measure(tiny_bundle, replace(QUICK, rows=(1,), repeat=1, lengths=lengths))
    assert found.lengths.costs == ()
    assert found.lengths.left_out == lengths
    assert found.lengths.ratio is None
    assert list(table(found))
    assert curves_html(found).count("<svg") == 1


def test_every_row_takes_every_step(counted: Counting) -> None:
    by_rows, by_length = counted.stepped[:6], counted.stepped[6:]
    assert by_rows == [{1: 4}] * 3 + [{3: 4}] * 3
    assert by_length == [{2: 20}] * 2


def test_sources_are_as_long_as_asked_for(tiny_bundle: Path) -> None:
    loaded = LoadedModel.load(Bundle.open(tiny_bundle))
    counting = Counting(loaded.backend)
    loaded.backends = (cast(Backend, counting),)
    Translator(loaded).translate(["Hello."])
    first = counting.encoded
    bench(lambda: loaded, SUBJECT, None, QUICK)
    assert counting.encoded == 2 * first + 5 * (3 * 1 + 3 * 3 + 2 * 2)


def test_fewer_rows_take_the_lengths_where_the_cache_is_too_small(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Translator.load(tiny_bundle).manifest
    row = manifest.cache_bytes(target=20, source=24)
    monkeypatch.setattr("kvx.runtime.decoding.plan.DEFAULT_CACHE_BYTES", 3 * row)
    assert measure(tiny_bundle, replace(QUICK, length_rows=64)).lengths.rows == 3
    with pytest.raises(CapacityError, match="no room for 500 rows of 4 target and 5 source"):
        measure(tiny_bundle, replace(QUICK, rows=(1, 500)))


@pytest.mark.parametrize("eos", [0, 2])
def test_the_search_takes_the_best_token_and_never_ends(eos: int) -> None:
    logits = np.array([[5, 1, 0, 0], [0, 1, 5, 0], [0, 1, 0, 5]], np.float32)
    kept = logits.copy()
    seen = {"eos": eos, "scored": False, "begun": False, "numbers": np.arange(3)}  # all that it looks at
    rows: Rows = types.SimpleNamespace(**seen)  # type: ignore[assignment]
    choice = Unending().choose(StepOutput(logits), logits, rows)
    assert choice.ids.tolist() == ([1, 2, 3] if eos == 0 else [0, 0, 3])
    assert not choice.over.any()
    assert (logits == kept).all()


def test_texts_are_counted_whole(result: BenchResult, tiny_bundle: Path) -> None:
    assert result.texts is not None
    assert result.texts.sentences == 4
    translations = Translator.load(tiny_bundle).translate(list(TEXTS))
    assert result.texts.tokens == sum(len(translation.ids) for translation in translations)
    assert measure(tiny_bundle, replace(QUICK, rows=(1,), lengths=(), repeat=1)).texts is None


def test_a_text_that_is_too_long_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="Line 2"):
        measure(tiny_bundle, texts=("one", "one " * 50))


def test_bad_options_are_refused_all_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        BenchOptions(
            rows=(), source_tokens=0, tokens=-1, lengths=(9, 3), length_rows=0, repeat=0, length_repeat=0, seed=-1
        )
    for problem in (
        *("`rows` is ()", "`source_tokens` is 0", "`tokens` is -1", "`lengths` is (9, 3)"),
        *("`length_rows` is 0", "`repeat` is 0", "`length_repeat` is 0", "`seed` is -1"),
    ):
        assert problem in caught.value.got


@pytest.mark.parametrize("counts", [(0, 1), (-1,), (2, 2), (3, 1), (1, 2**16 + 1), (True, 2)])
def test_lists_must_ascend_from_one(counts: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"rows.*lengths"):
        BenchOptions(rows=counts, lengths=counts)


def test_more_tokens_than_the_model_has_positions_are_refused_together(tiny_bundle: Path) -> None:
    with pytest.raises(
        OptionError, match=r"`source_tokens` is 25\. `tokens` is 21\..* 24 .*source positions.* 20 .*target positions"
    ):
        measure(tiny_bundle, replace(QUICK, source_tokens=25, tokens=21))


def test_the_json_form_round_trips(result: BenchResult) -> None:
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert curves_html(values) == curves_html(result)


def test_it_says_what_ran_and_where(tiny_bundle: Path) -> None:
    subject = Subject(bundle="shop", threads=2, workers=1, spin=True)
    options = replace(QUICK, rows=(1,), lengths=(), repeat=1)
    bundle = Bundle.open(tiny_bundle)
    found = bench(lambda: LoadedModel.load(bundle, threads=2, workers=1, spin=True), subject, None, options)
    said = "\n".join(table(found))
    for part in (
        *("shop on onnx", "1 + 2 layers", f"d_model 16, {found.precision}, lowering {found.lowering}"),
        *("threads 2, workers 1, spinning", found.machine.cpu, f"ONNX Runtime {found.machine.onnxruntime}"),
    ):
        assert part in said


def test_the_tables_columns_are_aligned(result: BenchResult) -> None:
    lines = [line for line in table(result) if line.startswith("|")]
    assert len({len(line) for line in lines[:4]}) == len({len(line) for line in lines[4:]}) == 1
    assert len(lines) == 4 + 5


class Page(HTMLParser):
    """Notes what is open at the end and what was closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1


def drawings(page: str) -> list[ET.Element]:
    parts = page.split("<svg ")[1:]
    return [ET.fromstring("<svg " + part.partition("</svg>")[0] + "</svg>") for part in parts]


def test_the_page_is_well_formed(page: str) -> None:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.tags["svg"] == 2


def test_the_page_draws_a_point_for_every_measurement(page: str) -> None:
    by_rows, by_length = drawings(page)
    assert len(by_rows.findall(f"{SVG}circle")) == 2 * 2
    assert len(by_length.findall(f"{SVG}circle")) == 3
    assert len(by_rows.findall(f"{SVG}polyline")) == 2


def test_points_lie_in_the_drawing_and_in_order(page: str) -> None:
    for drawing in drawings(page):
        for line in drawing.findall(f"{SVG}polyline"):
            places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
            assert [x for x, _ in places] == sorted({x for x, _ in places})
            assert all(64 <= x <= 616 and 36 <= y <= 328 for x, y in places)


@pytest.mark.parametrize(
    ("rows", "ticks"),
    [
        ((1, 8, 32, 128), ["1", "2", "4", "8", "16", "32", "64", "128"]),
        ((3,), ["2", "4"]),
        ((4,), ["4", "8"]),
        ((1, 5000), ["1", "4", "16", "64", "256", "1024", "4096", "16384"]),
    ],
)
def test_row_ticks_are_powers_of_two_around_what_was_measured(
    result: BenchResult, rows: tuple[int, ...], ticks: list[str]
) -> None:
    costs = tuple(replace(result.rows[0], rows=count) for count in rows)
    drawing = drawings(curves_html(replace(result, rows=costs)))[0]
    labels = [text.text for text in drawing.findall(f"{SVG}text") if text.attrib["y"] == "350.0"]
    assert labels == ticks


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    rest = page.replace(SVG_NAMESPACE, "")
    for part in ("<script", "http:", "https:", "//", "@import", "url(", "src=", "href="):
        assert part not in rest.lower()


def test_a_bundles_name_is_escaped(result: BenchResult) -> None:
    named = replace(result, subject=Subject(bundle="<script>a & b</script>"))
    page = curves_html(named)
    assert "<script" not in page
    assert page.count("&lt;script&gt;a &amp; b&lt;/script&gt;") == 3
    assert "prefers-color-scheme: dark" in page


def test_importing_kvx_leaves_the_benchmark_alone() -> None:
    script = "import kvx, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"kvx.runtime.measuring.bench", "kvx.runtime.measuring.curves"}.isdisjoint(done.stdout.split())
