from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sacrebleu

from kvx import InputError, OptionError, Translation
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.core import Core
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.translating import translate
from kvx.runtime.measuring import evaluation
from kvx.runtime.measuring.evaluation import ParallelText, evaluate
from kvx.runtime.options import TranslateOptions

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

SOURCES = ("one", "forty-two", "nine hundred", "seven")
REFERENCES = ("eins", "zweiundvierzig", "neunhundert", "acht")


def _kvx(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvx", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source, reference = tmp_path / "test.en", tmp_path / "test.de"
    source.write_text("".join(f"{line}\n" for line in SOURCES), encoding="utf-8")
    reference.write_text("".join(f"{line}\n" for line in REFERENCES), encoding="utf-8")
    return source, reference


@pytest.fixture(scope="module")
def numbers(numbers_bundle: Path) -> LoadedModel:
    return LoadedModel.load(Bundle.open(numbers_bundle))


def test_metrics_are_sacrebleus(numbers: LoadedModel) -> None:
    found, hypotheses = evaluate(numbers, ParallelText(SOURCES, REFERENCES), TranslateOptions(), tokenize="char")
    bleu = sacrebleu.corpus_bleu(hypotheses, [list(REFERENCES)], tokenize="char")
    assert found.bleu.score == bleu.score
    assert "tok:char" in found.bleu.signature
    assert found.chrf.score == sacrebleu.corpus_chrf(hypotheses, [list(REFERENCES)]).score
    assert hypotheses[:3] == list(REFERENCES[:3])
    assert found.complete
    assert found.sentences == 4


def test_an_interrupted_run_says_what_it_had(numbers: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(
        core: Core, texts: tuple[str, ...], options: TranslateOptions, *, stats: DecodeStats
    ) -> Iterator[Translation]:
        for number, translation in enumerate(translate(core, texts, options, stats=stats)):
            if number == 2:
                raise KeyboardInterrupt
            yield translation

    monkeypatch.setattr(evaluation, "translate", interrupted)
    found, hypotheses = evaluate(numbers, ParallelText(SOURCES, REFERENCES), TranslateOptions())
    assert not found.complete
    assert found.sentences == len(hypotheses) == 2
    assert found.chrf.score == pytest.approx(100)


@pytest.mark.parametrize(("sources", "references"), [(("a", "b"), ("a",)), ((), ())])
def test_files_that_do_not_belong_together_are_refused(sources: tuple[str, ...], references: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"are {len(sources)} sources and {len(references)} references"):
        ParallelText(sources, references)


def test_an_unknown_tokenizer_is_refused(numbers: LoadedModel) -> None:
    with pytest.raises(OptionError, match=r"13a.*zh"):
        evaluate(numbers, ParallelText(SOURCES, REFERENCES), TranslateOptions(), tokenize="klingon")


def test_several_backends_stand_side_by_side(numbers_bundle: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = _kvx(
        *("evaluate", numbers_bundle, "--source", files[0], "--reference", files[1]),
        *("--backend", "onnx,torch,torch-no-cache", "--json", "figures.json", "--hypotheses", "out.txt"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["backends"]
    assert [figure["name"] for figure in figures] == ["onnx", "torch", "torch-no-cache"]
    assert len({figure["bleu"]["score"] for figure in figures}) == 1
    for figure in figures:
        assert f"| {figure['name']}" in done.stdout
        assert figure["steps"] > 0
        assert 0 < figure["occupancy"] <= 1
        assert figure["cache_bytes"] > 0
        text = (tmp_path / f"out.{figure['name']}.txt").read_text(encoding="utf-8")
        assert text == "eins\nzweiundvierzig\nneunhundert\nsieben\n"
    assert "nrefs:1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "0"], "limit`? is 0"),
        (["--backend", "onnx,tpu"], "--backend is onnx,tpu"),
        (["--rows", "0"], "rows`? is 0"),
        (["--workers", "0"], "workers`? is 0"),
        (["--cache-mb", "0.0001"], "which hold 0 such rows"),
        (["--cache-mb", "-1"], "--cache-mb is -1"),
        (["--tokenize", "klingon"], "klingon"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    numbers_bundle: Path, files: tuple[Path, Path], arguments: list[str], says: str
) -> None:
    done = _kvx(
        *("evaluate", numbers_bundle, "--source", files[0], "--reference", files[1], *arguments), cwd=files[0].parent
    )
    assert done.returncode == 2
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_different_numbers_of_lines_are_refused(numbers_bundle: Path, files: tuple[Path, Path]) -> None:
    files[1].write_text("eins\n", encoding="utf-8")
    done = _kvx("evaluate", numbers_bundle, "--source", files[0], "--reference", files[1], cwd=files[0].parent)
    assert done.returncode == 2
    assert "4 sources and 1 references" in done.stderr


class TestScore:
    def test_it_prints_sum_mean_and_tokens(self, numbers_bundle: Path, files: tuple[Path, Path]) -> None:
        done = _kvx("score", "--model", numbers_bundle, "--source", files[0], "--target", files[1], cwd=files[0].parent)
        assert done.returncode == 0, done.stderr
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        assert len(lines) == 4
        for total, mean, tokens in lines:
            assert float(mean) * int(tokens) == pytest.approx(float(total), abs=1e-3)
        assert float(lines[0][0]) > -1 > float(lines[3][0])

    def test_it_ranks_candidates(self, numbers_bundle: Path, files: tuple[Path, Path]) -> None:
        files[1].write_text("zwei\teins\nzweiundvierzig\nneun\tneunhundert\tnull\nsieben\tacht\n", encoding="utf-8")
        arguments = ("score", "--model", numbers_bundle, "--source", files[0], "--target", files[1], "--choices")
        done = _kvx(*arguments, cwd=files[0].parent)
        best = [line.split("\t")[0] for line in done.stdout.splitlines()]
        assert best == ["eins", "zweiundvierzig", "neunhundert", "sieben"]
        as_json = [json.loads(line) for line in _kvx(*arguments, "--json", cwd=files[0].parent).stdout.splitlines()]
        assert [len(line["scores"]) for line in as_json] == [2, 1, 3, 2]
        assert as_json[0]["best"] == 1
        assert as_json[1]["margin"] is None

    def test_missing_targets_are_refused(self, numbers_bundle: Path, files: tuple[Path, Path]) -> None:
        files[1].write_text("eins\n", encoding="utf-8")
        done = _kvx("score", "--model", numbers_bundle, "--source", files[0], "--target", files[1], cwd=files[0].parent)
        assert done.returncode == 2
        assert "4 sources and 1 targets" in done.stderr


def _same_bleu_on_every_backend(bundle: Path, seed: Seed, folder: Path, expected: float, *limit: str) -> None:
    pytest.importorskip("torch")
    done = _kvx(
        *("evaluate", bundle, "--source", seed.folder / "test_2016.de", "--reference", seed.folder / "test_2016.en"),
        *("--backend", "onnx,torchscript,torch,torch-no-cache", "--json", "figures.json", *limit),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["backends"]
    assert [figure["bleu"]["score"] for figure in figures] == pytest.approx([expected] * 4, abs=0.05)


@pytest.mark.proof
def test_the_reference_model_scores_the_same_on_every_backend(seed_bundle: Path, seed: Seed, tmp_path: Path) -> None:
    texts = [str(line["text"]) for line in seed.greedy[:40]]
    expected = sacrebleu.corpus_bleu(texts, [seed.references[:40]]).score
    _same_bleu_on_every_backend(seed_bundle, seed, tmp_path, expected, "--limit", "40")


@pytest.mark.proof
def test_the_whole_test_set_reproduces_the_references_bleu(seed_bundle: Path, seed: Seed, tmp_path: Path) -> None:
    _same_bleu_on_every_backend(seed_bundle, seed, tmp_path, seed.bleu("greedy"))
