"""What kvx's own Python costs: around steps of no cost, and in the translation of one sentence.

    python benchmarks/overhead.py [--bundle FOLDER] [--text TEXT] [--against FOLDER] [--rounds 4] [--repeat 40]

Greedy decoding of 64 rows over a backend whose step gives the same logits [64, V] at once leaves nothing but Python;
its microseconds of processor time per step are printed. With a bundle also the milliseconds of TEXT, translated alone,
greedily and with 4 beams. All are medians.

FOLDER of --against holds another checkout as its folder `kvx`. Each checkout runs in a process of its own, in every
round a fresh one, started once before and once after the other, and the two take turns at every single measurement;
the table has the ratios of their medians: above 1, this checkout is slower. Also measures releases up to 0.1, whose
modules lay in `runtime` itself. Compare figures of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

ROWS, VOCABULARY = 64, 100
SOURCE_TOKENS, TARGET_TOKENS = 8, 200
BOS, EOS, PAD, CHOSEN = 2, 3, 0, 7
WARM_UP = 3
TEXT = "Zwei junge Männer sind im Freien in der Nähe vieler Büsche."
STEP, ALONE, BEAMS = "Python per step of 64 rows, µs", "one sentence, ms", "one sentence with 4 beams, ms"

Measurement = Callable[[], float]


def imported() -> dict[str, Any]:
    """What is measured, by its name today, from wherever the kvx that is imported has it."""
    places = {
        "decode": ("decoding.decode", "decode", "decode"),
        "Greedy": ("decoding.search", "search", "Greedy"),
        "Plan": ("decoding.plan", "plan", "Plan"),
        "Sentence": ("decoding.results", "rows", "Source"),
        "StepOutput": ("decoding.backend", "backend", "StepOutput"),
        "Dimensions": ("bundle.signature", "signature", "Dimensions"),
        "cache_specs": ("bundle.signature", "signature", "cache_specs"),
        "Capacity": ("decoding.cache", "cache", "Capacity"),
    }
    rooms = importlib.util.find_spec("kvx.runtime.decoding") is not None
    return {
        name: getattr(importlib.import_module(f"kvx.runtime.{now if rooms else before}"), name if rooms else old)
        for name, (now, before, old) in places.items()
    }


class NoCost:
    """A backend whose steps give the same logits, of which one token that is not eos is the best."""

    name = "no cost"
    decodes = 1
    query_tokens = False

    def __init__(self, kvx: Mapping[str, Any]) -> None:
        dimensions = kvx["Dimensions"](layers=1, heads=1, head_width=1, vocab_size=VOCABULARY)
        self.cache_specs = self.beam_cache_specs = kvx["cache_specs"](dimensions)
        logits = np.zeros((ROWS, VOCABULARY), np.float32)
        logits[:, CHOSEN] = 1.0
        self._output = kvx["StepOutput"](logits=logits)

    def encode(self, input_ids: NDArray[np.int64], source_lengths: NDArray[np.int64]) -> dict[str, Any]:
        """Keys and values of zeros."""
        sizes = {"B": len(input_ids), "S": input_ids.shape[1]}
        return {spec.name: np.zeros(spec.shape(sizes), spec.dtype) for spec in self.cache_specs if "S" in spec.axes}

    def bind(self, cache: object) -> Callable[[NDArray[np.int64]], Any]:
        """The step."""
        output = self._output
        return lambda input_ids: output


def steps_of_no_cost() -> Measurement:
    """Microseconds of processor time of a step, seating and finishing sentences included."""
    kvx = imported()
    backend = NoCost(kvx)
    begin = {"start": (BOS,)} if "start" in kvx["Plan"].__dataclass_fields__ else {"bos": BOS}
    plan = kvx["Plan"](
        **begin,
        **{"eos": EOS, "pad": PAD, "rows": ROWS, "max_new_tokens": TARGET_TOKENS},
        source_positions=SOURCE_TOKENS,
        cache_bytes=2**30,
        target_bytes=kvx["Capacity"](1, 1, 0, 1).bytes(backend.cache_specs),
        source_bytes=kvx["Capacity"](1, 0, 1, 1).bytes(backend.cache_specs),
    )

    def measure() -> float:
        sentences = [kvx["Sentence"](number, (CHOSEN,) * SOURCE_TOKENS) for number in range(ROWS)]
        started = time.thread_time()
        outcomes = list(kvx["decode"](backend, sentences, kvx["Greedy"](), plan))
        seconds = time.thread_time() - started
        assert [len(outcome.best.ids) for outcome in outcomes] == [TARGET_TOKENS] * ROWS
        return seconds / TARGET_TOKENS * 1e6

    return measure


def milliseconds(run: Callable[[], object]) -> Measurement:
    """Milliseconds of a run."""

    def measure() -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3

    return measure


def measurements(arguments: argparse.Namespace) -> dict[str, Measurement]:
    """What there is to measure in this process, by its name in the table."""
    found = {STEP: steps_of_no_cost()}
    if arguments.bundle is not None:
        from kvx import Translator

        translator, texts = Translator.load(arguments.bundle, threads=arguments.threads), [arguments.text]
        found[ALONE] = milliseconds(lambda: translator.translate(texts))
        found[BEAMS] = milliseconds(lambda: translator.translate(texts, beam_size=4))
    return found


def serve(arguments: argparse.Namespace) -> None:
    """Says which kvx this is and what it measures, then answers each of these names with one measurement."""
    import kvx

    found = measurements(arguments)
    for measure in found.values():
        for _ in range(WARM_UP):
            measure()
    print(json.dumps({"kvx": kvx.__file__, "names": list(found)}), flush=True)
    for line in sys.stdin:
        print(found[line.rstrip("\n")](), flush=True)


class Checkout:
    """A process that measures the kvx in `folder`, or the one that this process would import."""

    def __init__(self, folder: Path | None, arguments: argparse.Namespace) -> None:
        line = [sys.executable, __file__, "--serve", "--text", arguments.text, "--threads", str(arguments.threads)]
        if arguments.bundle is not None:
            line += ["--bundle", str(arguments.bundle)]
        path = {} if folder is None else {"PYTHONPATH": str(folder.resolve())}
        self._process = subprocess.Popen(
            line, env={**os.environ, **path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = json.loads(self._answer())
        if folder is not None and Path(ready["kvx"]).parent.parent != folder.resolve():
            raise SystemExit(f"{folder} has no folder kvx that can be imported: {ready['kvx']} was.")
        self.names: list[str] = ready["names"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def measure(self, name: str) -> float:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A process that measures has ended; what it said stands above.")
        return line


def measure_in_turn(arguments: argparse.Namespace) -> list[dict[str, list[float]]]:
    """All measurements of this checkout and, where there is one, of the other. Who starts first in a round, or measures
    first, has been seen to be slower by some percent: each does so as often as the other.
    """
    folders = [None, *([arguments.against] if arguments.against else [])]
    found: list[dict[str, list[float]]] = [{} for _ in folders]
    sides = list(zip(folders, found, strict=True))
    for _ in range(arguments.rounds):
        for order in (sides, sides[::-1]):
            measure_round(order, arguments)
    return found


def measure_round(sides: list[tuple[Path | None, dict[str, list[float]]]], arguments: argparse.Namespace) -> None:
    """Starts a process for each of these checkouts, in their order, and adds what they measure in turn."""
    with ExitStack() as stack:
        started = [(stack.enter_context(Checkout(folder, arguments)), figures) for folder, figures in sides]
        for name in started[0][0].names:
            for number in range(arguments.repeat):
                for checkout, figures in started if number % 2 else started[::-1]:
                    figures.setdefault(name, []).append(checkout.measure(name))


def table(found: list[dict[str, list[float]]]) -> list[str]:
    """The medians side by side, as Markdown."""
    from kvx.runtime.measuring.tables import markdown_table

    header = ["", "this checkout", "the other", "ratio"][: 1 + len(found) + (len(found) > 1)]
    rows = []
    for name in found[0]:
        medians = [statistics.median(figures[name]) for figures in found]
        ratio = [f"{medians[0] / medians[1]:.3f}"] if len(medians) > 1 else []
        rows.append([name, *(f"{median:.2f}" for median in medians), *ratio])
    return markdown_table(header, rows, text={0})


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--serve", action="store_true", help="measure in this process what its input asks for")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    if arguments.serve:
        serve(arguments)
    else:
        print("\n".join(table(measure_in_turn(arguments))))


if __name__ == "__main__":
    main()
