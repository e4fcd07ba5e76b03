from __future__ import annotations

import codecs
import contextlib
import io
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.runtime.errors import InputError
from kvx.runtime.text.lines import LONGEST_LINE, complete_binary_file, complete_file, open_lines, read_lines

NOBODY = 65534


def lines(content: bytes) -> list[str]:
    return list(read_lines(io.BytesIO(content)))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_line(separator: str) -> None:
    assert lines(f"a{separator}b\nc\n".encode()) == [f"a{separator}b", "c"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"\n", [""]),
        (b"\n\na\n\n", ["", "", "a", ""]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\r\n", ["a\r"]),
        (b"\ra\n", ["\ra"]),
        (b"\r\n", [""]),
        (b" a \t\n", [" a \t"]),
    ],
)
def test_every_line_comes_as_it_stands(content: bytes, expected: list[str]) -> None:
    assert lines(content) == expected


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))))
def test_line_n_in_is_line_n_out(texts: list[str]) -> None:
    content = "".join(text + "\n" for text in texts).encode()
    assert lines(content) == [text.removesuffix("\r") for text in texts]


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_bytes_that_are_not_utf8_name_their_line_after_those_before(bad: bytes) -> None:
    reader = read_lines(io.BytesIO(b"a\n\nxy" + bad + b"\nb\n"))
    assert [next(reader), next(reader)] == ["a", ""]
    with pytest.raises(InputError, match=r"Line 3: Byte 3 .* not UTF-8") as raised:
        next(reader)
    assert raised.value.line == 3


def test_a_long_line_is_read() -> None:
    text = "x" * (LONGEST_LINE - 1)
    assert lines(f"{text}\nb".encode()) == [text, "b"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_over_the_limit_is_refused_by_its_number(end: bytes) -> None:
    with pytest.raises(InputError, match=f"Line 2: The line has more than {LONGEST_LINE} bytes") as raised:
        lines(b"a\n" + b"x" * (LONGEST_LINE + 1) + end)
    assert raised.value.line == 2


def test_an_endless_line_is_refused_without_reading_on() -> None:
    stream = io.BytesIO(b"x" * (4 * LONGEST_LINE))
    with pytest.raises(InputError):
        list(read_lines(stream))
    assert stream.tell() <= LONGEST_LINE + 1


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read") as raised:
        open_lines(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with complete_file(path) as file:
        file.write("größe\r\n\u2028")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == "größe\r\n\u2028".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_binary_file_appears_only_when_complete_and_holds_the_very_bytes(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with complete_binary_file(path) as file:
        file.write(b"\xff\r\n\x00")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"\xff\r\n\x00"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("older", [None, "older"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_folder_is_as_it_was(
    tmp_path: Path, error: type[BaseException], older: str | None
) -> None:
    path = tmp_path / "out"
    if older:
        path.write_text(older)

    def fail() -> None:
        with complete_file(path) as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [(found, found.read_text()) for found in tmp_path.iterdir()] == ([(path, older)] if older else [])


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("older")
    with complete_file(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "older"
    assert path.read_text() == "new"


def test_a_link_stays_a_link_and_its_file_gets_the_content(tmp_path: Path) -> None:
    # /dev/stdout is such a link where the shell sends the output to a file.
    (tmp_path / "elsewhere").mkdir()
    link, real = tmp_path / "link", tmp_path / "elsewhere" / "real"
    real.write_text("older")
    link.symlink_to(real)
    with complete_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_device_is_written_directly() -> None:
    device = Path(os.devnull)
    before = device.stat()
    with complete_file(device) as file:
        file.write("gone")
    assert device.stat().st_ino == before.st_ino
    assert device.is_char_device()


def test_a_fifo_is_written_directly(tmp_path: Path) -> None:
    path, received = tmp_path / "fifo", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_text()), daemon=True)
    reader.start()
    with complete_file(path) as file:
        file.write("through")
    reader.join(timeout=10)
    assert received == ["through"]
    assert path.is_fifo()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_a_file_honours_the_umask(tmp_path: Path, mask: int) -> None:
    previous = os.umask(mask)
    try:
        with complete_file(tmp_path / "out") as file:
            file.write("x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["nowhere/out", "file/out", "."])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), complete_file(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["one\ntwo\n", "\ufeffone\n", ""])
def test_a_byte_order_mark_at_the_beginning_is_no_text(text: str) -> None:
    lines = text.removesuffix("\n").split("\n") if text else []
    assert list(read_lines(io.BytesIO(codecs.BOM_UTF8 + text.encode()))) == lines


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Whatever runs the tests, permissions count."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.parametrize("mode", [0o555, 0o1777], ids=["closed folder", "sticky folder"])
def test_a_file_that_can_be_written_but_not_replaced_is_written_in_place(
    open_folder: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = open_folder / "out"
    path.write_text("something longer before")
    path.chmod(0o666)
    open_folder.chmod(mode)
    inode = path.stat().st_ino
    if mode == 0o1777 and os.geteuid() != 0:
        pytest.skip("needs a file of somebody else")
    with without_privileges(), complete_file(path) as file:
        file.write("new\n")
        assert path.read_text() == "something longer before"
    assert (path.read_text(), path.stat().st_ino) == ("new\n", inode)
    assert [(record.name, record.levelname) for record in caplog.records] == [("kvx", "WARNING")]
    assert str(path) in caplog.text
    assert [one.name for one in open_folder.iterdir()] == ["out"]


def test_a_file_that_is_written_in_place_stays_as_it_is_where_writing_fails(open_folder: Path) -> None:
    path = open_folder / "out"
    path.write_text("before")
    path.chmod(0o666)
    open_folder.chmod(0o555)
    with without_privileges(), contextlib.suppress(ZeroDivisionError), complete_file(path) as file:
        file.write("new\n")
        raise ZeroDivisionError
    assert path.read_text() == "before"


def test_a_file_that_can_be_neither_written_nor_replaced_is_refused(open_folder: Path) -> None:
    (open_folder / "out").write_text("before")
    (open_folder / "out").chmod(0o444)
    open_folder.chmod(0o555)
    for name in ("out", "new"):
        with (
            without_privileges(),
            pytest.raises(InputError, match="cannot be written"),
            complete_file(open_folder / name),
        ):
            pass
    assert (open_folder / "out").read_text() == "before"


@pytest.mark.parametrize("name", ["itself", "x" * 5000], ids=["loop", "long"])
def test_a_path_that_cannot_lead_to_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "itself").symlink_to("itself")
    with pytest.raises(InputError, match="cannot be written"), complete_file(tmp_path / name):
        pass
    assert (tmp_path / "itself").is_symlink()
