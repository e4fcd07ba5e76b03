"""What kvx's own operators save: steps of bundles with them and without, in turns.

    python benchmarks/own_operators.py BUNDLE… [--threads 1] [--rows 1,8,64] [--source 20] [--past 12,1000] [--repeat 8]

Every row has `source` positions of its source and `past` of its target in the cache. Prints a Markdown table: the
median milliseconds of a step by rows and `past`, with ONNX Runtime's operators alone and with kvx's own, and the ratio.
Compare figures of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np

from kvx.runtime import kernels
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.decoding.backend import Step
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.system import cpu_model

BURST = 12  # steps in a row, so that each finds its own weights in the caches; the first ones are not counted
WARM_UP = 4


def bound_step(backend: OnnxBackend, rows: int, source: int, past: int) -> Step:
    """A step over a cache that so many rows have come into."""
    cache = KVCache(backend.cache_specs, Capacity(rows, past + 1, source))
    ids = np.full((1, source), 5, np.int64)
    encoded = backend.encode(ids, np.array([source]))
    for _ in range(rows):
        cache.admit(EncodedSource(encoded, 0, source))
    cache.lengths[:] = past
    return backend.bind(cache)


def medians(bundle: Path, arguments: argparse.Namespace, rows: int, past: int) -> list[float]:
    """Milliseconds of a step without kvx's own operators, and with them."""
    manifest = Manifest.read(bundle)
    taken: list[list[float]] = [[], []]
    backends = [
        OnnxBackend(
            bundle,
            manifest.dimensions,
            manifest.features,
            threads=arguments.threads,
            own=own,
            product_bits=manifest.product_bits,
        )
        for own in (False, True)
    ]
    steps = [bound_step(backend, rows, arguments.source, past) for backend in backends]
    ids = np.full(rows, 5, np.int64)
    for _ in range(arguments.repeat):
        for step, seconds in zip(steps, taken, strict=True):
            for number in range(BURST):
                started = time.perf_counter()
                step(ids)
                if number >= WARM_UP:
                    seconds.append(time.perf_counter() - started)
    return [1000 * statistics.median(seconds) for seconds in taken]


def integers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(one) for one in text.split(",")]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=integers, default=[1, 8, 64])
    parser.add_argument("--source", type=int, default=20)
    parser.add_argument("--past", type=integers, default=[12])
    parser.add_argument("--repeat", type=int, default=8)
    arguments = parser.parse_args()
    if kernels.library() is None:
        parser.error("kvx was installed without its own operators")
    print(f"{cpu_model()}, {kernels.instructions()}, {arguments.threads} threads\n")
    table = []
    for bundle in arguments.bundles:
        for rows, past in itertools.product(arguments.rows, arguments.past):
            plain, own = medians(bundle, arguments, rows, past)
            table.append((bundle.name, str(rows), str(past), f"{plain:.2f}", f"{own:.2f}", f"{plain / own:.2f}"))
    print("\n".join(markdown_table(("bundle", "rows", "past", "without, ms", "with, ms", "ratio"), table, text={0})))


if __name__ == "__main__":
    main()
