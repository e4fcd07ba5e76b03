"""What the files of a Hugging Face folder say of its tokenizer beside the vocabulary itself, read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from kvx.runtime.bundle.files import is_lfs_pointer, read_regular
from kvx.runtime.errors import CheckpointError, TokenizerError, listed

MOST_SETTINGS = 16 << 20  # bytes of a file of settings
MOST_VOCABULARY = 256 << 20  # bytes of a file that holds a vocabulary
NAMED = 5  # of what is wrong

SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "mask_token_sent")
EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")


class Added(NamedTuple):
    """A token that was added to a vocabulary by hand."""

    piece: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The settings of a folder: its files' values, empty where a file is missing. Raises CheckpointError."""

    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)
    loose: Mapping[str, Any] = field(default_factory=dict)  # of added_tokens.json: token → id

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Those of a folder."""
        names = (SETTINGS_FILE, SPECIAL_FILE, ADDED_FILE)
        return cls(folder, *(read_object(folder / name) if has(folder, name) else {} for name in names))

    def without_added(self) -> Self:
        """The same without the tokens that were added."""
        left_out = ("added_tokens_decoder", *EXTRA_LISTS)
        kept = [
            {name: one for name, one in held.items() if name not in left_out} for held in (self.values, self.special)
        ]
        return type(self)(self.folder, *kept)

    def flag(self, name: str) -> bool:
        """A setting that is true or false, which is false where it is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self._refuse(f"`{name}` of {value!r:.60}", "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A setting that is text, or None."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self._refuse(f"`{name}` of {value!r:.60}", "text")
        return value

    def number(self, name: str, otherwise: int, most: int) -> int:
        """A setting that is a whole number."""
        value = self.values.get(name, otherwise)
        if type(value) is not int or not 0 <= value <= most:
            self._refuse(f"`{name}` of {value!r:.60}", f"a whole number up to {most}")
        return value

    def piece(self, name: str, otherwise: str) -> str:
        """The piece of a special token such as `eos_token`."""
        for values in (self.values, self.special):
            if values.get(name) is not None:
                return self._content(values[name], name)
        return otherwise

    @property
    def extra(self) -> tuple[str, ...]:
        """The special tokens that have no name of their own."""
        lists = [(name, values.get(name) or ()) for values in (self.values, self.special) for name in EXTRA_LISTS]
        for name, held in lists:
            if not isinstance(held, list | tuple | dict):
                self._refuse(f"`{name}` of {held!r:.60}", "a list of tokens")
        listed = ((name, held.values() if isinstance(held, dict) else held) for name, held in lists)
        return tuple(dict.fromkeys(self._content(one, name) for name, tokens in listed for one in tokens))

    @property
    def added(self) -> dict[int, Added]:
        """The tokens that were added by hand, and where files list them the special ones too, by id."""
        listed = self.values.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            self._refuse(f"`added_tokens_decoder` of {listed!r:.60}", "tokens by id")
        found = {self._id(one): self._added(token) for one, token in listed.items()}
        special = {token.piece for token in found.values() if token.special} | set(self.extra) | set(self._named())
        for piece, one in self.loose.items():
            if type(one) is not int or one < 0 or found.get(one, Added(piece, special=False)).piece != piece:
                self._refuse(f"{piece!r:.60} with the id {one!r:.60} in {ADDED_FILE}", "one id for each token")
            found.setdefault(one, Added(piece, piece in special))
        return found

    def _named(self) -> Iterator[str]:
        for values in (self.values, self.special):
            yield from (self._content(values[name], name) for name in NAMES if values.get(name) is not None)

    def _added(self, token: object) -> Added:
        special = token.get("special", False) if isinstance(token, dict) else False
        if not isinstance(special, bool):
            self._refuse(f"a token that is special as {special!r:.60}", "true or false")
        return Added(self._content(token, "added_tokens_decoder"), special)

    def _id(self, name: str) -> int:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            self._refuse(f"`added_tokens_decoder` with the id {name!r:.60}", "ids")
        return int(name)

    def _content(self, token: object, name: str) -> str:
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content:
            self._refuse(f"`{name}` with the token {token!r:.60}", "text, or what has it as `content`")
        return content

    def _refuse(self, got: str, expected: str) -> NoReturn:
        raise CheckpointError(
            f"The settings of the tokenizer in {self.folder} have {got}",
            expected=expected,
            remedy="Save the tokenizer again, or copy the whole folder.",
        )


def has(folder: Path, name: str) -> bool:
    """Whether something has this name, a link that leads nowhere included."""
    return (folder / name).exists() or (folder / name).is_symlink()


def require(folder: Path, *names: str) -> None:
    """Raises CheckpointError that names the files that a folder lacks."""
    missing = [name for name in names if not has(folder, name)]
    if missing:
        raise CheckpointError(
            f"{folder} has no {', no '.join(missing)}",
            expected=f"the files of its tokenizer, {', '.join(names)}",
            remedy="Copy or download the whole folder, its tokenizer included.",
        )


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises CheckpointError."""
    try:
        content = read_regular(path, most)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error})",
            expected="a file",
            remedy="Copy or download the whole folder, and check where its links lead.",
        ) from None
    if len(content) > most:
        raise CheckpointError(
            f"{path} is larger than {most} bytes", expected="a file of a tokenizer", remedy="Copy the folder again."
        )
    return content


def read_object(path: Path, most: int = MOST_SETTINGS) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else, and for a name that comes twice."""
    content = read_bounded(path, most)
    try:
        values = json.loads(content, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "a Git LFS pointer" if is_lfs_pointer(path) else f"no JSON ({str(error)[:100]})"
        raise CheckpointError(
            f"{path} is {reason}",
            expected="the file that the model was saved with",
            remedy="Download it again (git lfs pull).",
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}",
            expected="names with values",
            remedy="Save the tokenizer again, or copy the whole folder.",
        )
    return values


def refuse_tokens(path: Path, what: str, pieces: list[str], expected: str, remedy: str) -> NoReturn:
    """Raises TokenizerError that counts tokens and names the first."""
    shown = listed([f"{piece!r:.60}" for piece in pieces], NAMED)
    raise TokenizerError(f"{path} has {len(pieces)} {what}: {shown}", expected=expected, remedy=remedy)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name comes twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
