"""The benchmark beside others: who takes part, what is judged, and that a folder is read as kvx reads it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("safetensors")

import torch

from kvx.benchmarks import marian_model, peers
from kvx.benchmarks.base_model import BASE
from kvx.benchmarks.work import operations, step_bytes
from kvx.exporter.options import ExportOptions
from kvx.models.importers import load_checkpoint

ALL = peers.Scope(peers.PEERS, peers.PRECISIONS, quick=False)
SENTENCES = [[5, 6, 7], [8, 9]]
SIZES = {"LAYERS": 2, "D_MODEL": 32, "HEADS": 4, "D_FF": 64, "VOCABULARY": 300, "PAD": 299, "POSITIONS": 64, "STD": 0.3}


def _workload(name: str) -> peers.Workload:
    counts: Mapping[peers.Task, int] = {"alone": 2, "together": 2}
    return peers.Workload(name, "", Path(), BASE, SENTENCES, 10, True, counts, counts, 1, "")


def _results(
    name: str, together: Mapping[str, float], alone: Mapping[str, float], peaks: Mapping[str, float]
) -> peers.Results:
    """Tokens a second, milliseconds for a sentence of 10 tokens, MiB."""
    everyone = [one for one in peers.contestants(Path(), ALL) if one.name in together]
    results = peers.Results(_workload(name), everyone)
    figures: dict[peers.Task, Mapping[str, float]] = {"alone": alone, "together": together}
    for task, found in figures.items():
        results.measured[task] = {
            name: peers.Measured(name, "", [value], 2, 20, [[1] * 10] * 2) for name, value in found.items()
        }
    results.fresh = [peers.Fresh(name, peak, []) for name, peak in peaks.items()]
    return results


def _verdicts(results: peers.Results, *, vnni: bool) -> dict[tuple[object, ...], tuple[object, ...]]:
    found = peers.judge([results], vnni=vnni)
    return {(one["task"], one["theirs"]): (one["ours"], one["factor"], one["verdict"]) for one in found}


def test_the_best_of_ours_is_judged_by_the_goal_of_the_processor() -> None:
    slow, fast = peers.KVX_INT8
    together = {peers.CT2_INT8: 100.0, slow: 90.0, fast: 140.0}
    results = _results("marian", together, {peers.CT2_INT8: 23.0, slow: 10.0, fast: 11.0}, {})
    assert _verdicts(results, vnni=True) == {
        ("together", peers.CT2_INT8): (fast, 1.5, "missed"),
        ("alone", peers.CT2_INT8): (slow, 2.5, "missed"),
    }
    assert _verdicts(results, vnni=False) == {
        ("together", peers.CT2_INT8): (fast, 1.35, "met"),
        ("alone", peers.CT2_INT8): (slow, 2.2, "met"),
    }


@pytest.mark.parametrize(("peak", "verdict"), [(500.0, "met"), (500.1, "missed")])
def test_less_memory_is_better(peak: float, verdict: str) -> None:
    large, small = peers.KVX_INT8
    results = _results("seed", {}, {}, {peers.CT2_INT8: 500.0, large: 600.0, small: peak})
    assert _verdicts(results, vnni=True) == {("memory", peers.CT2_INT8): (small, 1.0, verdict)}


def test_goals_whose_contestants_did_not_take_part_are_left_out() -> None:
    results = _results("base", {peers.CT2: 1.0}, {peers.CT2: 1.0}, {peers.KVX: 1.0})
    assert peers.judge([results], vnni=True) == []


def test_a_contestant_at_the_peaks_has_all_of_them() -> None:
    tokens = sum(map(len, SENTENCES)), 20
    peaks = peers.Peaks(float32=operations(BASE, *tokens) / 2, int8=1.0, memory=10 * step_bytes(BASE, "fp32"))
    results = _results("base", {peers.KVX: 10.0}, {peers.KVX: 1000.0}, {})  # 2 seconds for all, 10 steps a second
    [share] = peers.shares(results, peaks)
    assert dataclasses.astuple(share) == pytest.approx((peers.KVX, 1.0, 1.0))


def test_quick_takes_one_setting_of_each_and_leaves_out_what_is_not_named() -> None:
    scope = peers.Scope(peers.QUICK_PEERS, ["int8"], quick=True)
    found = peers.contestants(Path(), scope)
    assert [one.name for one in found] == [peers.CT2, peers.CT2_INT8, *peers.KVX_INT8, peers.CACHED]
    assert all(len(settings) == 1 for one in found for settings in one.settings.values())


def test_without_quick_all_take_part() -> None:
    names = {one.name for one in peers.contestants(Path(), ALL)}
    assert names >= {peers.TRANSFORMERS, peers.OPTIMUM, peers.CACHED, peers.UNCACHED, *peers.KVX_INT4}


def test_a_bundle_stays_until_what_it_comes_from_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[str] = []

    def export(options: ExportOptions) -> None:
        assert options.output is not None
        options.output.mkdir(exist_ok=True)
        exported.append(options.output.name)

    monkeypatch.setattr(peers, "export", export)
    scope = peers.Scope((), ["int8"], quick=True)
    (tmp_path / "calibration.txt").write_text("a b\n", encoding="utf-8")
    for limit in (24, 24, 25):
        peers.export_bundles(tmp_path, limit, scope.bundles)
    assert exported == ["int8", "int8-calibrated"] * 2
    (tmp_path / "calibration.txt").write_text("a c\n", encoding="utf-8")
    peers.export_bundles(tmp_path, 25, scope.bundles)
    assert len(exported) == 6


def test_transformers_reads_the_folder_as_kvx_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for name, value in SIZES.items():
        monkeypatch.setattr(marian_model, name, value)
    folder = marian_model.write_marian_model(tmp_path / peers.HUGGINGFACE, max_length=11)
    model = load_checkpoint(folder).model
    sentences = [[5, 17, 250, 33, 0], [8, 9, 0]]
    expected = []
    for source in sentences:
        target = [marian_model.PAD]
        for _ in range(10):
            logits = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([target]))
            target.append(int(logits[0, -1].argmax()))
        expected.append(target[1:])
    assert expected[0] != expected[1]
    with peers.Process("transformers", Path(sys.executable)) as process:
        process.ask("load", key="it", threads=1, **peers.given(tmp_path))
        for rows in (0, 2):
            found = process.ask("run", key="it", sentences=sentences, max_new_tokens=10, rows=rows, threads=1)
            assert found["ids"] == expected
