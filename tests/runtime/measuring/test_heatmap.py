from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvx import InputError
from kvx.runtime.arrays import FloatArray
from kvx.runtime.measuring.heatmap import attention_html
from kvx.runtime.measuring.page import SVG_NAMESPACE

SVG = f"{{{SVG_NAMESPACE}}}"
SOURCE, TARGET = ("▁ein", "▁Haus"), ("▁a", "▁hou", "se")


@pytest.fixture
def attention() -> FloatArray:
    weights: FloatArray = np.array([[0.1, 0.7, 0.2, 0], [0, 0.001, 0.9, 0.099], [0, 0, 1, 0]], np.float32)
    return weights


def drawing(page: str) -> ET.Element:
    [part] = page.split("<svg ")[1:]
    return ET.fromstring("<svg " + part.partition("</svg>")[0] + "</svg>")


def test_every_weight_that_can_be_seen_is_a_cell_of_its_strength(attention: FloatArray) -> None:
    cells = list(drawing(attention_html(attention, SOURCE, TARGET, "x")).iter(f"{SVG}rect"))
    seen = [(cell[0].text, float(cell.attrib["fill-opacity"])) for cell in cells if len(cell)]
    assert seen == [
        ("▁a ← bos: 0.10", 0.1),
        ("▁a ← ▁ein: 0.70", 0.7),
        ("▁a ← ▁Haus: 0.20", 0.2),
        ("▁hou ← ▁Haus: 0.90", 0.9),
        ("▁hou ← eos: 0.10", 0.099),
        ("se ← ▁Haus: 1.00", 1.0),
    ]


def test_columns_and_rows_are_in_order_and_inside_the_drawing(attention: FloatArray) -> None:
    svg = drawing(attention_html(attention, SOURCE, TARGET, "x"))
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    places = {}
    for cell in svg.iter(f"{SVG}rect"):
        x, y = float(cell.attrib["x"]), float(cell.attrib["y"])
        assert 0 <= x <= width - float(cell.attrib["width"])
        assert 0 <= y <= height - float(cell.attrib["height"])
        if len(cell):
            places[cell[0].text] = x, y
    assert places["▁a ← bos: 0.10"][0] < places["▁a ← ▁ein: 0.70"][0] < places["▁a ← ▁Haus: 0.20"][0]
    assert places["▁a ← ▁Haus: 0.20"][1] < places["▁hou ← ▁Haus: 0.90"][1] < places["se ← ▁Haus: 1.00"][1]
    assert places["▁a ← ▁Haus: 0.20"][0] == places["se ← ▁Haus: 1.00"][0]


def test_the_most_of_each_row_is_framed(attention: FloatArray) -> None:
    svg = drawing(attention_html(attention, SOURCE, TARGET, "x"))
    frames = [cell for cell in svg.iter(f"{SVG}rect") if cell.attrib["class"] == "most"]
    strongest = [cell for cell in svg.iter(f"{SVG}rect") if len(cell) and float(cell.attrib["fill-opacity"]) >= 0.7]
    assert [(cell.attrib["x"], cell.attrib["y"]) for cell in frames] == [
        (cell.attrib["x"], cell.attrib["y"]) for cell in strongest
    ]


def test_every_piece_is_a_label(attention: FloatArray) -> None:
    labels = [text.text for text in drawing(attention_html(attention, SOURCE, TARGET, "x")).iter(f"{SVG}text")]
    assert labels[:7] == ["bos", *SOURCE, "eos", *TARGET]


def test_the_page_needs_nothing_from_elsewhere_and_has_a_dark_side(attention: FloatArray) -> None:
    page = attention_html(attention, SOURCE, TARGET, "x")
    rest = page.replace(SVG_NAMESPACE, "").lower()
    for part in ("<script", "http:", "https:", "//", "@import", "url(", "src=", "href="):
        assert part not in rest
    assert "prefers-color-scheme: dark" in page
    colours = re.findall(r"var\((--\w+)\)", page)
    assert colours
    assert all(f"{name}:" in page for name in colours)


def test_pieces_and_title_are_escaped_and_readable(attention: FloatArray) -> None:
    source, target = ("<b>&", "x" * 50), ('"', "a\x00b", "'")
    page = attention_html(attention, source, target, "<script>&")
    assert "<script" not in page
    assert "<b>" not in page
    labels = [text.text for text in drawing(page).iter(f"{SVG}text")]
    assert labels[1:3] == ["<b>&", "x" * 19 + "…"]
    assert labels[4:7] == ['"', "a�b", "'"]


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (3, 5), (12,)])
def test_pieces_of_another_sentence_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[3, 4\]: a row for each target piece"):
        attention_html(np.zeros(shape, np.float32), SOURCE, TARGET, "x")


def test_drawing_attention_imports_no_benchmark() -> None:
    script = "import kvx.runtime.measuring.heatmap, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "kvx.runtime.measuring.page" in loaded
    assert {"kvx.runtime.measuring.bench", "kvx.runtime.measuring.curves"}.isdisjoint(loaded)
