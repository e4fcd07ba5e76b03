"""State dicts of one's own models, by a file that names their parts and their tensors.

[model]                        # fields of ModelConfig: all that no tensor tells
heads = 8
block = "post"
norm = "layer"
norm_epsilon = 1e-5
positions = "interleaved"
source_positions = 1024        # and target_positions, where the tables of positions are not in the file
target_positions = 1024
scaled_embedding = true
activation = "relu"

[tensors]                      # ours = theirs; {} is the number of a layer
"source_embedding.tokens.weight" = "src_embedding.weight"
"encoder_layers.{}.self_attention.query.weight" = "encoder.layers.{}.self_attn.in_proj_weight, part 1 of 3"

[ignored]
tensors = ["encoder.layers.{}.mask"]

[text]                         # where it is no pair of sentencepiece models with bos and eos
source = "vocabulary.de"       # a piece a line, in the order of their ids
target = "vocabulary.en"
start = "<bos>"
end = "<eos>"
pad = "<pad>"
unknown = "<unk>"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.checkpoint import (
    MOST_UNASKED,
    NAMED_PROBLEMS,
    Checkpoint,
    build,
    describe,
    is_plain,
    is_same,
    is_state_dict,
    refuse_file,
)
from kvx.models.importers.naming import SIDES, count_layers, size
from kvx.models.importers.subwords import read_lines
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.models.importers.tokenizer_settings import read_bounded, refuse_tokens
from kvx.models.layers import SINUSOIDS
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.vocabulary import Vocabulary
from kvx.runtime.errors import TokenizerError, listed

MOST_BYTES = 1 << 20
MOST_PARTS = 64
REFERENCE = re.compile(
    r"(?P<name>[^,]+)(?:, part (?P<part>\d{1,3}) of (?P<parts>\d{1,3}))?(?P<transposed>, transposed)?"
)
TABLES = {side: f"{table}_embedding.tokens.weight" for side, table in SIDES.items()}
POSITIONS = {side: f"{table}_embedding.positions" for side, table in SIDES.items()}
HEAD = "head.weight"
TOLD = ("block", "norm", "norm_epsilon", "positions", "scaled_embedding", "activation")
SPECIAL = ("start", "end", "pad", "unknown")
TEXT_KEYS = {"source", "target", *SPECIAL}


class Reference(NamedTuple):
    """One tensor of a file, or a part of it along its first axis, counted from 1; perhaps to be transposed."""

    name: str
    part: int = 1
    parts: int = 1
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """What of it is meant."""
        size = tensor.shape[0] // self.parts
        taken = tensor if self.parts == 1 else tensor[size * (self.part - 1) : size * self.part]
        return taken.T if self.transposed else taken


@dataclass(frozen=True, slots=True)
class Layout:
    """What a layout file says: fields of the configuration, our names to references, patterns of tensors without a
    meaning, and the vocabularies. Raises CheckpointError.
    """

    path: Path
    model: Mapping[str, Any]
    tensors: Mapping[str, Reference]
    ignored: tuple[str, ...] = ()
    text: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The layout in a file."""
        try:
            values = tomllib.loads(read_bounded(path, MOST_BYTES).decode())
        except (ValueError, RecursionError) as error:  # of TOML, of Unicode, of numbers of too many digits
            _refuse(path, f"is no TOML ({str(error)[:120]})", "a file as kvx export --write-layout drafts it")
        unknown = values.keys() - {"model", "tensors", "ignored", "text"}
        sections = [values.get(name, {}) for name in ("model", "tensors", "ignored", "text")]
        if unknown or not all(isinstance(section, dict) for section in sections):
            _refuse(
                path,
                f"has {', '.join(sorted(unknown)) or 'values'} at its top",
                "[model], [tensors], [ignored], [text]",
            )
        model, tensors, ignored, text = sections
        if ignored.keys() - {"tensors"} or text.keys() - TEXT_KEYS:
            odd = sorted((ignored.keys() - {"tensors"}) | (text.keys() - TEXT_KEYS))
            _refuse(
                path, f"has {', '.join(odd)}", f"`tensors` in [ignored], and {', '.join(sorted(TEXT_KEYS))} in [text]"
            )
        apart = ignored.get("tensors", [])
        named = (*tensors.values(), *text.values(), *(apart if isinstance(apart, list) else [apart]))
        if not isinstance(apart, list) or not all(isinstance(value, str) for value in named):
            _refuse(path, "has values that are no text", "names of tensors and files")
        references = {ours: _reference(path, ours, value) for ours, value in tensors.items()}
        _check_parts(path, references)
        return cls(path, _checked(path, model), references, tuple(apart), text)


def read(layout: Layout, content: object, path: Path) -> Checkpoint:
    """The model of a state dict by a layout. Raises CheckpointError and TokenizerError."""
    if not is_state_dict(content):
        _refuse(path, f"holds {describe(content)}", "a state dict: tensors by name", "Save model.state_dict().")
    state, names = _named(layout, content, path)
    _complete_tables(state)
    config = _config(layout, path, state)
    for side, name in POSITIONS.items():
        _complete_positions(state, name, getattr(config, f"{SIDES[side]}_positions"), config)
    model = build(config, state, path, names)
    text = _read_text(layout, path.parent, config) if layout.text else None
    limit = min(MOST_UNASKED, config.target_positions)
    return Checkpoint(model, limit, (), family="layout", text=text)


def _checked(path: Path, model: Mapping[str, Any]) -> Mapping[str, Any]:
    """[model], which must say all that no tensor tells. Raises CheckpointError."""
    missing = [name for name in TOLD if name not in model]
    if not {"encoder_heads", "decoder_heads"} <= model.keys() and "heads" not in model:
        missing.insert(0, "heads")
    if missing:
        _refuse(path, f"has no {', '.join(missing)} in [model]", "all that no tensor tells")
    return model


def _reference(path: Path, ours: str, value: str) -> Reference:
    match = REFERENCE.fullmatch(value)
    part, parts = (int(match[name] or 1) if match else 0 for name in ("part", "parts"))
    if match is None or not 1 <= part <= parts <= MOST_PARTS:
        _refuse(path, f"refers to {value!r:.100}", "NAME, or NAME, part 1 of 3, or either with “, transposed” after it")
    name = match["name"].strip()
    if ours.count("{}") != min(1, name.count("{}")):
        _refuse(path, f"maps {ours!r:.80} to {name!r:.80}", "{} once in both, or in neither")
    return Reference(name, part, parts, match["transposed"] is not None)


def _check_parts(path: Path, references: Mapping[str, Reference]) -> None:
    """Every part of a tensor that is taken in parts has one place. Raises CheckpointError."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for one in references.values():
        taken.setdefault(one.name, []).append((one.part, one.parts))
    for name, parts in taken.items():
        number = parts[0][1]
        if number > 1 and sorted(parts) != [(part, number) for part in range(1, number + 1)]:
            _refuse(path, f"does not take every part of {name!r:.80} once", f"parts 1 to {number}, each once")


def _named(layout: Layout, tensors: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by our names, and theirs for messages. Raises CheckpointError for patterns without tensors and for
    tensors without a pattern.
    """
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    used: set[str] = set()
    idle = []
    for ours, reference in layout.tensors.items():
        matched = dict(_matches(reference.name, tensors))
        if not matched:
            idle.append(reference.name)
        for number, theirs in matched.items():
            name = ours.replace("{}", number)
            names[name] = theirs
            used.add(theirs)
            tensor = tensors[theirs]
            cut = is_plain(tensor) and tensor.ndim > 0 and tensor.shape[0] % reference.parts == 0
            found[name] = reference.of(tensor) if cut else tensor
    for pattern in layout.ignored:
        matched = dict(_matches(pattern, tensors))
        if not matched:
            idle.append(pattern)
        used.update(matched.values())
    left = [name for name in tensors if name not in used]
    if idle or left:
        _refuse_names(layout, path, idle, left)
    return found, names


def _matches(pattern: str, tensors: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The numbers of layers and the names of tensors that fit a pattern."""
    wanted = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)", 1).replace(r"\{\}", r"\1"))
    for name in tensors:
        if match := wanted.fullmatch(name):
            yield (match[1] if wanted.groups else ""), name


def _refuse_names(layout: Layout, path: Path, idle: list[str], left: list[str]) -> NoReturn:
    problems = []
    for what, names in (("patterns that fit no tensor", idle), ("tensors that fit no pattern", left)):
        if names:
            shown = listed(names, NAMED_PROBLEMS)
            problems.append(f"{len(names)} {what}: {shown}")
    _refuse(
        layout.path,
        f"does not describe {path}: {'; '.join(problems)}",
        "a pattern for each tensor, and a tensor for each pattern",
        "Correct [tensors], and list under [ignored] what has no meaning for a translation.",
    )


def _complete_tables(state: dict[str, Any]) -> None:
    """What is missing is tied, and what is equal is one."""
    source, target = (state.get(name) for name in TABLES.values())
    if target is None or is_same(source, target):
        target = state[TABLES["decoder"]] = source
    head = state.get(HEAD)
    if head is None or is_same(head, target):
        state[HEAD] = target


def _complete_positions(state: dict[str, Any], name: str, rows: int, config: ModelConfig) -> None:
    """Sinusoids that were not saved, and tables with an axis of one."""
    table = state.get(name)
    if table is None and config.positions in SINUSOIDS:
        state[name] = SINUSOIDS[config.positions](rows, config.d_model)
    elif isinstance(table, Tensor) and table.ndim == 3:
        state[name] = table.squeeze(0) if table.shape[0] == 1 else table.squeeze(1)


def _config(layout: Layout, path: Path, state: Mapping[str, Any]) -> ModelConfig:
    """What the tensors tell, and over it what the layout says."""
    source, target = (state.get(name) for name in TABLES.values())
    told: dict[str, object] = {
        "source_vocab_size": size(source, 0),
        "target_vocab_size": size(target, 0),
        "d_model": size(source, 1),
        "attention_bias": "encoder_layers.0.self_attention.query.bias" in state,
        "feed_forward_bias": "encoder_layers.0.feed_forward.up.bias" in state,
        "gated": "encoder_layers.0.feed_forward.gate.weight" in state,
        "embedding_norm": "source_embedding_norm.gamma" in state,
        "final_norm": "decoder_norm.gamma" in state,
        "head_bias": "head.bias" in state,
        "shared_embeddings": source is target,
        "tied_head": state.get(HEAD) is target,
    }
    for side, table in SIDES.items():
        told[f"{side}_layers"] = count_layers(state, f"{side}_layers.{{}}")
        told[f"{side}_d_ff"] = size(state.get(f"{side}_layers.0.feed_forward.up.weight"), 0)
        positions = state.get(POSITIONS[side])
        if isinstance(positions, Tensor):
            told[f"{table}_positions"] = max(positions.shape[:-1], default=1)
    said = dict(layout.model)
    heads = said.pop("heads", None)
    both = {} if heads is None else {f"{side}_heads": heads for side in SIDES}
    values = {**told, **both, **said}
    unsaid = [name for name in ("source_positions", "target_positions") if name not in values]
    if unsaid:
        _refuse(layout.path, f"has no {' and no '.join(unsaid)}, and {path} has no such tables", "them in [model]")
    return ModelConfig.from_dict(values)


def _read_text(layout: Layout, folder: Path, config: ModelConfig) -> Text:
    """Vocabularies of words, a piece a line."""
    missing = sorted(TEXT_KEYS - layout.text.keys())
    if missing:
        _refuse(layout.path, f"has no {', '.join(missing)} in [text]", f"{', '.join(sorted(TEXT_KEYS))}, or no [text]")
    sizes = {"source": config.source_vocab_size, "target": config.target_vocab_size}
    pieces = {side: _read_pieces(folder / layout.text[side], size) for side, size in sizes.items()}
    ids = {
        side: {name: _id(folder / layout.text[side], held, layout.text[name]) for name in SPECIAL}
        for side, held in pieces.items()
    }
    source, target = ids["source"], ids["target"]
    if source["pad"] != target["pad"]:
        source = {**source, "pad": source["end"]}
    framing = Framing(
        prefix=(source["start"],), suffix=(source["end"],), start=target["start"], eos=target["end"], pad=source["pad"]
    )
    vocabularies = {
        side: Vocabulary(tuple(held), frozenset(ids[side].values()), ids[side]["unknown"])
        for side, held in pieces.items()
    }
    files = [TokenizerFiles("words", {"vocabulary": held.to_bytes()}) for held in vocabularies.values()]
    return Text(files[0], files[1], framing, Languages(), ("texts are cut at white space, as the layout says",))


def _read_pieces(path: Path, size: int) -> list[str]:
    pieces = read_lines(path)
    if len(pieces) != size:
        raise TokenizerError(
            f"{path} has {len(pieces)} lines",
            expected=f"{size}, the rows of the model's embedding",
            remedy="Write a piece a line, in the order of their ids.",
        )
    seen: set[str] = set()
    twice = [piece for piece in pieces if piece in seen or seen.add(piece)]  # type: ignore[func-returns-value]
    if twice:
        refuse_tokens(path, "pieces that come twice", twice, "each piece once", "Write the vocabulary again.")
    return pieces


def _id(path: Path, pieces: list[str], piece: str) -> int:
    if piece not in pieces:
        refuse_tokens(path, "special pieces missing", [piece], "the pieces that [text] names", "Correct the layout.")
    return pieces.index(piece)


def _refuse(path: Path, got: str, expected: str, remedy: str = "Correct the layout.") -> NoReturn:
    refuse_file(path, got, expected, remedy)
