"""API keys: a file of names and hashes, so that whoever reads the file cannot use the service."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvx.runtime.errors import InputError, KvxError, OptionError, remedy_of
from kvx.runtime.rules import is_whole

BYTES = 24  # of chance in a key: nobody can guess it, so one round of SHA-256 protects it
HASH = re.compile(r"[0-9a-f]{64}")
LIMITS = ("requests", "characters", "texts")
MOST_BYTES = 2**24


class Unauthorized(KvxError):  # noqa: N818
    """A request has no key, or `wrong`, one that nobody has been given."""

    def __init__(self, got: str, *, wrong: bool) -> None:
        super().__init__(got, expected="an API key of this service", remedy="Ask whoever runs the service for one.")
        self.wrong = wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Whose key it is, and the limits that are its own: requests at a time, characters and texts of a request."""

    name: str
    requests: int | None = None
    characters: int | None = None
    texts: int | None = None


NOBODY = Key(name="")


class Keys:
    """The keys of a service, by the hash of each."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those of a file. Raises InputError."""
        try:
            if path.stat().st_size > MOST_BYTES:
                raise _wrong(f"{path} has more than {MOST_BYTES:,} bytes")
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"The keys cannot be read ({error.strerror}: {path})",
                expected="a file of keys",
                remedy=remedy_of(error, "Check the path."),
                option="keys",
            ) from error
        except ValueError as error:
            raise _wrong(f"{path} is no file of keys ({error})") from error
        found: dict[str, Key] = {}
        for name, table in tables.items():
            other = found.setdefault(_hash_of(name, table), key := _key(name, table))
            if other is not key:
                raise _wrong(f"{other.name!r:.60} and {name!r:.60} have the same key")
        return cls(found)

    def find(self, key: str | None) -> Key:
        """Whose key this is. Raises Unauthorized."""
        if not key:
            raise Unauthorized("The request has no API key", wrong=False)
        found = self._keys.get(hashed(key))
        if found is None:
            raise Unauthorized("The API key is wrong", wrong=True)
        return found


def hashed(key: str) -> str:
    """What a file has in place of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the lines of a file for it. Raises OptionError."""
    if not name.isprintable() or not name.strip():
        raise OptionError(
            f"The name is {name!r:.80}",
            expected="a name that can be printed",
            remedy="Choose another name.",
            option="name",
        )
    key = secrets.token_urlsafe(BYTES)
    return key, f'[{json.dumps(name, ensure_ascii=False)}]\nsha256 = "{hashed(key)}"'


def _hash_of(name: str, table: Any) -> str:  # noqa: ANN401  # as TOML has it
    value = table.get("sha256") if isinstance(table, dict) else None
    if not isinstance(value, str) or not HASH.fullmatch(value):
        raise _wrong(f"The key of {name!r:.60} has no `sha256` of 64 hexadecimal digits")
    return value


def _key(name: str, table: Mapping[str, Any]) -> Key:
    unknown = table.keys() - {"sha256", *LIMITS}
    if unknown:
        raise _wrong(f"The key of {name!r:.60} has {', '.join(sorted(unknown))}")
    limits = {limit: table[limit] for limit in LIMITS if limit in table}
    for limit, value in limits.items():
        if not is_whole(value) or value < 1:
            raise _wrong(f"`{limit}` of the key of {name!r:.60} is {value!r:.60}")
    return Key(name=name, **limits)


def _wrong(got: str) -> InputError:
    return InputError(
        got,
        expected=f"a table for each key, with `sha256` and perhaps {', '.join(f'`{one}`' for one in LIMITS)}",
        remedy="Make the tables with `kvx key`, and correct what is named.",
        option="keys",
    )
