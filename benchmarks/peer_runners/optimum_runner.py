"""Optimum-ONNX: its export of a Hugging Face folder or of the weights of a kvx model, run by its own
ORTModelForSeq2SeqLM.
"""

from __future__ import annotations

from typing import Any

import onnxruntime
from generating import model_of, translate  # type: ignore[import-not-found]
from optimum.exporters.onnx import onnx_export_from_model  # type: ignore[import-not-found]
from optimum.onnxruntime import ORTModelForSeq2SeqLM  # type: ignore[import-not-found]
from protocol import Request, Runner, serve  # type: ignore[import-not-found]


def prepare(request: Request) -> None:
    """Exports the model with its cache."""
    onnx_export_from_model(
        model_of(request),
        request["model"],
        task="text2text-generation-with-past",
        do_validation=False,
    )


def load(request: Request) -> Any:  # noqa: ANN401  # of a package without types
    """The exported model on `threads` threads of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    return ORTModelForSeq2SeqLM.from_pretrained(request["model"], session_options=options)


if __name__ == "__main__":
    serve(Runner(prepare, load, translate))
