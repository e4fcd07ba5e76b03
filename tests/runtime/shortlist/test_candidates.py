from __future__ import annotations

import io
import os
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.runtime.errors import InputError
from kvx.runtime.shortlist import candidates as module
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary

SOURCE = Vocabulary(6, 3, "5" * 64)
TARGET = Vocabulary(30, 3, "7" * 64)
ROWS = [[], [7, 9], [9, 8, 29], [], [0], [10, 11, 12, 13]]
FREQUENT = [20, 4]


def shortlist(
    rows: list[list[int]], frequent: list[int], source: Vocabulary = SOURCE, target: Vocabulary = TARGET
) -> Shortlist:
    offsets = np.cumsum([0, *map(len, rows)])
    targets = np.array([one for row in rows for one in row], np.int32)
    return Shortlist(source, target, offsets, targets, np.array(frequent, np.int32))


def read(path: Path, source: Vocabulary = SOURCE, target: Vocabulary = TARGET) -> Shortlist:
    return Shortlist.read(path, source_vocab=source, target_vocab=target)


def members(**changes: object) -> dict[str, Any]:
    """What a file holds, with some of it replaced, or left out where None."""
    example = shortlist(ROWS, FREQUENT)
    found: dict[str, object] = {
        "format_version": np.array(1),
        "vocab_sizes": np.array([6, 30]),
        "tokenizers": np.array([SOURCE.sha256, TARGET.sha256]),
        "offsets": example.offsets,
        "targets": example.targets,
        "frequent": example.frequent,
    }
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A shortlist's file."""
    shortlist(ROWS, FREQUENT).write(tmp_path / "list.npz")
    return tmp_path / "list.npz"


ids = st.lists(st.integers(0, TARGET.size - 1), max_size=12)


@st.composite
def shortlists(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    return draw(st.lists(ids, min_size=SOURCE.size, max_size=SOURCE.size)), draw(ids)


class TestCandidates:
    @given(drawn=shortlists(), sentence=st.lists(st.integers(0, SOURCE.size - 1), max_size=20))
    def test_they_are_the_targets_of_the_pieces_the_frequent_ones_and_eos(
        self, drawn: tuple[list[list[int]], list[int]], sentence: list[int]
    ) -> None:
        rows, frequent = drawn
        found = shortlist(rows, frequent).candidates(sentence)
        assert found.dtype == np.int64
        assert found.tolist() == sorted({TARGET.eos, *frequent}.union(*(rows[one] for one in sentence)))

    def test_order_and_repetition_of_the_pieces_do_not_matter(self) -> None:
        example = shortlist(ROWS, FREQUENT)
        assert example.candidates([5, 1, 2, 1, 5]).tolist() == example.candidates((1, 2, 5)).tolist()

    def test_a_sentence_leaves_nothing_behind(self) -> None:
        example = shortlist(ROWS, FREQUENT)
        example.candidates([5])
        assert example.candidates([]).tolist() == [3, 4, 20]

    def test_targets_are_counted_by_source_piece(self) -> None:
        assert shortlist(ROWS, FREQUENT).targets_per_source == [0, 2, 3, 0, 1, 4]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"offsets": np.array([0, 2, 5])}, "3 offsets"),
        ({"offsets": np.array([0, 2, 1, 5, 5, 6, 10])}, "offsets that do not divide 10 targets"),
        ({"offsets": np.array([0, 2, 5, 5, 5, 6, 11])}, "offsets that do not divide 10 targets"),
        ({"offsets": np.array([1, 2, 5, 5, 5, 6, 10])}, "offsets that do not divide 10 targets"),
        ({"offsets": np.array([-1, 2, 5, 5, 5, 6, 10])}, "offsets that do not divide 10 targets"),
        ({"offsets": np.zeros(7)}, "offsets of float64"),
        ({"targets": np.full(10, 30, np.int32)}, "targets from 30 to 30"),
        ({"targets": np.full(10, -1, np.int32)}, "targets from -1 to -1"),
        ({"targets": np.zeros(10, np.int64)}, "targets of int64"),
        ({"targets": np.zeros((10, 1), np.int32)}, r"targets of int32 \[10, 1\]"),
        ({"frequent": np.array([4, 30], np.int32)}, "frequent from 4 to 30"),
        ({"frequent": np.array(4, np.int32)}, r"frequent of int32 \[\]"),
    ],
)
def test_arrays_that_are_no_shortlist_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    arrays = members(**changes)
    with pytest.raises(InputError, match=says):
        Shortlist(SOURCE, TARGET, arrays["offsets"], arrays["targets"], arrays["frequent"])
    np.savez(tmp_path / "list.npz", **arrays)
    with pytest.raises(InputError, match=rf"list\.npz cannot be used\. The shortlist has .*{says}"):
        read(tmp_path / "list.npz")


def test_an_eos_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="eos 30"):
        shortlist(ROWS, FREQUENT, target=Vocabulary(30, 30, TARGET.sha256))


class TestFile:
    @settings(max_examples=25)
    @given(drawn=shortlists())
    def test_what_is_written_is_read(
        self, tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[list[int]], list[int]]
    ) -> None:
        written, path = shortlist(*drawn), tmp_path_factory.mktemp("lists") / "list.npz"
        written.write(path)
        found = read(path)
        for name in ("offsets", "targets", "frequent"):
            assert getattr(found, name).tolist() == getattr(written, name).tolist()
        assert (found.source_vocab, found.target_vocab) == (SOURCE, TARGET)
        assert found.candidates(range(6)).tolist() == written.candidates(range(6)).tolist()

    def test_equal_shortlists_make_equal_files(self, path: Path, tmp_path: Path) -> None:
        read(path).write(tmp_path / "again.npz")
        assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()

    def test_it_is_written_where_it_is_said_whatever_the_name(self, tmp_path: Path) -> None:
        shortlist(ROWS, FREQUENT).write(tmp_path / "list")
        assert [found.name for found in tmp_path.iterdir()] == ["list"]

    def test_an_older_file_stays_where_writing_fails(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = path.read_bytes()

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            shortlist(ROWS, []).write(path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_a_folder_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be written"):
            shortlist(ROWS, FREQUENT).write(tmp_path / "nowhere" / "list.npz")

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            (Vocabulary(7, 3, SOURCE.sha256), TARGET),
            (SOURCE, Vocabulary(31, 3, TARGET.sha256)),
            (Vocabulary(6, 3, "0" * 64), TARGET),
            (SOURCE, Vocabulary(30, 3, "0" * 64)),
        ],
    )
    def test_one_for_other_tokenizers_is_refused(self, path: Path, source: Vocabulary, target: Vocabulary) -> None:
        with pytest.raises(InputError, match=r"\[6, 30\] pieces .* Expected a shortlist from .* kvx shortlist"):
            read(path, source, target)


class TestDamage:
    def test_a_file_cut_off_anywhere_is_refused(self, path: Path) -> None:
        content = path.read_bytes()
        for size in range(0, len(content), 7):
            path.write_bytes(content[:size])
            with pytest.raises(InputError, match=r"list\.npz"):
                read(path)

    def test_a_changed_byte_is_refused_or_changes_nothing(self, path: Path) -> None:
        content, chance, refused = path.read_bytes(), random.Random(0), 0
        expected = read(path)
        for _ in range(400):
            position, change = chance.randrange(len(content)), chance.randrange(1, 256)
            path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
            try:
                found = read(path)
            except InputError:
                refused += 1
                continue
            for name in ("offsets", "targets", "frequent"):
                assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        assert refused > 200

    @settings(max_examples=50)
    @given(content=st.binary(max_size=300))
    def test_any_other_content_is_refused(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.mktemp("lists") / "list.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"list\.npz"):
            read(path)

    @pytest.mark.parametrize("name", ["format_version", "vocab_sizes", "tokenizers", "offsets", "targets", "frequent"])
    def test_a_missing_array_is_named(self, path: Path, name: str) -> None:
        np.savez(path, **members(**{name: None}))
        with pytest.raises(InputError, match=f"KeyError: .*{name}"):
            read(path)

    @pytest.mark.parametrize("version", [0, 2, 1.5, "one"])
    def test_another_format_version_is_refused(self, path: Path, version: object) -> None:
        np.savez(path, **members(format_version=np.array(version)))
        with pytest.raises(InputError, match="format version"):
            read(path)

    def test_nothing_in_it_is_executed(self, path: Path, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "sprung"),)

        np.savez(path, **members(targets=np.array([Trap()], dtype=object)))
        with pytest.raises(InputError, match="damaged"):
            read(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("format_version.npy", pickle.dumps(Trap()))
        with pytest.raises(InputError, match="damaged"):
            read(path)
        assert not (tmp_path / "sprung").exists()

    def test_a_member_that_is_no_array_is_refused(self, path: Path) -> None:
        inner = io.BytesIO()
        np.savez(inner, a=np.array(1))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("format_version.npy", inner.getvalue())
        with pytest.raises(InputError, match="format_version is not an array"):
            read(path)

    def test_an_array_that_claims_to_be_huge_is_refused(self, path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (2**60,)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("format_version.npy", header.getvalue())
        with pytest.raises(InputError, match="damaged"):
            read(path)

    def test_what_would_unpack_to_more_than_the_limit_is_refused(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LARGEST_FILE", 2**20)
        np.savez_compressed(path, **members(frequent=np.zeros(2**20, np.int32)))
        assert path.stat().st_size < 2**14
        with pytest.raises(InputError, match="larger than 1,048,576 bytes"):
            read(path)

    def test_no_more_is_unpacked_than_is_announced(self, path: Path) -> None:
        np.savez_compressed(path, **members(format_version=np.zeros(2**22, np.int64)))
        content = path.read_bytes()
        honest, lie = (2**25 + 128).to_bytes(4, "little"), (200).to_bytes(4, "little")
        assert honest in content
        path.write_bytes(content.replace(honest, lie))
        assert _peak_while_refusing(path) < 2**22

    @pytest.mark.parametrize("kind", ["nothing", "folder", "pipe"])
    def test_what_is_no_file_is_refused_at_once(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "list.npz"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        with pytest.raises(InputError, match="No such file" if kind == "nothing" else "not a file"):
            read(path)


def _peak_while_refusing(path: Path) -> int:
    """The most bytes that Python held meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
