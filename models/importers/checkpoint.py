"""What every importer shares: the file that is read, the model that is built, every tensor accounted for.

Files are read with `weights_only=True`: nothing in them is ever executed.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from kvx.models.config import ModelConfig
from kvx.models.importers.text import Text
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.manifest import Default
from kvx.runtime.errors import CheckpointError, listed

StateDict = Mapping[str, Tensor]

SETTINGS = (  # what may be in a file beside tensors and plain values: settings, and vocabularies of OpenNMT-py
    "argparse.Namespace",
    "functools.partial",
    "onmt.inputters.text_dataset.TextMultiField",
    "onmt.inputters.text_dataset._feature_tokenize",
    *(
        f"torchtext.{legacy}{name}"
        for legacy in ("", "legacy.")
        for name in ("data.field.Field", "data.field.RawField", "vocab.Vocab", "vocab._default_unk_index")
    ),
)
NAMED_PROBLEMS = 10
MOST_UNASKED = 256  # tokens of a translation, where a checkpoint has no limit of its own
LONGEST_PROBLEM = 200  # characters: names in a file may be of any length


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready for inference, with what its file says beyond the weights.

    `max_new_tokens` is the default limit of a translation, in tokens after those that are given, eos included. `notes`
    are sentences about what had to be assumed, with options in backticks. `family` is what kind of checkpoint it is;
    `text` its tokenizers, framing and languages, where they come with it; `defaults` how its owner searches.
    """

    model: Transformer
    max_new_tokens: int
    notes: tuple[str, ...] = ()
    family: str = "reference"
    text: Text | None = None
    defaults: Mapping[str, Default] = field(default_factory=dict)


class Settings:
    """Stands for an object of another package, such as its settings: the values that it holds, and nothing that it
    could do. What it is made with is dropped.
    """

    __module__ = "kvx.stand_in"

    def __new__(cls, *values: object, **named: object) -> Settings:
        """An empty one."""
        return super().__new__(cls)

    def __init__(self, *values: object, **named: object) -> None:
        """Nothing is kept."""

    def __setstate__(self, state: object) -> None:
        """Takes the values that have names."""
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


def _plain_dict(*values: object) -> dict[object, object]:
    """What stands for a dict that would call something for what it lacks."""
    return {}


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Settings, name) for name in SETTINGS),
    (_plain_dict, "collections.defaultdict"),
]


def read_file(path: Path, *, mapped: bool = False) -> object:
    """What a file written by torch.save holds, its tensors `mapped` into memory where the format allows it. Raises
    CheckpointError for anything that could run code.
    """
    missing = _why_no_file(path)
    if missing is not None:
        raise CheckpointError(f"{path} {missing}", expected="a checkpoint file", remedy="Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            mapped = mapped and zipfile.is_zipfile(path)  # torch maps no older format
            with torch.serialization.safe_globals(STAND_INS):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what an unpickler makes of a damaged file can be any exception
        code = re.search(r"(?:unsupported|Unsupported)[\w :]* (?:GLOBAL|class) ([\w.]+)", str(error))
        if code and not _ends_with(path, code[1].rpartition(".")[2]):
            raise CheckpointError(
                f"{path} carries code ({code[1]}) and is refused, because loading it could run anything",
                expected="tensors and plain values only",
                remedy="Save model.state_dict() instead of the model or the training state.",
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged or no PyTorch file ({_first_line(error)})",
            expected="a file written by torch.save",
            remedy="Copy or save the checkpoint again.",
        ) from None


def _why_no_file(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is not there"
    except (OSError, ValueError) as error:  # a link to itself, a name that cannot be one
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder" if stat.S_ISDIR(mode) else "is a device or a pipe"


def _ends_with(path: Path, name: str) -> bool:
    """Whether the file ends in the middle of this name: then it was cut, and nobody knows what it was."""
    with path.open("rb") as file:
        file.seek(-min(len(name), path.stat().st_size), os.SEEK_END)
        return file.read() == name.encode()


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The tensors of a model by name, without making any."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def build(config: ModelConfig, state: StateDict, path: Path, names: Mapping[str, str] | None = None) -> Transformer:
    """The model with these weights. `names` maps ours to the file's own, for messages.

    Raises CheckpointError that names what is missing, unexpected, of another shape or not finite.
    """
    expected = expected_shapes(config)
    names = names or {}
    problems = [f"missing {names.get(name, name)}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{names.get(name, name)} of {describe(state[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and not _fits(state[name], shape)
    ]
    plain = {name: state[name] for name, shape in expected.items() if _fits(state.get(name), shape)}
    converted = {id(tensor): _as_float(tensor) for tensor in plain.values()}  # one that is tied has several names
    read = {name: converted[id(tensor)] for name, tensor in plain.items()}
    finite = {one for one, tensor in converted.items() if tensor is not None and bool(tensor.isfinite().all())}
    fitting = {name: tensor for name, tensor in read.items() if tensor is not None and id(plain[name]) in finite}
    problems += [
        f"{names.get(name, name)} with values that {'cannot be read' if tensor is None else 'are not finite'}"
        for name, tensor in read.items()
        if name not in fitting
    ]
    if problems:
        refuse_tensors(path, problems)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(fitting, assign=True)
    model.tie()
    return model.eval().requires_grad_(requires_grad=False)


def is_same(one: object, other: object) -> bool:
    """Whether two values are one tensor, or tensors with the very same values: then they are tied."""
    if not (is_plain(one) and is_plain(other)) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one is other or one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def is_state_dict(content: object) -> TypeGuard[StateDict]:
    """Whether these are tensors by name."""
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    return named and all(isinstance(one, Tensor) for one in content.values())  # type: ignore[attr-defined]


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor with a shape and values of its own: not nested, sparse or without data."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_nested


def _fits(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and is_plain(value) and value.shape == shape and value.is_floating_point()


def _as_float(tensor: Tensor) -> Tensor | None:
    """The values as float32, or None for a type that torch can store but not convert."""
    try:
        return tensor.float()
    except RuntimeError:
        return None


def refuse_file(path: Path, got: str, expected: str, remedy: str = "Copy the whole folder again.") -> NoReturn:
    """Raises CheckpointError about what a file is or holds."""
    raise CheckpointError(f"{path} {got}", expected=expected, remedy=remedy)


def refuse_tensors(path: Path, problems: Sequence[str]) -> NoReturn:
    """Raises CheckpointError that counts all problems and names the first."""
    named = [one if len(one) <= LONGEST_PROBLEM else f"{one[:LONGEST_PROBLEM]}…" for one in problems]
    shown = listed(named, NAMED_PROBLEMS)
    raise CheckpointError(
        f"{path} has {len(problems)} wrong tensor{'s' if len(problems) > 1 else ''}: {shown}",
        expected="exactly the tensors of the model, in the shapes that its sizes imply",
        remedy="Check that the file holds the weights of this architecture.",
    )


def describe(value: object) -> str:
    """A value of a file in a few words."""
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} {shape}{'' if is_plain(value) else ' without plain values'}"
    if isinstance(value, dict):
        odd_first = sorted(value, key=lambda key: isinstance(key, str))
        return f"a dict with the keys {odd_first[:NAMED_PROBLEMS]}"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    if not isinstance(error, (RuntimeError, OSError, EOFError)):  # torch's own words are advice to run what is in it
        return "no pickle of tensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
