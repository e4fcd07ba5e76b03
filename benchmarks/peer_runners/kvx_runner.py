"""kvx itself, on a bundle's ONNX graphs or on the eager model with and without its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from protocol import Request, Runner, Timed, serve  # type: ignore[import-not-found]

from kvx import Translator
from kvx.runtime.decoding.decode import Cancelled, decode
from kvx.runtime.decoding.rows import Source
from kvx.runtime.decoding.schedule import DecodeStats, Outcome
from kvx.runtime.decoding.search import Greedy
from kvx.runtime.engine.workers import side_by_side
from kvx.runtime.options import TranslateOptions


def prepare(_: Request) -> None:
    """Nothing: benchmarks/peers.py exports the bundles."""


def load(request: Request) -> Translator:
    """The bundle's translator; with a `checkpoint`, the eager model's."""
    if "checkpoint" in request:
        return _eager(request)
    return Translator.load(
        request["bundle"], threads=request["threads"], workers=request["workers"], spin=request["spin"]
    )


def run(translator: Translator, request: Request) -> Timed:
    """Greedy translations: all in `rows` rows, longest first, or one by one where rows is 0."""
    numbered = [Source(index, tuple(ids)) for index, ids in enumerate(request["sentences"])]
    limit, rows = request["max_new_tokens"], request["rows"]
    started = time.perf_counter()
    if rows:
        options = TranslateOptions(max_new_tokens=limit, rows=rows, workers=request["workers"])
        found = list(_together(translator, numbered, options))
    else:
        options = TranslateOptions(max_new_tokens=limit)
        found = [outcome for source in numbered for outcome in _alone(translator, source, options)]
    seconds = time.perf_counter() - started
    found.sort(key=lambda outcome: outcome.index)
    return Timed(seconds, [list(outcome.best.ids) for outcome in found])


def _alone(translator: Translator, source: Source, options: TranslateOptions) -> Iterator[Outcome]:
    plan, _ = translator.plan(options, sentences=1)
    return decode(translator.backend, [source], Greedy(), plan)


def _together(translator: Translator, sources: list[Source], options: TranslateOptions) -> Iterator[Outcome]:
    plan, workers = translator.plan(options)

    def greedy(shared: Iterator[Source], stats: DecodeStats, stopped: Cancelled) -> Iterator[Outcome]:
        return decode(translator.backend, shared, Greedy(), plan, stats, cancelled=stopped)

    ordered = sorted(sources, key=lambda source: len(source.ids), reverse=True)
    return side_by_side([greedy] * workers, ordered, DecodeStats(), at_once=plan.group)


def _eager(request: Request) -> Translator:
    import torch

    from kvx.models.eager import NoCacheBackend, TorchBackend
    from kvx.models.importers import load_checkpoint
    from kvx.runtime.bundle.folder import Bundle

    torch.set_num_threads(request["threads"])
    model = load_checkpoint(Path(request["checkpoint"])).model
    backend = TorchBackend(model) if request["cache"] else NoCacheBackend(model)
    return Translator(Bundle.open(Path(request["bundle"])), backend)


if __name__ == "__main__":
    serve(Runner(prepare, load, run))
