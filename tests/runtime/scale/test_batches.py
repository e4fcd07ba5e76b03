"""TranslateBatches: every kind of batch in, the same kind out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvx import InputError
from kvx.runtime.scale import TranslateBatches


@pytest.fixture(scope="module")
def batches(numbers_bundle: Path) -> Iterator[TranslateBatches]:
    with TranslateBatches(numbers_bundle, threads=1) as found:
        yield found


@pytest.mark.parametrize("kind", [np.str_, object])
def test_arrays(batches: TranslateBatches, kind: type) -> None:
    batch = {"id": np.arange(2), "text": np.array(["one", "two"], dtype=kind)}
    found = batches(batch)
    assert list(found) == ["id", "text", "translation", "error"]
    assert found["id"] is batch["id"]
    assert list(found["translation"]) == ["eins", "zwei"]
    assert list(found["error"]) == [None, None]
    assert "translation" not in batch


def test_tables(batches: TranslateBatches) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra scale is not installed")
    table = arrow.table({"text": ["one", None], "x": [1.5, None]})
    found = batches(table)
    assert found.select(["text", "x"]).equals(table)
    assert found["translation"].to_pylist() == ["eins", None]
    assert "null" in found["error"].to_pylist()[1]


def test_frames(batches: TranslateBatches) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    found = batches(pandas.DataFrame({"text": ["one", None]}))
    assert found["translation"].iloc[0] == "eins"
    assert "null" in found["error"].iloc[1]


def test_calls_of_any_size_follow_each_other(batches: TranslateBatches, texts: list[str], expected: list[str]) -> None:
    found = [one for start in range(0, 500, 70) for one in batches({"text": texts[start : start + 70]})["translation"]]
    assert found == expected
    assert list(batches({"text": np.array([], dtype=object)})["translation"]) == []


def test_names_and_options(numbers_bundle: Path) -> None:
    named: dict[str, Any] = {"text_field": "t", "translation_field": "de", "error_field": "e", "details_field": "d"}
    with TranslateBatches(numbers_bundle, threads=1, beam_size=2, scores=True, rows=4, **named) as batches:
        found = batches({"t": ["one"]})
    assert list(found) == ["t", "de", "e", "d"]
    assert '"score": -' in found["d"][0]


def test_a_batch_without_the_field_is_refused(batches: TranslateBatches) -> None:
    with pytest.raises(InputError, match="no field 'text'"):
        batches({"other": ["one"]})
    with pytest.raises(InputError, match="The batch is a list"):
        batches(["one"])


def test_the_class_travels_to_workers() -> None:
    assert pickle.loads(pickle.dumps(TranslateBatches)) is TranslateBatches
