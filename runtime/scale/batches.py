"""Batches of rows in, the same with their translations out: what a pipeline of one's own calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from kvx.runtime.engine.core import Core, EngineOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.translating import Asked, translate_each
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateKeywords, TranslateOptions, options_or_default
from kvx.runtime.scale.columns import Columns, Written
from kvx.runtime.scale.packages import arrow
from kvx.runtime.scale.rows import Fields, missing
from kvx.runtime.system import available_threads


class TranslateBatches:
    """Translates batches of rows: a class for `map_batches` of Ray Data, and for any other pipeline.

        dataset.map_batches(TranslateBatches, fn_constructor_args=("artifacts/my-model",), compute=…, batch_size=1000)

    A batch is a dict of numpy arrays or lists, a pyarrow Table or a pandas DataFrame. It is given back as the same with
    the field `translation`, and with `error`, which is None for rows that were translated. With `details_field`, a
    field of JSON has all that is known of a translation. Rows may name their languages in `from_field` and `to_field`.
    The other arguments are those of `Translator.load` and the options of a translation. Raises what `load` raises.
    """

    def __init__(
        self,
        bundle: str | Path,
        options: TranslateOptions | None = None,
        *,
        text_field: str = "text",
        from_field: str | None = None,
        to_field: str | None = None,
        translation_field: str = "translation",
        error_field: str = "error",
        details_field: str | None = None,
        backend: str = "onnx",
        threads: int | None = None,
        device: str = "cpu",
        **changes: Unpack[TranslateKeywords],
    ) -> None:
        self._fields = Fields(text_field, from_field, to_field)
        self._columns = Columns(translation_field, error_field, details_field)
        asked = options_or_default(options).changed(**changes)
        workers = asked.workers or (threads or available_threads() if (backend, device) == ("onnx", "cpu") else None)
        model = LoadedModel.at(bundle, device, backend=backend, threads=threads, workers=workers, spin=False)
        resolved = self._fields.opened(asked.resolved(model.manifest.defaults))
        sizes = EngineOptions(rows=resolved.rows, cache_bytes=resolved.cache_bytes)
        self._options = resolved.changed(rows=None, workers=None, cache_bytes=None)
        self._core = Core(model, sizes, sized_for=resolved.changed(workers=None))

    def __call__(self, batch: Any) -> Any:  # noqa: ANN401  # as it is given, so it is given back
        """The batch with its translations. Raises InputError where it lacks a field."""
        read, added = _kind_of(batch)
        columns = read(batch, self._fields.names)
        return added(batch, self._columns.by_name(self._written(columns)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its threads."""
        self._core.close(drain=False)

    def _written(self, columns: Mapping[str, Sequence[object]]) -> list[Written]:
        rows = zip(*columns.values(), strict=True)
        asked = [self._fields.asked(dict(zip(columns, row, strict=True))) for row in rows]
        return [self._columns.of(result) for result in self._translated(asked)]

    def _translated(self, asked: list[Asked | InputError]) -> Any:  # noqa: ANN401
        return translate_each(self._core, asked, self._options)


def _kind_of(batch: object) -> Any:  # noqa: ANN401
    """What reads columns of such a batch, and what adds some."""
    if isinstance(batch, Mapping):
        return _read_mapping, _added_to_mapping
    module = type(batch).__module__.partition(".")[0]
    if module == "pandas":
        return _read_frame, lambda batch, values: batch.assign(**values)
    if module == "pyarrow":
        return _read_table, _added_to_table
    raise InputError(
        f"The batch is a {type(batch).__name__}",
        expected="a dict of numpy arrays, a pyarrow Table or a pandas DataFrame",
        remedy="Leave `batch_format` of map_batches as it is.",
    )


def _read_mapping(batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Sequence[object]]:
    _refuse_missing(names, list(batch))
    return {name: [_plain(one) for one in batch[name]] for name in names}


def _added_to_mapping(batch: Mapping[str, Any], values: Mapping[str, list[str | None]]) -> dict[str, Any]:
    return {**batch, **{name: np.array(column, dtype=object) for name, column in values.items()}}


def _read_frame(batch: Any, names: Sequence[str]) -> dict[str, Sequence[object]]:  # noqa: ANN401
    _refuse_missing(names, list(batch.columns))
    return {name: [None if missing_ else one for one, missing_ in zip(batch[name], batch[name].isna(), strict=True)]
            for name in names}  # fmt: skip


def _read_table(batch: Any, names: Sequence[str]) -> dict[str, Sequence[object]]:  # noqa: ANN401
    _refuse_missing(names, batch.column_names)
    return {name: batch.column(name).to_pylist() for name in names}


def _added_to_table(batch: Any, values: Mapping[str, list[str | None]]) -> Any:  # noqa: ANN401
    string = arrow("Arrow tables").string()
    for name, column in values.items():
        batch = batch.append_column(arrow("").field(name, string), arrow("").array(column, type=string))
    return batch


def _refuse_missing(names: Sequence[str], held: Sequence[str]) -> None:
    """Raises InputError for a field that a batch does not have."""
    for name in names:
        if name not in held:
            raise missing(name, held)


def _plain(value: object) -> object:
    """A text of numpy as one of Python."""
    return str(value) if isinstance(value, np.str_) else value
