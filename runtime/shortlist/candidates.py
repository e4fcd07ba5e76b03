"""Which target pieces may translate a sentence: an output projection over these alone costs a fraction of the whole."""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.errors import InputError
from kvx.runtime.text.lines import complete_binary_file

FORMAT_VERSION = 1
LARGEST_FILE = 2**28  # bytes, of the file and of what is packed in it
ARRAYS = ("vocab_sizes", "tokenizers", "offsets", "targets", "frequent")
TRAIN = "Make a shortlist for this bundle with kvx shortlist train."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What gives ids their meaning: how many there are, the target's eos, and the sha256 (hex) of the tokenizer's file,
    or of those of its files together. `before` and `after` are how many ids framing lays around a source.
    """

    size: int
    eos: int
    sha256: str
    before: int = 1
    after: int = 1

    @classmethod
    def of(cls, manifest: Manifest, side: Literal["source", "target"]) -> Self:
        """The vocabulary of one side of a bundle."""
        hashes = [manifest.files[name].sha256 for name in manifest.tokenizers[side].files.values()]
        together = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        framing = manifest.framing
        around = len(framing.prefix), len(framing.suffix)
        return cls(manifest.model[f"{side}_vocab_size"], framing.eos, together, *around)

    def __str__(self) -> str:
        return f"{self.size} pieces (sha256 {self.sha256[:12]}…)"


@dataclass(frozen=True, slots=True, eq=False)
class Shortlist:
    """The candidates of every source piece, and those of every sentence. V_s and V_t are the vocabularies' sizes.

    `targets[offsets[s]:offsets[s + 1]]` are the target pieces of source piece s, the most probable first: offsets
    int64 [V_s + 1], targets int32. `frequent` int32 are candidates everywhere, as is the target's eos, without which
    no translation could end. Raises InputError for arrays that are no shortlist.
    """

    source_vocab: Vocabulary
    target_vocab: Vocabulary
    offsets: NDArray[np.int64]
    targets: NDArray[np.int32]
    frequent: NDArray[np.int32]
    _always: NDArray[np.bool_] = field(init=False, repr=False)  # [V_t]

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise InputError(
                f"The shortlist has {', '.join(problems)}",
                expected=f"ids of {self.source_vocab.size} source and {self.target_vocab.size} target pieces",
                remedy=TRAIN,
            )
        always = np.zeros(self.target_vocab.size, np.bool_)
        always[self.frequent] = True
        always[self.target_vocab.eos] = True
        object.__setattr__(self, "_always", always)

    @property
    def targets_per_source(self) -> list[int]:
        """How many targets each source piece [V_s] has."""
        counts: list[int] = np.diff(self.offsets).tolist()
        return counts

    def candidates(self, source_ids: Sequence[int]) -> NDArray[np.int64]:
        """source_ids [S], special ids included or not → the target ids [C] of one sentence, ascending, each once."""
        offsets, targets, chosen = self.offsets, self.targets, self._always.copy()
        chosen[np.concatenate([targets[:0], *(targets[offsets[one] : offsets[one + 1]] for one in source_ids)])] = True
        return np.flatnonzero(chosen)

    def knows(self, source_ids: Sequence[int]) -> bool:
        """source_ids [S], with what framing lays around them → whether every piece between that has targets."""
        source = self.source_vocab
        pieces = np.asarray(source_ids[source.before : len(source_ids) - source.after], np.int64)
        return bool((self.offsets[pieces] < self.offsets[pieces + 1]).all())

    def write(self, path: Path) -> None:
        """Writes an .npz file, which appears when it is complete. Raises InputError where it cannot be made."""
        content = io.BytesIO()
        vocabularies = (self.source_vocab, self.target_vocab)
        np.savez_compressed(
            content,
            format_version=np.array(FORMAT_VERSION),
            vocab_sizes=np.array([one.size for one in vocabularies]),
            tokenizers=np.array([one.sha256 for one in vocabularies]),
            offsets=self.offsets,
            targets=self.targets,
            frequent=self.frequent,
        )
        with complete_binary_file(path) as file:
            file.write(content.getbuffer())

    @classmethod
    def read(cls, path: Path, *, source_vocab: Vocabulary, target_vocab: Vocabulary) -> Self:
        """The shortlist that `write` wrote. Raises InputError for a file that cannot be read, is damaged or newer, or
        was made for other tokenizers than these.
        """
        arrays = _read_arrays(path)
        sizes, hashes = arrays["vocab_sizes"].tolist(), arrays["tokenizers"].tolist()
        expected = (source_vocab, target_vocab)
        if sizes != [one.size for one in expected] or hashes != [one.sha256 for one in expected]:
            raise InputError(
                f"The shortlist {path} is for tokenizers of {sizes} pieces with sha256 {hashes!r:.160}",
                expected=f"a shortlist from {source_vocab} to {target_vocab}",
                remedy=TRAIN,
            )
        try:
            return cls(source_vocab, target_vocab, arrays["offsets"], arrays["targets"], arrays["frequent"])
        except InputError as error:
            raise _unusable(path, error.got, error.expected) from None

    def _problems(self) -> Iterator[str]:
        for name, dtype in (("offsets", np.int64), ("targets", np.int32), ("frequent", np.int32)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                yield f"{name} of {array.dtype} {list(array.shape)}"
                return
        offsets, size = self.offsets, self.target_vocab.size
        if len(offsets) != self.source_vocab.size + 1:
            yield f"{len(offsets)} offsets"
        elif offsets[0] != 0 or offsets[-1] != len(self.targets) or (offsets[:-1] > offsets[1:]).any():
            yield f"offsets that do not divide {len(self.targets)} targets"
        for name, ids in (("targets", self.targets), ("frequent", self.frequent)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                yield f"{name} from {ids.min()} to {ids.max()}"
        if not 0 <= self.target_vocab.eos < size:
            yield f"eos {self.target_vocab.eos}"


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file that may hold anything. Raises InputError."""
    try:
        return _unpack(path)
    except InputError:
        raise
    except OSError as error:
        raise _unusable(path, f"It cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zipfile and numpy have a dozen kinds for damaged content
        raise _unusable(path, f"It is damaged or something else ({type(error).__name__}: {error!s:.80})") from None


def _unpack(path: Path) -> dict[str, NDArray[Any]]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise _unusable(path, "It is not a file")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if max(unpacked, path.stat().st_size) > LARGEST_FILE:
            raise _unusable(path, f"It is larger than {LARGEST_FILE:,} bytes")
        version = _member(archive, "format_version").item()
        if version != FORMAT_VERSION:
            raise _unusable(path, f"It has the format version {version!r:.20}, not {FORMAT_VERSION}")
        return {name: _member(archive, name) for name in ARRAYS}


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        # Without a size, zipfile would first unpack everything, however small the size that the archive states.
        content = file.read(archive.getinfo(file.name).file_size)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is not an array")
    return array


def _unusable(path: Path, got: str, expected: str = "a shortlist that kvx shortlist wrote") -> InputError:
    return InputError(f"{path} cannot be used. {got}", expected=expected, remedy=TRAIN)
