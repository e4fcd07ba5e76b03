"""What transformers and Optimum-ONNX have in common: the model that they take, and `generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from m2m100 import build  # type: ignore[import-not-found]
from protocol import Request, Timed, longest_first  # type: ignore[import-not-found]
from transformers import AutoModelForSeq2SeqLM, logging

logging.set_verbosity_error()  # generate warns at every call of a folder that has a max_length


def model_of(request: Request) -> Any:  # noqa: ANN401  # of a package without types
    """The model in a Hugging Face folder, or one built from the weights of a kvx model."""
    if "huggingface" in request:
        return AutoModelForSeq2SeqLM.from_pretrained(request["huggingface"]).eval()
    return build(Path(request["weights"]))


def translate(model: Any, request: Request) -> Timed:  # noqa: ANN401
    """Greedy translations: all in batches of `rows`, longest first, or one by one where rows is 0."""
    sentences, rows = request["sentences"], request["rows"]
    batches = longest_first(sentences, rows) if rows else [[index] for index in range(len(sentences))]
    ids: list[list[int]] = [[] for _ in sentences]
    started = time.perf_counter()
    for batch in batches:
        found = _generate(model, [sentences[index] for index in batch], request["max_new_tokens"])
        for index, hypothesis in zip(batch, found, strict=True):
            ids[index] = hypothesis
    return Timed(time.perf_counter() - started, ids)


def _generate(model: Any, batch: list[list[int]], max_new_tokens: int) -> list[list[int]]:  # noqa: ANN401
    """Greedy translations of a padded batch: ids after the first token, eos included where it was found."""
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    width = max(map(len, batch))
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch])
    with torch.inference_mode():
        outputs = model.generate(
            input_ids=input_ids,
            attention_mask=(input_ids != pad).long(),
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
        )
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in outputs[:, 1:].tolist()]
