"""What relative positions cost: a base-size model with a bias of distances, as T5 has it, against one with a table.

    python benchmarks/relative_bias.py --work FOLDER [--tokens 100] [--repeat 7] [--precision fp32]

Both have random weights of the same sizes and translate the same sentences to exactly that many tokens, in turns, one
decode loop of one thread. Prints a Markdown table: the least milliseconds of a step by rows, and the ratio. Compare
rows of one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    translators = {}
    for name, config in CONFIGURATIONS.items():
        folder = arguments.work / name
        checkpoint = write_base_model(folder, max_new_tokens=arguments.tokens, config=config)
        exported = ExportOptions(
            checkpoint=checkpoint,
            output=folder / "bundle",
            format="onnx",
            precision=arguments.precision,
            verify=False,
            force=True,
        )
        export(exported)
        translators[name] = Translator.load(folder / "bundle", threads=1)
    texts = (arguments.work / "table" / "sources.txt").read_text(encoding="utf-8").splitlines()
    table = []
    for rows in ROWS:
        options = TranslateOptions(rows=rows, workers=1, window=rows, beam_size=1)
        least = dict.fromkeys(translators, float("inf"))
        for _ in range(arguments.repeat):
            for name, translator in translators.items():
                taken, steps = seconds(translator, texts[:rows], options)
                least[name] = min(least[name], 1000 * taken / steps)
        ratio = least["relative"] / least["table"]
        table.append((rows, f"{least['table']:.2f}", f"{least['relative']:.2f}", f"{ratio:.3f}"))
    print("\n".join(markdown_table(("rows", "table, ms a step", "relative, ms a step", "ratio"), table)))


if __name__ == "__main__":
    main()
