"""The manifest: what a bundle is, what it holds and how it was proven. One JSON file, checked when it is read."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from kvx.runtime.bundle.files import LFS_POINTER, FileEntry, read_regular
from kvx.runtime.bundle.framing import Framing, Languages, SpecialIds
from kvx.runtime.bundle.graphs import (
    BEAMS_FILE,
    CHUNK_FILE,
    GRAPH_FILES,
    GRAPHS,
    LOOP_FILE,
    PROJECTION_FILE,
    SHORTLIST_FILE,
)
from kvx.runtime.bundle.model import upgraded
from kvx.runtime.bundle.precision import PRECISIONS, Precision, precision_named
from kvx.runtime.bundle.signature import CACHE_BITS, Dimensions, Signature, StepFeatures, cache_specs
from kvx.runtime.errors import BundleError

__all__ = [
    "BEAMS_FILE",
    "CHUNK_FILE",
    "FORMAT_VERSION",
    "GRAPH_FILES",
    "LARGEST_MANIFEST",
    "LOOP_FILE",
    "MANIFEST_FILE",
    "PROJECTION_FILE",
    "SHORTLIST_FILE",
    "FileEntry",
    "Manifest",
    "Precision",
]

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
LARGEST_MANIFEST = 16 * 2**20  # bytes
LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
MODEL_SIZES = (
    "source_vocab_size",
    "target_vocab_size",
    "d_model",
    "encoder_layers",
    "encoder_heads",
    "encoder_head_width",
    "encoder_d_ff",
    "decoder_layers",
    "decoder_heads",
    "decoder_head_width",
    "decoder_d_ff",
    "source_positions",
    "target_positions",
)


TOKENIZERS = ("source", "target")
PRODUCT_BITS = (None, 4, 7, 8)
DEFAULTABLE = (  # the options of a translation that a checkpoint may set
    "beam_size",
    "length_penalty",
    "early_stopping",
    "beam_rules",
    "no_repeated_ngrams",
    "min_new_tokens",
    "end_at_limit",
    "suppress",
    "banned",
)


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """One side's tokenizer: its kind, a row of the tokenizers' registry, and its files by what they are for."""

    kind: str
    files: Mapping[str, str]


SENTENCEPIECE_ENTRIES = {side: TokenizerEntry("sentencepiece", {"model": f"{side}.model"}) for side in TOKENIZERS}


@dataclass(frozen=True, slots=True)
class Default:
    """What an option of a translation is where it is not set, and which file of the checkpoint says so."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A bundle's description.

    `precision` names a row of PRECISIONS, `lowering` the operators of the ONNX graphs. `model` is the model's
    configuration, `family` what kind of checkpoint it comes from, `created` an ISO 8601 time in UTC, `max_new_tokens`
    the default limit of a translation, `framing` the ids around a text and `languages` those that it may be in,
    `tokenizers` those of "source" and "target", `defaults` how the checkpoint's owner would search, `features` what the
    decoder step has beyond the contract's core, `parity` the report of the proof or None without one, `product_bits`
    how many bits the weights of its products have where they are codes (8 where an older release did not say),
    `operators` the version of kvx's own operators where graphs have these.
    """

    created: str
    kvx_version: str
    model: Mapping[str, Any]
    precision: Precision
    lowering: str
    opset: int
    max_new_tokens: int
    framing: Framing
    files: Mapping[str, FileEntry]
    parity: Mapping[str, Any] | None
    features: StepFeatures = field(default_factory=StepFeatures)
    family: str = "reference"
    languages: Languages = field(default_factory=Languages)
    tokenizers: Mapping[str, TokenizerEntry] = field(default_factory=lambda: dict(SENTENCEPIECE_ENTRIES))
    defaults: Mapping[str, Default] = field(default_factory=dict)
    product_bits: int | None = None
    operators: int | None = None

    @property
    def dimensions(self) -> Dimensions:
        """L, H, D and V of the model, and the type of its keys and values."""
        return Dimensions.of_model(self.model, PRECISIONS[self.precision].element)

    @property
    def graphs(self) -> dict[str, Signature]:
        """The graphs that the bundle has, by name."""
        held = (graph for graph in GRAPHS if graph.is_in(self.files))
        return {graph.name: graph.signature(self.dimensions, self.features) for graph in held}

    @property
    def most_new_tokens(self) -> int:
        """The longest translation that the model has positions for, in tokens, eos included."""
        positions: int = self.model["target_positions"]
        return positions - len(self.framing.forced)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of which the bundle has a graph."""
        return tuple(name for name, files in GRAPH_FILES.items() if not self.files.keys().isdisjoint(files))

    def cache_bytes(self, *, target: int, source: int, cache_bits: int | None = None) -> int:
        """Cache bytes of one row with room for these numbers of target and source positions, with or without codes."""
        specs = cache_specs(self.dimensions, cache_bits=cache_bits)
        return sum(spec.bytes({"B": 1, "T": target, "S": source}) for spec in specs)

    def write(self, folder: Path) -> None:
        """Writes manifest.json into the folder."""
        (folder / MANIFEST_FILE).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the facts spelled out that other readers would have to derive."""
        fields = asdict(self)
        return {"format_version": FORMAT_VERSION, **fields, **self._derived()}

    def _check(self) -> None:
        """Raises KeyError or ValueError for values that no export writes."""
        wrong = [f"model.{name}" for name in MODEL_SIZES if not 1 <= self.model[name] <= LARGEST_SIZE]
        wrong += [f"model.{name}" for name in ("encoder_layers", "decoder_layers") if self.model[name] > MOST_LAYERS]
        if not 1 <= self.max_new_tokens <= self.most_new_tokens:
            wrong.append("max_new_tokens")
        sizes = self.model["source_vocab_size"], self.model["target_vocab_size"]
        wrong += [f"framing.{name}" for name in self.framing.problems(*sizes)]
        wrong += [f"languages.{name}" for name in self.languages.problems(*sizes)]
        wrong += [f"framing ({place} without a language)" for place in self._places_without_languages()]
        wrong += [
            f"tokenizers.{side} ({lost})" for side, entry in self.tokenizers.items() for lost in self._lost(entry)
        ]
        wrong += [f"defaults.{name}" for name in self.defaults if name not in DEFAULTABLE]
        if not self.formats:
            wrong.append("files (none of them is a graph)")
        if self.product_bits not in PRODUCT_BITS:
            wrong.append("product_bits")
        if type(self.operators) not in (int, type(None)):
            wrong.append("operators")
        if self.parity is not None and not _is_report(self.parity):
            wrong.append("parity")
        wrong += [f"features.{name}" for name in self._impossible_features()]
        wrong += [f"files.{name}" for name, entry in self.files.items() if not entry.is_plausible]
        datetime.datetime.fromisoformat(self.created)
        if wrong:
            raise ValueError(f"impossible {', '.join(wrong)}")

    def _places_without_languages(self) -> Iterator[str]:
        held = {"source_language": self.languages.source, "target_language": self.languages.target}
        return (place for place in self.framing.places if not held[place])

    def _lost(self, entry: TokenizerEntry) -> Iterator[str]:
        """What a tokenizer lacks among the files of the bundle."""
        return (f"{name} is not among the files" for name in entry.files.values() if name not in self.files)

    def _impossible_features(self) -> Iterator[str]:
        """The features that no step of this model has."""
        layer = self.features.attention
        if layer is not None and (type(layer) is not int or not 0 <= layer < self.model["decoder_layers"]):
            yield "attention"
        flags = ("query_tokens", "source_presents", "shared_sources", "shortlist", "looped")
        yield from (name for name in flags if type(getattr(self.features, name)) is not bool)
        if self.features.cache_bits not in CACHE_BITS:
            yield "cache_bits"
        if self.features.forced != len(self.framing.forced):
            yield "forced"

    def _derived(self) -> dict[str, Any]:
        return {
            "formats": list(self.formats),
            "limits": {
                "source_positions": self.model["source_positions"],
                "target_positions": self.model["target_positions"],
                "cache_bytes_per_source_token": self.cache_bytes(target=0, source=1),
                "cache_bytes_per_target_token": self.cache_bytes(target=1, source=0),
            },
            "graphs": {name: _signature_to_dict(signature) for name, signature in self.graphs.items()},
        }

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the bundle in `folder`. Raises BundleError where it is missing, damaged or newer."""
        path = folder / MANIFEST_FILE
        try:
            content = read_regular(path, LARGEST_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_manifest(folder) from None
        except (OSError, ValueError) as error:
            raise _damaged(folder, f"cannot be read ({error})") from None
        if len(content) > LARGEST_MANIFEST:
            raise _damaged(folder, f"is larger than {LARGEST_MANIFEST} bytes")
        try:
            values = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise (
                lfs_pointer(path) if content.startswith(LFS_POINTER) else _damaged(folder, f"cannot be read ({error})")
            ) from None
        if not isinstance(values, dict):
            raise _damaged(folder, "is not an object")
        return cls._from_dict(values, folder)

    @classmethod
    def _from_dict(cls, values: dict[str, Any], folder: Path) -> Self:
        version = values.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise _damaged(folder, "has no format_version")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{folder} has format version {version}",
                expected=f"version {FORMAT_VERSION} at most",
                remedy="Upgrade kvx, or export the checkpoint with this version.",
            )
        try:
            values = values if version > 1 else _upgraded(values)
            manifest = cls(
                created=str(values["created"]),
                kvx_version=str(values["kvx_version"]),
                model=_model(values["model"]),
                precision=precision_named(values["precision"]),
                lowering=str(values["lowering"]),
                opset=int(values["opset"]),
                max_new_tokens=int(values["max_new_tokens"]),
                framing=Framing.from_dict(values["framing"]),
                family=str(values["family"]),
                languages=Languages.from_dict(values["languages"]),
                tokenizers={side: _tokenizer(values["tokenizers"][side]) for side in TOKENIZERS},
                defaults={str(name): Default(**_known(Default, one)) for name, one in values["defaults"].items()},
                files={str(name): FileEntry(**_known(FileEntry, entry)) for name, entry in values["files"].items()},
                parity=values["parity"],
                features=_features(values["features"]),
                product_bits=values.get("product_bits"),  # earlier releases did not say
                operators=values.get("operators"),
            )
            manifest._check()
            derived = json.loads(json.dumps(manifest._derived()))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _damaged(folder, f"lacks or garbles a field ({type(error).__name__}: {error})") from None
        contradicted = [name for name, value in derived.items() if not _agrees(values.get(name), value)]
        if contradicted:
            raise _damaged(folder, f"contradicts itself in {' and '.join(contradicted)}")
        return manifest


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a dataclass has fields for: later releases may write more."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 in the terms of format 2: bos and eos around a text, two sentencepiece models, one kind of model."""
    ids = (SpecialIds(**_known(SpecialIds, values[name])) for name in ("source_ids", "target_ids"))
    tokenizers = {side: asdict(entry) for side, entry in SENTENCEPIECE_ENTRIES.items()}
    return {
        **values,
        "model": upgraded(values["model"]),
        "framing": asdict(Framing.plain(*ids)),
        "languages": asdict(Languages()),
        "tokenizers": tokenizers,
        "family": "reference",
        "defaults": {},
    }


def _model(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, whose sizes are whole numbers; what its parts are the graphs know."""
    return {str(name): int(value) if name in MODEL_SIZES else value for name, value in values.items()}


def _tokenizer(values: Mapping[str, Any]) -> TokenizerEntry:
    files = {str(role): str(name) for role, name in values["files"].items()}
    return TokenizerEntry(str(values["kind"]), files)


def _features(values: Mapping[str, Any]) -> StepFeatures:
    """The features of the step. One that this release does not know must be switched off: else it cannot run."""
    known = _known(StepFeatures, values)
    unknown = [name for name, value in values.items() if name not in known and value not in (False, None)]
    if unknown:
        raise ValueError(f"unknown features {', '.join(unknown)}")
    return StepFeatures(**known)


def _agrees(written: object, derived: object) -> bool:
    """Whether everything derived was written so. More may have been written beside it."""
    if not isinstance(derived, dict):
        return written == derived
    return isinstance(written, dict) and all(
        name in written and _agrees(written[name], value) for name, value in derived.items()
    )


def _is_report(parity: Mapping[str, Any]) -> bool:
    """Whether this is a parity report as an export writes it."""
    texts = ("backend", "name", "detail")
    return (
        type(parity.get("passed")) is bool
        and type(parity.get("tolerance")) is float
        and isinstance(parity.get("checks"), list)
        and all(
            isinstance(check, dict)
            and all(isinstance(check.get(name), str) for name in texts)
            and type(check.get("passed")) is bool
            and isinstance(check.get("differences"), dict)
            and all(value is None or isinstance(value, (int, float)) for value in check["differences"].values())
            for check in parity["checks"]
        )
    )


def _signature_to_dict(signature: Signature) -> dict[str, Any]:
    return {
        side: [{"name": spec.name, "type": spec.dtype, "axes": list(spec.axes)} for spec in specs]
        for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }


def lfs_pointer(path: Path) -> BundleError:
    """The error for a pointer that Git LFS has left in the place of a file."""
    return BundleError(
        f"{path} is a pointer of Git LFS, not the file itself",
        expected="the file that kvx export wrote",
        remedy="Fetch it with git lfs pull.",
    )


def _no_manifest(folder: Path) -> BundleError:
    """The error for a path that is no bundle, or that leads to a file of one."""
    if folder.is_file() and (folder.parent / MANIFEST_FILE).is_file():
        return BundleError(
            f"{folder} is a file of a bundle",
            expected="the path of a bundle's folder",
            remedy=f"Name the folder itself: {folder.parent}",
        )
    return BundleError(
        f"{folder} holds no {MANIFEST_FILE}",
        expected="a bundle written by kvx export",
        remedy="Check the path, or export a checkpoint first.",
    )


def _damaged(folder: Path, how: str) -> BundleError:
    return BundleError(
        f"{folder / MANIFEST_FILE} {how}",
        expected="the manifest that kvx export wrote",
        remedy="Copy the bundle again, or export the checkpoint again.",
    )
