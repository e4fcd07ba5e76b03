"""The output folder: one job at a time, shards that are whole or not there, and what is known of each.

out/_manifest.json            what the job is; at its end, every shard
out/part-00000-00003.jsonl    shard 3 of file 0
out/.kvx/shards/….json        what is known of each shard, until the job has ended
out/.kvx/lock                 locked by the process that writes here
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from kvx.runtime.errors import InputError, remedy_of

try:
    import fcntl
except ImportError:  # Windows has none: nothing keeps a second job away there
    fcntl = None  # type: ignore[assignment]

MANIFEST = "_manifest.json"
OWN = ".kvx"
FORMAT_VERSION = 1
SHARD = re.compile(r"part-\d{5,}-\d{5,}\.(jsonl|txt|parquet)(\.\w+)?")
PARTIAL = re.compile(r"\.part-.*\.partial")
NAMED_ERRORS = 20
LONGEST_NAMED = 500  # characters of an error in the manifest


class ShardKey(NamedTuple):
    """The number of a file and that of a shard in it, from 0."""

    file: int
    shard: int

    def name(self, ending: str) -> str:
        """The name of its file."""
        return f"part-{self.file:05d}-{self.shard:05d}{ending}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What is known of a shard that is whole: the number of its rows, of those with an error, whose source was cut or
    which ended at the limit of tokens; the first errors; and whether it is the `last` of its file.
    """

    name: str
    file: int
    shard: int
    rows: int
    errors: int
    truncated: int
    at_limit: int
    bytes: int
    sha256: str
    last: bool
    first_errors: tuple[str, ...] = ()

    @property
    def key(self) -> ShardKey:
        """Which shard it is."""
        return ShardKey(self.file, self.shard)

    def to_json(self) -> str:
        """Its JSON form."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of(cls, form: Mapping[str, Any]) -> Self:
        """From its JSON form. Raises TypeError for another."""
        return cls(**{**form, "first_errors": tuple(form["first_errors"])})


@dataclass(slots=True)
class Counts:
    """What is counted while a shard is written."""

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    at_limit: int = 0


class OutputFolder:
    """A folder that this process alone writes to, with the shards of one job that are whole."""

    def __init__(self, path: Path, job: Mapping[str, Any], records: Mapping[ShardKey, ShardRecord]) -> None:
        self.path = path
        self.job = job
        self.records = dict(records)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, job: Mapping[str, Any], *, restart: bool = False) -> Iterator[Self]:
        """The folder of a job, new or gone on with, locked meanwhile. `job` is its description as JSON.

        Raises InputError where another job is at work here, where the folder has something else in it, and where it
        belongs to another job, unless this is a `restart`, which removes the shards of that job.
        """
        check_folder(path)
        with _reporting(path):
            (path / OWN / "shards").mkdir(parents=True, exist_ok=True)
        with _locked(path):
            with _reporting(path):
                _remove(path, PARTIAL)
                known = _read_manifest(path)
                if restart:
                    _remove(path, SHARD)
                    _remove(path / OWN / "shards", re.compile(".*"))
                records = {} if restart else _whole_shards(path, known)
                if records and known is not None:
                    _refuse_another(path, known["job"], job)
                else:  # there is nothing that would be lost
                    _write_json(path / MANIFEST, {"kvx_batch": FORMAT_VERSION, "complete": False, "job": job})
            try:
                yield cls(path, job, records)
            finally:
                with contextlib.suppress(OSError):
                    _remove(path, PARTIAL)  # what a killed or interrupted writer has left

    def count_shards(self) -> int:
        """How many shards are there, also those of workers elsewhere that this process has not heard of."""
        return sum(SHARD.fullmatch(path.name) is not None for path in self.path.iterdir())

    def finish(self, totals: Mapping[str, Any]) -> None:
        """Writes all that is known of the shards into the manifest, where every shard is whole."""
        shards = [asdict(self.records[key]) for key in sorted(self.records)]
        form = {"kvx_batch": FORMAT_VERSION, "complete": True, "job": self.job, "totals": totals, "shards": shards}
        with _reporting(self.path):
            _write_json(self.path / MANIFEST, form)
            _remove(self.path / OWN / "shards", re.compile(".*"))


class OpenShard:
    """A shard that is being written, under a temporary name in the same folder."""

    def __init__(self, folder: Path, key: ShardKey, ending: str, compress: Callable[[BinaryIO], BinaryIO]) -> None:
        self._folder = folder
        self._key = key
        self._name = key.name(ending)
        self._partial = folder / f".{self._name}.{secrets.token_hex(4)}.partial"
        self.counts = Counts()
        self.first_errors: list[str] = []
        with _reporting(self._partial):
            self._file: BinaryIO = self._partial.open("xb")
        self.stream = compress(self._file)

    def note_error(self, told: str) -> None:
        """Counts a row with an error."""
        self.counts.errors += 1
        if len(self.first_errors) < NAMED_ERRORS:
            self.first_errors.append(told[:LONGEST_NAMED])

    def finish(self, *, last: bool) -> ShardRecord:
        """Gives the shard its name, after it and its record are on the disk. Raises OSError."""
        with _reporting(self._partial):
            self.stream.close()
            if not self._file.closed:
                self._file.close()
            _sync(self._partial)
            with self._partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            record = ShardRecord(
                name=self._name,
                file=self._key.file,
                shard=self._key.shard,
                **asdict(self.counts),
                bytes=self._partial.stat().st_size,
                sha256=digest,
                last=last,
                first_errors=tuple(self.first_errors),
            )
            _write_json(self._folder / OWN / "shards" / f"{self._name}.json", asdict(record))
            self._partial.replace(self._folder / self._name)  # last, so that a shard with its name has its record
            _sync(self._folder)
        return record

    def discard(self) -> None:
        """Removes what has been written of it."""
        with contextlib.suppress(Exception):
            self.stream.close()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raises InputError for an output folder that cannot be one, or that has something else in it."""
    if path.exists() and not path.is_dir():
        raise _unusable(path, "is not a folder", "Choose another name for the output.")
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise _unusable(path, "would be in a folder that does not exist", "Check the path.")
        return
    with _reporting(path):
        names = [one.name for one in path.iterdir()]
    if MANIFEST not in names and set(names) - {OWN}:
        other = next(name for name in sorted(names) if name != OWN)
        raise _unusable(path, f"has something else in it ({other})", "Choose a new folder, or empty this one.")


def whole_shards(file: int, records: Mapping[ShardKey, ShardRecord]) -> Collection[int] | None:
    """The numbers of the shards of a file, by its number, that are whole; None where all of them are."""
    own = {key.shard: one for key, one in records.items() if key.file == file}
    last = next((shard for shard, one in own.items() if one.last), None)
    return None if last is not None and len(own) == last + 1 else own.keys()


def _unusable(path: Path, what: str, remedy: str) -> InputError:
    return InputError(
        f"The output folder {path} {what}",
        expected="a new or empty folder, or that of the same job",
        remedy=remedy,
        option="output",
    )


def _whole_shards(path: Path, known: Mapping[str, Any] | None) -> dict[ShardKey, ShardRecord]:
    """The shards that are there, as long as when they were written and with the same content."""
    forms = [*(known or {}).get("shards", ())]
    for file in sorted((path / OWN / "shards").glob("*.json")):
        with contextlib.suppress(ValueError):
            forms.append(json.loads(file.read_text(encoding="utf-8")))
    found: dict[ShardKey, ShardRecord] = {}
    for form in forms:
        with contextlib.suppress(TypeError, KeyError):
            record = ShardRecord.of(form)
            if _is_whole(path / record.name, record):
                found[record.key] = record
    return found


def _is_whole(path: Path, record: ShardRecord) -> bool:
    try:
        with path.open("rb") as file:
            return (
                os.fstat(file.fileno()).st_size == record.bytes
                and hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
            )
    except OSError:
        return False


def _refuse_another(path: Path, known: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raises InputError where the folder's job is not this one."""
    differences = list(_differences(known, job))
    if differences:
        raise InputError(
            f"The output folder {path} belongs to a job with other settings: {'; '.join(differences)}",
            expected="the same bundle, input and options as when it was begun",
            remedy="Use them, choose another folder, or add `restart` to remove its shards and begin again.",
            option="output",
        )


def _differences(known: Mapping[str, Any], job: Mapping[str, Any]) -> Iterator[str]:
    if known["bundle"] != job["bundle"]:
        yield "the bundle is another one or has changed"
    was, now = known["input"], job["input"]
    if len(was) != len(now):
        yield f"its input was {len(was)} files and is {len(now)}"
    else:
        changed = ((one, other) for one, other in zip(was, now, strict=True) if one != other)
        for one, other in itertools.islice(changed, 1):
            told = [f"{each['name']} of {each['bytes']} bytes" for each in (one, other)]
            yield f"its input was {told[0]} and is {told[1]}"
    for name in sorted({*known["options"], *job["options"]}):
        one, other = (form["options"].get(name) for form in (known, job))
        if one != other:
            yield f"`{name}` was {one!r:.60} and is {other!r:.60}"


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder, if it has one. Raises InputError for one that is none of kvx batch."""
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        form = json.loads(file.read_text(encoding="utf-8"))
        if form["kvx_batch"] == FORMAT_VERSION and form["job"].keys() >= {"bundle", "input", "options"}:
            found: dict[str, Any] = form
            return found
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise _unusable(path, f"has a {MANIFEST} that this kvx batch has not written", "Choose another folder.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back when the process ends, however it ends."""
    file = path / OWN / "lock"
    with _reporting(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise InputError(
                    f"Another job is writing to {path}{f' ({holder})' if holder else ''}",
                    expected="one job in a folder at a time",
                    remedy="Wait until it has ended, end it, or choose another folder.",
                    option="output",
                ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _remove(folder: Path, pattern: re.Pattern[str]) -> None:
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _write_json(path: Path, form: object) -> None:
    """A JSON file that is on the disk, whole, before it has its name."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(form, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """An error of the system as one that names the place. Raises InputError."""
    try:
        yield
    except OSError as error:
        raise failed_writing(path, error) from error


def failed_writing(path: Path, error: OSError) -> InputError:
    """The error of a disk or folder that takes no more."""
    return InputError(
        f"{path.parent if path.name.endswith('.partial') else path} cannot be written ({error.strerror or error})",
        expected="a disk with room for the output",
        remedy=f"{remedy_of(error, 'Check the disk.')} Then give the same command again: it goes on after the last "
        "whole shard.",
        option="output",
    )
