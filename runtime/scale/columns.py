"""What the output says of a row: its translation, its error, and more where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvx.runtime.errors import InputError
from kvx.runtime.scale.rows import Row
from kvx.runtime.translation import Translation, strict_json


class Written(NamedTuple):
    """What is written of a row; `details` are JSON."""

    translation: str | None
    error: str | None
    details: str | None


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the output's fields. There are details only where they have a name."""

    translation: str
    error: str
    details: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return (self.translation, self.error, *([] if self.details is None else [self.details]))

    def of(self, result: Translation | InputError, told: str | None = None) -> Written:
        """What is written of a result; `told` is its error in other words."""
        if isinstance(result, InputError):
            error = str(result) if told is None else told
            return Written(None, error.encode("utf-8", "replace").decode(), None)  # it may quote half a character
        details = None if self.details is None else strict_json(result.to_dict())
        return Written(result.text, None, details)

    def of_row(self, row: Row, result: Translation | InputError) -> Written:
        """What is written of a row."""
        return self.of(result, row.told(result) if isinstance(result, InputError) else None)

    def by_name(self, written: Sequence[Written]) -> dict[str, list[str | None]]:
        """The values of rows, for each name."""
        values = ([getattr(one, name) for one in written] for name in Written._fields)
        return dict(zip(self.names, values, strict=False))
