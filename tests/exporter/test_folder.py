"""A bundle's folder is there at any time, whoever is killed or replaces it too, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvx import OptionError
from kvx.exporter import folder as folders
from kvx.exporter.folder import whole_or_nothing
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import Manifest

KILLED_AFTER_ITS_FIRST_RENAME = """
    import ctypes, os, pathlib, shutil, signal, sys
    from kvx.exporter import folder as folders

    def deadly(function):
        def call(*arguments):
            result = function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    pathlib.Path.rename = deadly(pathlib.Path.rename)
    if hasattr(folders, "exchange"):
        folders.exchange = deadly(folders.exchange)
    bundle, other = map(pathlib.Path, sys.argv[1:])
    with folders.whole_or_nothing(bundle, force=True) as folder:
        shutil.copytree(other, folder, dirs_exist_ok=True)
"""

KILLED_WHILE_IT_WRITES = """
    import os, pathlib, signal, sys
    from kvx.exporter.folder import whole_or_nothing

    with whole_or_nothing(pathlib.Path(sys.argv[1]), force=True) as folder:
        (folder / "encoder.onnx").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def run_until_killed(program: str, *arguments: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def replace(bundle: Path, other: Path) -> None:
    with whole_or_nothing(bundle, force=True) as folder:
        shutil.copytree(other, folder, dirs_exist_ok=True)


def race(bundle: Path, other: Path, outcomes: multiprocessing.SimpleQueue[str]) -> None:
    for _ in range(20):
        try:
            replace(bundle, other)
        except OptionError:
            outcomes.put("refused")
        except BaseException as error:
            outcomes.put(repr(error))
        else:
            outcomes.put("replaced")


def test_a_kill_while_a_bundle_is_replaced_leaves_one_under_its_name(bundle: Path, tiny_bundle: Path) -> None:
    run_until_killed(KILLED_AFTER_ITS_FIRST_RENAME, bundle, tiny_bundle)
    Bundle.open(bundle).check_hashes()
    replace(bundle, tiny_bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_what_a_killed_export_left_is_removed_by_the_next(bundle: Path, tiny_bundle: Path) -> None:
    run_until_killed(KILLED_WHILE_IT_WRITES, bundle)
    assert len(list(bundle.parent.iterdir())) == 2
    replace(bundle, tiny_bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_what_a_living_export_writes_stays_and_so_does_what_is_of_others(tmp_path: Path, tiny_bundle: Path) -> None:
    others = [".bundle.partial", ".bundle.zero.partial", ".bundle.00000000.x.partial", ".bundle.b.00000000.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    with whole_or_nothing(tmp_path / "bundle", force=False) as living:
        replace(tmp_path / "bundle", tiny_bundle)
        assert living.is_dir()
        with pytest.raises(OptionError, match="appeared in the meantime"):
            folders._put(living, tmp_path / "bundle", tmp_path / "old", force=False)
        shutil.rmtree(tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", *others}


def test_an_older_bundle_that_nothing_replaced_is_kept(tmp_path: Path, tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / ".bundle.0123abcd.old")
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(tmp_path / "bundle", force=False):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.0123abcd.old"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_exports_that_race_replace_the_bundle_or_say_so(
    bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    if not exchanged:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    context = multiprocessing.get_context("fork")
    outcomes = context.SimpleQueue()
    processes = [context.Process(target=race, args=(bundle, tiny_bundle, outcomes)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = [outcomes.get() for _ in range(20 * len(processes))]
    for process in processes:
        process.join()
    assert set(seen) <= {"replaced", "refused"}
    assert "replaced" in seen
    Bundle.open(bundle).check_hashes()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_export_that_appears_meanwhile_is_never_a_bare_error(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the rename."""
    rename: Callable[[Path, Path], Path] = Path.rename

    def late(self: Path, target: Path) -> Path:
        if target.name == "bundle" and not target.exists():
            shutil.copytree(tiny_bundle, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with (
        pytest.raises(OptionError, match="appeared in the meantime"),
        whole_or_nothing(tmp_path / "bundle", force=False) as folder,
    ):
        (folder / "file").touch()
    assert Manifest.read(tmp_path / "bundle")
    replace(tmp_path / "bundle", tiny_bundle)


def test_folders_swap_their_names_where_the_system_can(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if folders.exchange(tmp_path / "one", tmp_path / "other"):
        assert (tmp_path / "one" / "other").exists()
        assert (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        folders.exchange(tmp_path / "one", tmp_path / "nowhere")
