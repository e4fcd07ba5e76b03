"""What relative positions cost: a base-size model with a bias of distances, as T5 has it, against one with a table.

    python benchmarks/relative_bias.py --work FOLDER [--tokens 40] [--repeat 5] [--precision fp32]

Both have random weights of the same sizes and translate the same sentences to exactly that many tokens, in turns, one
decode loop of one thread. Every repetition loads both anew, since where weights come to lie in memory makes more of a
difference than the bias. Prints a Markdown table: the least milliseconds of a step by rows, and the ratio. Compare rows
of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

from kvx import TranslateOptions, Translator
from kvx.benchmarks.base_model import BASE, write_base_model
from kvx.benchmarks.beams import seconds
from kvx.exporter.export import export
from kvx.exporter.options import ExportOptions
from kvx.models.config import LARGEST_SIZE
from kvx.runtime.measuring.tables import markdown_table

RELATIVE = dataclasses.replace(
    BASE,
    positions="relative",
    relative_distance=128,
    source_positions=LARGEST_SIZE,
    target_positions=LARGEST_SIZE,
)
CONFIGURATIONS = {"table": BASE, "relative": RELATIVE}
ROWS = (1, 8, 64)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    for name, config in CONFIGURATIONS.items():
        folder = arguments.work / name
        checkpoint = write_base_model(folder, max_new_tokens=arguments.tokens, config=config)
        output, precision = folder / "bundle", arguments.precision
        export(
            ExportOptions(
                checkpoint=checkpoint, output=output, format="onnx", precision=precision, verify=False, force=True
            )
        )
    texts = (arguments.work / "table" / "sources.txt").read_text(encoding="utf-8").splitlines()
    least = {(name, rows): float("inf") for name in CONFIGURATIONS for rows in ROWS}
    for _, name in itertools.product(range(arguments.repeat), CONFIGURATIONS):
        translator = Translator.load(arguments.work / name / "bundle", threads=1)
        for rows in ROWS:
            options = TranslateOptions(rows=rows, workers=1, window=rows, beam_size=1)
            seconds(translator, texts[:rows], options)  # warms up
            taken, _, steps = seconds(translator, texts[:rows], options)
            least[name, rows] = min(least[name, rows], 1000 * taken / steps)
    table = [
        (rows, *(f"{least[name, rows]:.2f}" for name in CONFIGURATIONS), f"{_ratio(least, rows):.3f}") for rows in ROWS
    ]
    print("\n".join(markdown_table(("rows", "table, ms a step", "relative, ms a step", "ratio"), table)))


def _ratio(least: dict[tuple[str, int], float], rows: int) -> float:
    return least["relative", rows] / least["table", rows]


if __name__ == "__main__":
    main()
