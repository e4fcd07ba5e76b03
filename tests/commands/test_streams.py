"""Messages may get lost; results and exit codes never."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
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


def closing(streams: str, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """The command with these streams closed."""
    line = ["bash", "-c", f'exec "$@" {streams}', "bash", *KVX, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, env=ENVIRONMENT, check=False, timeout=PATIENCE)


def test_a_closed_stderr_loses_no_result(numbers_bundle: Path) -> None:
    done = closing("2>&-", "translate", "--model", numbers_bundle, "--stats", "twelve")
    assert (done.returncode, done.stdout.decode()) == (0, "zwölf\n")


def test_a_file_is_written_though_every_stream_is_closed(numbers_bundle: Path, tmp_path: Path) -> None:
    done = closing("<&- >&- 2>&-", "translate", "--model", numbers_bundle, "-o", tmp_path / "out", "twelve")
    assert (done.returncode, (tmp_path / "out").read_text(encoding="utf-8")) == (0, "zwölf\n")


@pytest.mark.parametrize("command", ["translate", "score", "inspect", "evaluate", "--help", "--version"])
@pytest.mark.parametrize("streams", [">&-", ">/dev/full"])
def test_results_that_cannot_be_written_are_an_error(
    numbers_bundle: Path, tmp_path: Path, command: str, streams: str
) -> None:
    (tmp_path / "source").write_text("twelve\n", encoding="utf-8")
    (tmp_path / "target").write_text("zwölf\n", encoding="utf-8")
    arguments: dict[str, list[str | Path]] = {
        "translate": ["--model", numbers_bundle, "-i", tmp_path / "source"],
        "score": ["--model", numbers_bundle, "--source", tmp_path / "source", "--target", tmp_path / "target"],
        "inspect": [numbers_bundle],
        "evaluate": [numbers_bundle, "--source", tmp_path / "source", "--reference", tmp_path / "target"],
    }
    done = closing(streams, command, *arguments.get(command, []))
    assert done.returncode == 2
    assert b"kvx: error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_what_a_library_prints_never_gets_into_a_file(numbers_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from kvx.cli import main; from kvx.runtime.text import lines\n"
        "write = lines.one_line\n"
        "def chatty(text): [os.write(number, b'chatter') for number in (1, 2)]; return write(text)\n"
        "from kvx.commands import output; output.one_line = chatty\n"
        "main(sys.argv[1:])"
    )
    line = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", script]
    arguments = ["translate", "--model", str(numbers_bundle), "-o", str(tmp_path / "out"), "twelve"]
    assert subprocess.run([*line, *arguments], env=ENVIRONMENT, check=False, timeout=PATIENCE).returncode == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == "zwölf\n"


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


def test_a_file_that_is_mounted_is_written_in_place_and_this_is_said(numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "origin").write_text("before")
    (tmp_path / "out").touch()
    mount = f"mount --bind {tmp_path / 'origin'} {tmp_path / 'out'}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    line = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *KVX, "translate", "--device", "cpu"]
    line += ["--model", str(numbers_bundle), "-o", str(tmp_path / "out"), "twelve"]
    done = subprocess.run(line, capture_output=True, env=ENVIRONMENT, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.startswith(b"kvx: ")
    assert done.stderr.endswith(b"so it is written in place. It is incomplete if that is cut short.\n")
    assert (tmp_path / "origin").read_text(encoding="utf-8") == "zwölf\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "out"]
