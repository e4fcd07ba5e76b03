"""Messages may get lost; results and exit codes never."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx.tests.commands.running import ENVIRONMENT, KVX, NUMBERS, PATIENCE


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def translate(
    bundle: Path, *arguments: str | Path, stderr: int, text: str = "twelve"
) -> subprocess.CompletedProcess[bytes]:
    line: list[str | Path] = [*KVX, "translate", "--model", bundle, *arguments, text]
    return subprocess.run(line, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT, check=False, timeout=PATIENCE)


@pytest.mark.parametrize("stream", ["unread", "full"])
def test_messages_that_nobody_can_read_lose_no_result(
    numbers_bundle: Path, tmp_path: Path, stream: str, request: pytest.FixtureRequest
) -> None:
    stderr = request.getfixturevalue(stream)
    done = translate(numbers_bundle, "--stats", "-o", tmp_path / "out", stderr=stderr)
    assert (done.returncode, (tmp_path / "out").read_text(encoding="utf-8")) == (0, "zwölf\n")
    done = translate(numbers_bundle, "--stats", stderr=stderr)
    assert (done.returncode, done.stdout.decode()) == (0, "zwölf\n")
    assert translate(numbers_bundle, "--rows", "0", stderr=stderr).returncode == 2


def test_a_closed_stderr_loses_no_result(numbers_bundle: Path) -> None:
    line: list[str | Path] = [
        "bash",
        "-c",
        'exec "$@" 2>&-',
        "bash",
        *KVX,
        "translate",
        "--model",
        numbers_bundle,
        "--stats",
        "twelve",
    ]
    done = subprocess.run(line, stdout=subprocess.PIPE, env=ENVIRONMENT, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout.decode()) == (0, "zwölf\n")


def test_a_failed_proof_is_told_by_the_exit_code_though_nobody_reads_it(
    numbers_bundle: Path, tmp_path: Path, unread: int
) -> None:
    bundle = Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))
    (bundle / "encoder.onnx").write_bytes((bundle / "encoder.onnx").read_bytes()[:-1] + b"x")
    line: list[str | Path] = [*KVX, "verify", bundle, NUMBERS]
    done = subprocess.run(
        line, stdout=unread, stderr=subprocess.DEVNULL, env=ENVIRONMENT, check=False, timeout=PATIENCE
    )
    assert done.returncode == 1


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_standard_output_has_names(numbers_bundle: Path, name: str) -> None:
    done = translate(numbers_bundle, "-o", name, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout.decode()) == (0, "zwölf\n"), done.stderr


def test_a_dash_is_standard_input(numbers_bundle: Path, tmp_path: Path) -> None:
    line: list[str | Path] = [*KVX, "translate", "--model", numbers_bundle, "-i", "-"]
    done = subprocess.run(
        line, input=b"one\n", capture_output=True, cwd=tmp_path, env=ENVIRONMENT, check=False, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout.decode()) == (0, "eins\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_written_anew_keeps_its_mode(numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("private")
    (tmp_path / "out").chmod(0o600)
    (tmp_path / "link").symlink_to("out")
    assert translate(numbers_bundle, "-o", tmp_path / "link", stderr=subprocess.PIPE).returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600
    assert (tmp_path / "out").read_text(encoding="utf-8") == "zwölf\n"


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_arguments_are_utf8_in_any_locale(numbers_bundle: Path, locale: str) -> None:
    line: list[str | Path] = [*KVX, "translate", "--model", numbers_bundle, "--prefix", "zwölf", "--json", "twelve"]
    environment = {**ENVIRONMENT, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(line, capture_output=True, env=environment, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "zwölf" in done.stdout.decode()
