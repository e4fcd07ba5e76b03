"""API keys: a file of names and hashes, refused where anything in it is not as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("starlette")

from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.serving.keys import Key, Keys, Unauthorized, hashed, new_key


def written(folder: Path, text: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_new_key_is_found_by_the_lines_that_came_with_it(tmp_path: Path) -> None:
    made = [new_key(name) for name in ("alice", "bob of example.org")]
    keys = Keys.read(written(tmp_path, "\n".join(lines for _, lines in made)))
    assert [keys.find(key).name for key, _ in made] == ["alice", "bob of example.org"]


def test_a_file_does_not_have_the_keys(tmp_path: Path) -> None:
    key, lines = new_key("alice")
    assert key not in lines
    assert hashed(key) in lines
    assert len(key) >= 32
    assert new_key("alice")[0] != key


@pytest.mark.parametrize("name", ['a"b', "a\\b", "ä", "'", '"]', "a b", "#"])
def test_any_name_gives_lines_that_can_be_read(tmp_path: Path, name: str) -> None:
    key, lines = new_key(name)
    assert Keys.read(written(tmp_path, lines)).find(key).name == name


@pytest.mark.parametrize("name", ["", "a\nb", '"]\nsha256 = "x', "\0", "\ud800"])
def test_a_name_that_cannot_be_printed_is_refused(name: str) -> None:
    with pytest.raises(OptionError):
        new_key(name)


def test_a_key_may_have_limits_of_its_own(tmp_path: Path) -> None:
    key, lines = new_key("alice")
    found = Keys.read(written(tmp_path, f"{lines}\nrequests = 2\ncharacters = 100\n")).find(key)
    assert found == Key(name="alice", requests=2, characters=100)


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_not_a_wrong_key(key: str | None) -> None:
    with pytest.raises(Unauthorized) as found:
        Keys({}).find(key)
    assert not found.value.wrong


@pytest.mark.parametrize("key", ["x", "\ud800", "\0", "ä" * 10_000])
def test_a_wrong_key_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(Unauthorized) as found:
        Keys({hashed("other"): Key(name="a")}).find(key)
    assert found.value.wrong
    assert key not in str(found.value) or key == "x"


def test_the_hash_is_no_key(tmp_path: Path) -> None:
    _, lines = new_key("alice")
    with pytest.raises(Unauthorized):
        Keys.read(written(tmp_path, lines)).find(lines.split('"')[-2])


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("a = 1", "sha256"),
        ("[a]", "sha256"),
        ("[a]\nsha256 = 1", "sha256"),
        (f'[a]\nsha256 = "{"F" * 64}"', "sha256"),
        (f'[a]\nsha256 = "{"0" * 63}"', "sha256"),
        (f'[a]\nsha256 = "{"0" * 64}"\nrequest = 1', "request"),
        (f'[a]\nsha256 = "{"0" * 64}"\nrequests = 0', "`requests`"),
        (f'[a]\nsha256 = "{"0" * 64}"\ntexts = true', "`texts`"),
        (f'[a]\nsha256 = "{"0" * 64}"\ncharacters = "many"', "`characters`"),
        ("[a]\n[a]", "no file of keys"),
        ("\0", "no file of keys"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, mention: str) -> None:
    with pytest.raises(InputError, match=mention):
        Keys.read(written(tmp_path, text))


def test_two_names_with_one_key_are_refused(tmp_path: Path) -> None:
    _, lines = new_key("alice")
    with pytest.raises(InputError, match="alice"):
        Keys.read(written(tmp_path, f"{lines}\n{lines.replace('alice', 'bob')}"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Keys.read(path)
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no file of keys"):
        Keys.read(tmp_path / "keys")
