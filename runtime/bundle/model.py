"""The model configuration as a manifest and a checkpoint hold it: its fields by name, also as earlier releases wrote
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ONE_OF_BOTH = ("heads", "d_ff")  # of the encoder and the decoder alike, in format 1


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of today. Format 1 has one number of heads and one d_ff, and d_model is their heads' width together.

    What is missing or no number is left for the reader to find.
    """
    fields = dict(values)
    for name in ONE_OF_BOTH:
        if name in fields:
            value = fields.pop(name)
            fields |= {f"{side}_{name}": value for side in ("encoder", "decoder")}
    for side in ("encoder", "decoder"):
        heads, d_model = fields.get(f"{side}_heads"), fields.get("d_model")
        if type(heads) is int and type(d_model) is int and heads > 0 and d_model % heads == 0:
            fields.setdefault(f"{side}_head_width", d_model // heads)
    return fields
