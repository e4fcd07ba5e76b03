"""The files beside an ONNX graph that hold its weights, read from the graph itself: protobuf, walked without onnx."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kvx.runtime.bundle.files import open_regular

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SIZES = {FIXED64: 8, FIXED32: 4}
MOST_VARINT_BYTES = 10
DEEPEST = 64  # messages within each other

Buffer = bytes | mmap.mmap


class Message(NamedTuple):
    """A message of onnx.proto by the numbers of those fields that lead to external data; `entry` marks its entries."""

    fields: Mapping[int, str]
    entry: bool = False


# The messages and their field numbers are those of onnx.proto.
MESSAGES = {
    "model": Message({7: "graph", 20: "training", 25: "function"}),
    "training": Message({1: "graph", 2: "graph"}),
    "function": Message({7: "node", 11: "attribute"}),
    "graph": Message({1: "node", 5: "tensor", 15: "sparse"}),
    "node": Message({5: "attribute"}),
    "attribute": Message({5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}),
    "sparse": Message({1: "tensor", 2: "tensor"}),
    "tensor": Message({13: "entry"}),
    "entry": Message({}, entry=True),
}


def external_files(path: Path) -> set[str]:
    """The locations of external data that the graph in this file names. Raises OSError and ValueError."""
    with open_regular(path) as file:
        try:
            content: Buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # an empty file, or one of a file system that maps none
            content = file.read()
        return set(_locations(content, 0, len(content), "model", 0))


def _locations(content: Buffer, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("its messages are nested too deeply")
    message = MESSAGES[kind]
    if message.entry:
        strings = {number: content[first:last] for number, first, last in _fields(content, start, end)}
        if strings.get(1) == b"location":
            yield strings.get(2, b"").decode()
        return
    for number, first, last in _fields(content, start, end):
        if number in message.fields:
            yield from _locations(content, first, last, message.fields[number], depth + 1)


def _fields(content: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number and the place of every field of a message that has a length."""
    while position < end:
        key, position = varint(content, position, end)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            _, position = varint(content, position, end)
        elif wire == BYTES:
            length, position = varint(content, position, end)
            if length > end - position:
                raise ValueError("a field reaches beyond its message")
            yield number, position, position + length
            position += length
        elif wire in SIZES:
            position += SIZES[wire]
        else:
            raise ValueError(f"there is no wire type {wire}")


def varint(content: Buffer, position: int, end: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for shift in range(MOST_VARINT_BYTES):
        if position >= end:
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position
    raise ValueError("it ends within a number")
