"""Rows with known translations, and jobs over them in this process."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvx import TranslateOptions, Translator
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import PLAIN
from kvx.runtime.scale.batch import Summary, Told, run_batch
from kvx.runtime.scale.folder import OutputFolder
from kvx.runtime.scale.job import BatchOptions, Job
from kvx.scripts.train_numbers import english

RunJob = Callable[..., Summary]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Numbers in words, of many lengths."""
    generator = random.Random(17)
    return [english(int(10 ** (generator.random() * 6)) - 1) for _ in range(500)]


@pytest.fixture(scope="session")
def expected(texts: list[str], numbers_translator: Translator) -> list[str]:
    return [one.text for one in numbers_translator.translate(texts)]


@pytest.fixture(scope="session")
def model(numbers_bundle: Path) -> LoadedModel:
    return Translator.load(numbers_bundle, threads=2, workers=2)._model


@pytest.fixture
def run_job(model: LoadedModel) -> RunJob:
    """Runs a job in this process → what came of it."""

    def run(
        output: Path,
        *inputs: Path | str,
        translate: TranslateOptions = PLAIN,
        restart: bool = False,
        told: Told | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Summary:
        resolved = translate.resolved(model.manifest.defaults)
        job = Job.of(tuple(map(str, inputs)), BatchOptions(**options), resolved, model.manifest)
        with OutputFolder.open(output, job.describe(), restart=restart) as folder:
            return run_batch(job, model, folder, told)

    return run


def json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(folder: Path) -> list[Path]:
    """The files of an output folder with a name that others read, in order."""
    return sorted(path for path in folder.iterdir() if path.name[0] not in "._")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all shards of JSON lines, in order."""
    return [json.loads(line) for path in shards(folder) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def no_leftovers(folder: Path) -> Iterator[None]:
    """At its end the folder has whole shards, a manifest and its own folder, and nothing else."""
    yield
    others = {path.name for path in folder.iterdir()} - {path.name for path in shards(folder)}
    assert others <= {"_manifest.json", ".kvx"}
