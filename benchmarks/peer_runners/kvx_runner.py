"""kvx itself, on a bundle's ONNX graphs or on the eager model with and without its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.decoding.decode import SearchLoop, decode
from kvx.runtime.decoding.filters import without
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.workers import side_by_side
from kvx.runtime.options import TranslateOptions


def prepare(_: Request) -> None:
    """Nothing: benchmarks/peers.py exports the bundles."""


def load(request: Request) -> LoadedModel:
    """The bundle on ONNX Runtime; with a `checkpoint`, on the eager model."""
    bundle = Bundle.open(Path(request["bundle"]))
    if "checkpoint" in request:
        return _eager(bundle, request)
    return LoadedModel.load(bundle, threads=request["threads"], workers=request["workers"], spin=request["spin"])


def run(model: LoadedModel, request: Request) -> Timed:
    """Greedy translations: all in `rows` rows, longest first, or one by one where rows is 0."""
    numbered = [Sentence(index, tuple(ids)) for index, ids in enumerate(request["sentences"])]
    limit, rows = request["max_new_tokens"], request["rows"]
    started = time.perf_counter()
    if rows:
        options = TranslateOptions(max_new_tokens=limit, rows=rows, workers=request["workers"])
        found = list(_together(model, numbered, options))
    else:
        options = TranslateOptions(max_new_tokens=limit)
        found = [outcome for source in numbered for outcome in _alone(model, source, options)]
    seconds = time.perf_counter() - started
    found.sort(key=lambda outcome: outcome.sentence.number)
    return Timed(seconds, [list(outcome.best.ids) for outcome in found])


def _alone(model: LoadedModel, source: Sentence, options: TranslateOptions) -> Iterator[Outcome]:
    plan, _ = model.plan(options, sentences=1)
    return decode(model.backend, [source], Greedy(), plan, filters=without(plan.never))


def _together(model: LoadedModel, sources: list[Sentence], options: TranslateOptions) -> Iterator[Outcome]:
    plan, workers = model.plan(options)
    loop = SearchLoop(model.backend, plan, Greedy(), without(plan.never))
    ordered = sorted(sources, key=lambda source: len(source.ids), reverse=True)
    return side_by_side([loop] * workers, ordered, DecodeStats(), at_once=plan.group)


def _eager(bundle: Bundle, request: Request) -> LoadedModel:
    import torch

    from kvx.models.eager import NoCacheBackend, TorchBackend
    from kvx.models.importers import load_checkpoint

    torch.set_num_threads(request["threads"])
    model = load_checkpoint(Path(request["checkpoint"])).model
    backend = TorchBackend(model) if request["cache"] else NoCacheBackend(model)
    return LoadedModel(bundle, backend)


if __name__ == "__main__":
    serve(Runner(prepare, load, run))
