"""kvx itself, on a bundle's ONNX graphs or on the eager model with and without its cache."""

from __future__ import annotations

import time
from pathlib import Path

from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.engine import request as kvx_request
from kvx.runtime.engine.bulk import Bulk
from kvx.runtime.engine.core import Core, EngineOptions, core_for
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.supply import Listed
from kvx.runtime.options import TranslateOptions


def prepare(_: Request) -> None:
    """Nothing: benchmarks/peers.py exports the bundles."""


def load(request: Request) -> Core:
    """The bundle on ONNX Runtime; with a `checkpoint`, on the eager model."""
    bundle = Bundle.open(Path(request["bundle"]))
    if "checkpoint" in request:
        return Core(_eager(bundle, request), EngineOptions())
    threads, workers, spin = request["threads"], request["workers"], request["spin"]
    return Core(LoadedModel.load(bundle, threads=threads, workers=workers, spin=spin), EngineOptions())


def run(core: Core, request: Request) -> Timed:
    """Greedy translations: all in `rows` rows, longest first, or one by one where rows is 0."""
    sentences = [tuple(ids) for ids in request["sentences"]]
    limit, rows = request["max_new_tokens"], request["rows"]
    started = time.perf_counter()
    if rows:
        options = TranslateOptions(max_new_tokens=limit, rows=rows, workers=request["workers"])
        with core_for(core.model, options) as sized:
            found = _translated(sized, sentences, options)
    else:
        options = TranslateOptions(max_new_tokens=limit)
        found = [ids for source in sentences for ids in _translated(core, [source], options)]
    return Timed(time.perf_counter() - started, found)


def _translated(core: Core, sentences: list[tuple[int, ...]], options: TranslateOptions) -> list[list[int]]:
    """Ids as the encoder takes them → those of the translations."""
    prepared = core.prepare(options)
    bulk = Bulk(core.workers, prepared, len(sentences), None)
    requests = [
        kvx_request.Request(
            number,
            ids,
            options=prepared.seat,
            model=core.model,
            asked_for=options,
            lane=kvx_request.LaneKey(1),
            owner=bulk,
        )
        for number, ids in enumerate(sentences)
    ]
    return [list(one.results[0].best.ids) for one in bulk.run(Listed(iter(requests))) if one.results]


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
