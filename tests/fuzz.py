"""Hostile input, drawn from a seed: from each case comes a result or a KvxError.

    python -m kvx.tests.fuzz KIND FIRST COUNT BUNDLE

Runs cases FIRST … FIRST + COUNT − 1 of a kind in this process, under a limit of memory, and prints the number of each
case before it and its outcome after it. tests/test_fuzz.py watches over the process: a case may also crash or hang it.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvx import KvxError, TranslateOptions, Translator
from kvx.runtime.bundle.description import describe
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE, FileEntry
from kvx.runtime.options import TranslateKeywords
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary

if TYPE_CHECKING:
    from onnx import GraphProto

MEMORY = 8 * 2**30  # bytes of address space
TEXTS = ["one", "twelve thousand and four"]
Random = np.random.Generator
Case = Callable[[Random, Path, Path], None]

NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.0, 1e300, math.inf, math.nan)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, "", "x", "0.7", "../x", "\0", "é" * 300, b"bytes", [], [1, 2], [[]], (), {}, {"a": 1}),
    *(object(), int, np.float32(1), np.int64(3), np.array([1, 2]), np.array([]), lambda *values: None, range(3)),
)
PLAUSIBLE: tuple[Any, ...] = (1, 2, 3, 0.5, 1.0, True, False, None, "one", ("eins",), [5], "error", "truncate")
SIDES: tuple[Literal["source", "target"], ...] = ("source", "target")
CHARACTERS = "aeiou ntrs\t\r\n\0\x07\x1b\u00ad\u0301\u200b\u200d\u202e\ufe0f\ufeff\ufffd\uffff\ud800\udfff\ue000"
EXTREMES = [b"\0" * 8, b"\xff" * 8, (2**31).to_bytes(8, "little"), (2**63 - 1).to_bytes(8, "little"), b"\x80" * 12]


def damaged(data: bytes, random: Random) -> bytes:
    """A few edits of bytes: flipped, cut out, put in, repeated, overwritten with extremes, cut off."""
    content = bytearray(data)
    for _ in range(random.integers(1, 5)):
        start = int(random.integers(0, len(content) + 1))
        size = int(random.integers(1, 64))
        match int(random.integers(0, 6)):
            case 0 if start < len(content):
                content[start] ^= 1 << int(random.integers(0, 8))
            case 1:
                del content[start : start + size]
            case 2:
                content[start:start] = random.bytes(size)
            case 3:
                content[start:start] = content[start : start + size]
            case 4:
                extreme = EXTREMES[random.integers(len(EXTREMES))]
                content[start : start + len(extreme)] = extreme
            case _ if random.random() < 0.2:
                del content[start:]
    return bytes(content)


def altered(value: object, random: Random) -> object:
    """A JSON value with one node replaced, removed or added, wherever it is."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        names = list(value)
        name = names[random.integers(len(names))]
        match int(random.integers(0, 8)):
            case 0:
                return {other: one for other, one in value.items() if other != name}
            case 1:
                return {**value, "unknown": drawn_json(random)}
            case _:
                return {**value, name: altered(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        place = int(random.integers(len(value)))
        return [*value[:place], altered(value[place], random), *value[place + 1 :]]
    return drawn_json(random)


def drawn_json(random: Random) -> object:
    """Anything that JSON, as Python reads it, may hold."""
    plain = [value for value in VALUES if isinstance(value, int | float | str | list | dict | None)]
    return plain[random.integers(len(plain))]


def write_manifest(bundle: Path, *names: str) -> None:
    """Makes the hashes of these files right."""
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    for name in names:
        values["files"][name] = asdict(FileEntry.of(bundle / name))
    (bundle / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")


def use(bundle: Path) -> None:
    """What a user does with a bundle."""
    list(describe(Bundle.open(bundle)))
    translator = Translator.load(bundle, threads=1)
    translator.translate(TEXTS, max_new_tokens=6)
    translator.translate(TEXTS, max_new_tokens=6, beam_size=2, scores=True)
    translator.score(TEXTS, ["eins", "zwölf"])


def of_bytes(random: Random, bundle: Path, folder: Path) -> None:
    """One file of a bundle is damaged; mostly the manifest vouches for it."""
    names = sorted(path.name for path in bundle.iterdir())
    name = names[random.integers(len(names))]
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), random))
    if name != MANIFEST_FILE and random.random() < 0.9:
        write_manifest(folder, name)
    use(folder)


def of_manifests(random: Random, bundle: Path, folder: Path) -> None:
    """The manifest says something else."""
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    for _ in range(random.integers(1, 3)):
        values = altered(values, random)
    (folder / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    use(folder)


def of_graphs(random: Random, bundle: Path, folder: Path) -> None:
    """A graph is another one, which is still a graph, and the manifest vouches for it."""
    import onnx

    names = sorted(path.name for path in bundle.glob("*.onnx"))
    name = names[random.integers(len(names))]
    model = onnx.load(folder / name, load_external_data=False)
    for _ in range(random.integers(1, 3)):
        _change_graph(model.graph, random)
    (folder / name).write_bytes(model.SerializeToString())
    write_manifest(folder, name)
    use(folder)


def _change_graph(graph: GraphProto, random: Random) -> None:
    nodes, tensors = graph.node, graph.initializer
    node, other = (nodes[random.integers(len(nodes))] for _ in range(2))
    tensor = tensors[random.integers(len(tensors))]
    match int(random.integers(0, 8)):
        case 0:
            nodes.remove(node)
        case 1:
            node.op_type = other.op_type
        case 2 if node.input and other.output:
            node.input[random.integers(len(node.input))] = other.output[0]
        case 3 if node.attribute:
            attribute = node.attribute[random.integers(len(node.attribute))]
            attribute.i = int(random.choice([-1, 0, 2, 2**31, 2**62]))
        case 4 if tensor.dims:
            tensor.dims[random.integers(len(tensor.dims))] = int(random.choice([-1, 0, 1, 3, 2**20, 2**40]))
        case 5 if tensor.external_data:
            entry = tensor.external_data[random.integers(len(tensor.external_data))]
            entry.value = str(
                random.choice(["-1", "0", "4096", str(2**62), "x", "/etc/passwd", "../x", "manifest.json"])
            )
        case 6:
            tensor.data_type = int(random.integers(0, 25))
        case _:
            value = graph.input[random.integers(len(graph.input))]
            value.type.tensor_type.elem_type = int(random.integers(0, 25))


def of_tokenizers(random: Random, bundle: Path, folder: Path) -> None:
    """A sentencepiece model is damaged, or has other pieces, and the manifest vouches for it."""
    from sentencepiece import sentencepiece_model_pb2 as pieces

    name = ("source.model", "target.model")[random.integers(2)]
    data = (folder / name).read_bytes()
    if random.random() < 0.5:
        data = damaged(data, random)
    else:
        model = pieces.ModelProto.FromString(data)  # type: ignore[attr-defined]
        piece = model.pieces[random.integers(len(model.pieces))]
        piece.piece = ["", "a", "▁", "\0", "<0x00>", "a" * 5000][random.integers(6)]
        piece.type = int(random.integers(1, 7))
        data = model.SerializeToString()
    (folder / name).write_bytes(data)
    write_manifest(folder, name)
    use(folder)


def of_shortlists(random: Random, bundle: Path, folder: Path) -> None:
    """A shortlist is damaged, or one of its arrays is another."""
    file, manifest = folder / "list.npz", Bundle.open(bundle).manifest
    source, target = (Vocabulary.of(manifest, side) for side in SIDES)
    offsets = np.arange(source.size + 1)
    targets = np.arange(source.size, dtype=np.int32) % target.size
    Shortlist(source, target, offsets, targets, targets[:3]).write(file)
    if random.random() < 0.5:
        file.write_bytes(damaged(file.read_bytes(), random))
    else:
        arrays = dict(np.load(file))
        arrays[sorted(arrays)[random.integers(len(arrays))]] = _drawn_array(random)
        np.savez(file, **arrays)
    _loaded(bundle).translate(TEXTS, shortlist=file, max_new_tokens=4)


def _drawn_array(random: Random) -> NDArray[Any]:
    kinds = [np.int64, np.int32, np.uint8, np.float32, np.float64, np.bool_]
    shape = random.integers(0, 5, random.integers(0, 3))
    return random.integers(-3, 90, shape).astype(kinds[random.integers(len(kinds))])


def of_checkpoints(random: Random, bundle: Path, folder: Path) -> None:
    """A checkpoint is damaged."""
    from kvx.models.importers import load_checkpoint

    file = folder / "model.pt"
    file.write_bytes(damaged(file.read_bytes(), random))
    load_checkpoint(file)


def of_texts(random: Random, bundle: Path, folder: Path) -> None:
    """Characters of every kind."""
    translator = _loaded(bundle)
    characters = list(CHARACTERS if random.random() < 0.3 else CHARACTERS.replace("\ud800\udfff", ""))
    texts = ["".join(random.choice(characters, random.integers(0, 40))) for _ in range(3)]
    for one in translator.translate(texts, max_new_tokens=6, on_long="truncate"):
        one.text.encode("utf-8")


def of_options(random: Random, bundle: Path, folder: Path) -> None:
    """Options with values of every type."""
    names = sorted({*TranslateKeywords.__annotations__, "num_beams"} - {"filters"})
    chosen = random.choice(names, random.integers(1, 4), replace=False)
    values = VALUES if random.random() < 0.5 else PLAUSIBLE
    given: dict[str, Any] = {str(name): values[random.integers(len(values))] for name in chosen}
    options = TranslateOptions(**given)
    if not (options.search.beams > 8 or options.search.samples > 8):
        _loaded(bundle).translate(TEXTS, options.changed(max_new_tokens=options.max_new_tokens or 4))


def _loaded(bundle: Path) -> Translator:
    if bundle not in _translators:
        _translators[bundle] = Translator.load(bundle, threads=1)
    return _translators[bundle]


_translators: dict[Path, Translator] = {}
KINDS: dict[str, Case] = {
    "bytes": of_bytes,
    "manifests": of_manifests,
    "graphs": of_graphs,
    "tokenizers": of_tokenizers,
    "shortlists": of_shortlists,
    "checkpoints": of_checkpoints,
    "texts": of_texts,
    "options": of_options,
}


def run(kind: str, number: int, bundle: Path) -> str:
    """The outcome of a case in a word, or a traceback."""
    random = np.random.default_rng([number, sorted(KINDS).index(kind)])
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(bundle, Path(folder) / "bundle")
        try:
            KINDS[kind](random, bundle, copied)
        except KvxError as error:
            str(error).encode("utf-8")
            return type(error).__name__
        except Exception:
            return traceback.format_exc()
    return "result"


def main(arguments: list[str]) -> None:
    """See above."""
    kind, first, count, bundle = arguments[0], int(arguments[1]), int(arguments[2]), Path(arguments[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, first + count):
        print(json.dumps([number]), flush=True)
        print(json.dumps([number, run(kind, number, bundle)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
