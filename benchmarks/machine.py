"""What the machine can do at most: bytes read from memory and products of matrices, by one core and by all.

    python benchmarks/machine.py

Prints a Markdown table: the best of several runs, each thread on data of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import TensorProto, helper

from kvx.runtime.backends.ort import ort
from kvx.runtime.measuring.tables import markdown_table
from kvx.runtime.system import available_threads, cpu_model

MEBIBYTES = (1, 40, 150, 600)
ROWS, WIDTH = 256, 2048
RUNS = 9

Work = tuple[Callable[[], object], float]  # something to run, and how many units it does


def reading(mebibytes: int) -> Work:
    """A pass over so many MiB, and the bytes that it reads."""
    data = np.ones(mebibytes * 2**20 // 8)
    return data.max, float(data.nbytes)


def products(element: str) -> Work:
    """A product of [ROWS, WIDTH] and [WIDTH, WIDTH], and its operations: two for each of its multiplications."""
    kind, left, right = (
        ("MatMul", np.float32, np.float32) if element == "float32" else ("MatMulInteger", np.uint8, np.int8)
    )
    weight = helper.make_tensor(
        "w", helper.np_dtype_to_tensor_dtype(np.dtype(right)), [WIDTH, WIDTH], _ones(right), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(left)), [ROWS, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT if element == "float32" else TensorProto.INT32, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((ROWS, WIDTH), left)}
    return lambda: session.run(None, feeds), 2.0 * ROWS * WIDTH * WIDTH


def _ones(element: type) -> bytes:
    return np.ones((WIDTH, WIDTH), element).tobytes()


def best(make: Callable[[], Work], threads: int) -> float:
    """Units a second of all threads together."""
    rates: list[float] = []

    def work() -> None:
        run, units = make()
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        rates.append(units / min(seconds))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def main() -> None:
    """Measures both, by one thread and by as many as there are cores."""
    cores = available_threads()
    print(f"{cpu_model()}, {cores} cores, ONNX Runtime {ort.__version__}\n")
    work = {f"reading {size} MiB, GB/s": partial(reading, size) for size in MEBIBYTES}
    work |= {f"products of {one}, G operations/s": partial(products, one) for one in ("float32", "int8")}
    rows = [[name, *(f"{best(make, threads) / 1e9:.0f}" for threads in (1, cores))] for name, make in work.items()]
    print("\n".join(markdown_table(("", "one core", f"{cores} cores"), rows, text={0})))


if __name__ == "__main__":
    main()
