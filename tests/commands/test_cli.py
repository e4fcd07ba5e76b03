from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from typer.testing import CliRunner, Result

import kvx
from kvx.cli import app
from kvx.models.importers import load_checkpoint, save_checkpoint
from kvx.runtime.bundle.manifest import Manifest

KVX = [sys.executable, "-m", "kvx"]
SCRIPT = Path(sys.executable).with_name("kvx")
NUMBERS = Path(__file__).resolve().parents[2] / "artifacts" / "numbers-checkpoint" / "model.pt"
OWN_LINE = re.compile(r"kvx: |parity with eager PyTorch: |  (ok  |FAIL) ")
LONG = " ".join(["one"] * 100)
PATIENCE = 60  # seconds
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def outcome(code: int, out: bytes, err: bytes) -> Outcome:
    """What a command did. No traceback may ever reach a user."""
    found = Outcome(code, out.decode(), err.decode())
    assert "Traceback" not in found.err, found.err[-300:]
    assert "Traceback" not in found.out
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command in an empty folder."""

    def run(*arguments: str | Path, stdin: bytes = b"", command: list[str] | None = None) -> Outcome:
        line = [*(command or KVX), *map(str, arguments)]
        done = subprocess.run(
            line, input=stdin, capture_output=True, cwd=tmp_path, timeout=PATIENCE, check=False, env=ENVIRONMENT
        )
        return outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def translate(run: Run, numbers_bundle: Path) -> Run:
    def translate(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
        return run("translate", "--model", numbers_bundle, "--device", "cpu", *arguments, stdin=stdin)

    return translate


@pytest.fixture
def bundle(numbers_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbers_bundle, tmp_path / "bundle"))


def invoke(*arguments: str | Path) -> Result:
    """The command in this process, where torch is already loaded."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def refused(found: Outcome, *mentions: str) -> None:
    """Exit code 2, nothing on stdout, and one sentence of our own."""
    assert (found.code, found.out) == (2, "")
    lines = [line for line in found.err.splitlines() if line.startswith("kvx: error: ")]
    assert len(lines) == 1, found.err
    assert ". Expected " in lines[0]
    for mention in mentions:
        assert mention in lines[0]


def refused_usage(found: Outcome, *mentions: str) -> None:
    assert (found.code, found.out) == (2, "")
    for mention in ("Usage: kvx", *mentions):
        assert mention in found.err


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


class TestUsage:
    def test_version(self, run: Run) -> None:
        assert run("--version") == Outcome(0, f"kvx {kvx.__version__}\n", "")

    @pytest.mark.skipif(not SCRIPT.exists(), reason="kvx is not installed as a command here")
    def test_the_command_is_the_module(self, run: Run) -> None:
        assert run("--version", command=[str(SCRIPT)]) == run("--version")

    @pytest.mark.parametrize("option", ["-h", "--help"])
    def test_help_names_every_command(self, run: Run, option: str) -> None:
        found = run(option)
        assert found.code == 0
        for command in ("export", "verify", "inspect", "translate"):
            assert f"\n  {command} " in found.out

    def test_no_arguments_show_the_help_and_are_no_success(self, run: Run) -> None:
        found = run()
        assert found.code == 2
        assert "Usage: kvx" in found.out + found.err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--nope"],
            ["nope"],
            ["translate", "--nope"],
            ["translate", "--rows", "x"],
            ["translate", "--backend", "tpu", "one"],
            ["translate", "--on-long", "skip", "one"],
            ["export"],
            ["export", "model.pt", "--format", "exe"],
            ["inspect"],
            ["verify", "bundle"],
        ],
        ids=" ".join,
    )
    def test_what_cannot_be_parsed_is_a_usage_error(self, run: Run, arguments: list[str]) -> None:
        refused_usage(run(*arguments))


class TestTranslate:
    def test_arguments(self, translate: Run) -> None:
        assert translate("one", "twelve") == Outcome(0, "eins\nzwölf\n", "")

    def test_standard_input(self, translate: Run) -> None:
        assert translate(stdin=b"one\ntwelve\n") == Outcome(0, "eins\nzwölf\n", "")

    def test_no_input_at_all(self, translate: Run) -> None:
        assert translate() == Outcome(0, "", "")

    @pytest.mark.parametrize("option", ["-i", "--input"])
    def test_a_file(self, translate: Run, tmp_path: Path, option: str) -> None:
        (tmp_path / "in").write_text("one\ntwelve")
        assert translate(option, "in", stdin=b"three\n") == Outcome(0, "eins\nzwölf\n", "")

    @pytest.mark.parametrize("backend", ["onnx", "torchscript", "torch", "torch-no-cache"])
    def test_every_backend_says_the_same_and_nothing_else(self, translate: Run, backend: str) -> None:
        assert translate("--backend", backend, "twelve", "one") == Outcome(0, "zwölf\neins\n", "")

    def test_an_output_file_is_complete_and_alone(self, translate: Run, tmp_path: Path) -> None:
        assert translate("-o", "out", "one", "twelve") == Outcome(0, "", "")
        assert (tmp_path / "out").read_bytes() == "eins\nzwölf\n".encode()
        assert names_in(tmp_path) == ["out"]

    def test_an_output_file_stays_as_it_was_after_an_error(self, translate: Run, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("older")
        refused(translate("-o", "out", stdin=b"one\n\xff\n"), "Line 2")
        assert (tmp_path / "out").read_text() == "older"
        assert names_in(tmp_path) == ["out"]

    def test_an_output_that_cannot_be_written(self, translate: Run) -> None:
        refused(translate("-o", "nowhere/out", "one"), "nowhere/out", "cannot be written")

    def test_json_is_an_object_a_line(self, translate: Run) -> None:
        found = translate("--json", "--scores", stdin=b"one\n\ntwelve\n")
        one, empty, twelve = (json.loads(line) for line in found.out.split("\n")[:-1])
        assert (found.code, found.err) == (0, "")
        fields = ["text", "tokens", "ids", "score", "finish_reason", "truncated", "log_probabilities"]
        assert list(one) == fields
        assert sum(one["log_probabilities"]) == pytest.approx(one["score"])
        assert [value["text"] for value in (one, empty, twelve)] == ["eins", "", "zwölf"]
        assert one["score"] < 0
        assert (one["finish_reason"], one["truncated"]) == ("end", False)
        assert len(one["ids"]) == len(one["tokens"]) + 1
        assert "zwölf" in found.out  # as it is, not escaped

    def test_scores_stand_before_every_text(self, translate: Run) -> None:
        scored = translate("--scores", "one", "twelve").out.split("\n")[:-1]
        exact = [
            json.loads(line)["score"] for line in translate("--json", "--scores", "one", "twelve").out.splitlines()
        ]
        assert [line.split("\t")[1] for line in scored] == ["eins", "zwölf"]
        assert [float(line.split("\t")[0]) for line in scored] == pytest.approx(exact, abs=1e-4)

    def test_an_empty_line_keeps_the_column_of_scores(self, translate: Run) -> None:
        found = translate("--scores", stdin=b"one\n\ntwelve\n")
        assert [line.count("\t") for line in found.out.split("\n")[:-1]] == [1, 1, 1]

    def test_stats_go_to_stderr(self, translate: Run) -> None:
        found = translate("--stats", "one", "twelve")
        assert (found.code, found.out) == (0, "eins\nzwölf\n")
        assert re.fullmatch(
            r"kvx: 2 sentences in [\d.]+ s: [\d.]+ sentences/s, \d+ tokens/s, \d+ steps, \d+% of the rows in use, "
            r"0 repacks, cache [\d.]+ MiB\n",
            found.err,
        )

    @pytest.mark.parametrize("rows", ["1", "2", "100"])
    def test_line_n_in_is_line_n_out_whatever_stands_in_it(self, translate: Run, rows: str) -> None:
        odd = ["a\u2028b", "c\u0085d", "e\x0bf\x0cg\x1ch", "i\rj", "", "   ", "\u2029", "\x00", "🎈", "\ufeff"]
        texts = [text for each in odd for text in (each, "twelve\r", each)]
        found = translate("--rows", rows, stdin="\n".join(texts).encode())
        lines = found.out.split("\n")
        assert found.code == 0
        assert len(lines) == len(texts) + 1
        assert lines[1:-1:3] == ["zwölf"] * len(odd)
        assert (lines[odd.index("") * 3], lines[odd.index("   ") * 3]) == ("", "")

    def test_input_that_is_not_utf8_is_refused_by_its_line_after_those_before(self, translate: Run) -> None:
        found = translate(stdin=b"one\n\ntwelve\n\xe9t\xe9\nthree\n")
        assert found.out == "eins\n\nzwölf\n"
        refused(replace(found, out=""), "Line 4", "0xe9", "UTF-8")

    def test_an_argument_that_is_no_text_is_refused(self, translate: Run) -> None:
        found = translate("one", os.fsdecode(b"\xff"))
        assert found.out == "eins\n"
        refused(replace(found, out=""), "Line 2")

    def test_a_line_too_long_is_refused_by_its_number(self, translate: Run) -> None:
        found = translate(stdin=f"one\n{LONG}\ntwelve\n".encode())
        assert found.out == "eins\n"
        refused(replace(found, out=""), "Line 2", "102 tokens", "at most 64", "--on-long truncate")

    def test_a_line_too_long_is_cut_where_asked_for_and_told(self, translate: Run) -> None:
        found = translate("--on-long", "truncate", stdin=f"one\n{LONG}\ntwelve\n".encode())
        lines = found.out.split("\n")
        assert (found.code, len(lines), lines[0], lines[2]) == (0, 4, "eins", "zwölf")
        assert lines[1]
        assert "kvx: line 2 was cut to the model's 64 positions\n" in found.err

    def test_translations_that_stop_at_the_limit_are_told(self, translate: Run) -> None:
        found = translate("--max-new-tokens", "2", "one", "twelve thousand", "")
        assert found.code == 0
        assert found.err == "kvx: 2 translations stopped at the limit of new tokens (lines 1, 2)\n"

    @pytest.mark.parametrize(
        ("arguments", "mention"),
        [
            (["-i", "nowhere"], "nowhere"),
            (["-i", "."], "cannot be read"),
            (["-i", "in", "one"], "texts and --input"),
            (["--rows", "0", "one"], "rows = 0"),
            (["--rows", "-3", "one"], "rows = -3"),
            (["--threads", "0", "one"], "--threads 0"),
            (["--threads", "-1", "one"], "--threads -1"),
            (["--max-new-tokens", "0", "one"], "max_new_tokens = 0"),
            (["--max-new-tokens", "65", "one"], "max_new_tokens 65"),
            (["--device", "tpu", "one"], "device 'tpu'"),
            (["--device", "cuda", "--backend", "torch", "one"], "cuda"),
            (["--rows", "1000000000000", "one"], "rows"),  # petabytes of cache
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_what_cannot_work_is_refused(self, translate: Run, arguments: list[str], mention: str) -> None:
        refused(translate(*arguments), mention)

    @pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have CUDA")
    def test_cuda_where_there_is_none_is_refused(self, translate: Run) -> None:
        refused(translate("--device", "cuda", "one"), "device cuda", "--device cpu")

    def test_a_missing_model_is_refused(self, run: Run) -> None:
        refused(run("translate", "--model", "nowhere", "one"), "nowhere", "manifest.json", "kvx export")

    def test_a_damaged_bundle_is_refused(self, run: Run, bundle: Path) -> None:
        os.truncate(bundle / "decoder_step.onnx", 1000)
        refused(run("translate", "--model", bundle, "one"), "decoder_step.onnx", "1000 bytes")

    def test_an_altered_bundle_is_refused(self, run: Run, bundle: Path) -> None:
        content = bytearray((bundle / "encoder.onnx").read_bytes())
        content[-100] ^= 1
        (bundle / "encoder.onnx").write_bytes(content)
        refused(run("translate", "--model", bundle, "one"), "encoder.onnx", "sha256")

    @pytest.mark.parametrize("folder", [".", "artifacts"])
    def test_no_bundle_below_artifacts_is_refused(self, run: Run, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        refused(run("translate", "one"), "no bundle below artifacts/", "--model")

    def test_the_newest_bundle_is_taken_and_named(self, run: Run, numbers_bundle: Path, tmp_path: Path) -> None:
        for name, created in (("a", "2025-03"), ("b", "2025-02")):
            folder = Path(shutil.copytree(numbers_bundle, tmp_path / "artifacts" / name))
            replace(Manifest.read(folder), created=f"{created}-01T00:00:00.000000+00:00").write(folder)
        assert run("translate", "one") == Outcome(0, "eins\n", "kvx: artifacts/a on onnx, cpu\n")

    @pytest.mark.parametrize("arguments", [[], ["-o", "/dev/full"]])
    def test_a_full_disk_is_told(self, numbers_bundle: Path, arguments: list[str]) -> None:
        command = [*KVX, "translate", "--model", str(numbers_bundle), "--device", "cpu", "one", *arguments]
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE, check=False, env=ENVIRONMENT
            )
        refused(outcome(done.returncode, b"", done.stderr), "No space left")

    def test_a_closed_standard_input_is_told(self, numbers_bundle: Path) -> None:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *KVX, "translate", "--model", str(numbers_bundle)]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, env=ENVIRONMENT)
        refused(outcome(done.returncode, done.stdout, done.stderr))


@dataclass(slots=True)
class Conversation:
    """A running command: what it says arrives as it says it."""

    process: subprocess.Popen[bytes]

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin
        return self.process.stdin

    def read(self, seconds: float) -> bytes:
        """What there is to read within so many seconds, or nothing."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 2**16) if ready else b""

    def end(self, before: bytes = b"") -> Outcome:
        out, err = self.process.communicate(timeout=PATIENCE)
        return outcome(self.process.returncode, before + out, err)


@pytest.fixture
def converse(numbers_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Conversation]]:
    """Starts commands whose pipes stay open. They get Ctrl-C even where this process ignores it."""
    started: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*arguments: str, stdin: int = subprocess.PIPE) -> Conversation:
        line = [*KVX, *(arguments or ("translate", "--model", str(numbers_bundle), "--device", "cpu"))]
        started.append(
            subprocess.Popen(
                line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT
            )
        )
        return Conversation(started[-1])

    try:
        yield start
    finally:
        signal.signal(signal.SIGINT, previous)
        for process in started:
            process.kill()
            process.wait()


class TestPipes:
    def test_the_first_answer_comes_while_a_large_input_is_still_being_written(
        self, converse: Callable[..., Conversation]
    ) -> None:
        command, lines = converse(), 1100  # two windows and some, fewer bytes of answers than a buffer holds
        command.stdin.write(b"one\n" * lines)
        command.stdin.flush()
        answer = command.read(PATIENCE)
        assert answer.startswith(b"eins\n")
        assert command.process.poll() is None
        found = command.end(answer)
        assert (found.code, found.out) == (0, "eins\n" * lines)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
    def test_memory_does_not_grow_with_the_input(self, converse: Callable[..., Conversation]) -> None:
        command, line = converse(), b" " * 100_000 + b"one\n"
        reader = threading.Thread(target=lambda: all(iter(lambda: command.read(PATIENCE), b"")), daemon=True)
        reader.start()
        peaks = []
        for _ in range(4):
            for _ in range(1000):
                command.stdin.write(line)
            command.stdin.flush()
            status = Path(f"/proc/{command.process.pid}/status").read_text()
            peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))  # type: ignore[index]
        command.stdin.close()
        reader.join(PATIENCE)
        assert command.process.wait(PATIENCE) == 0
        assert peaks[-1] - peaks[1] < 100_000  # of 200 MB more that were read

    def test_a_reader_that_has_seen_enough_ends_it_quietly(
        self, converse: Callable[..., Conversation], numbers_bundle: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "in").write_text("one\n" * 3000)
        command = converse("translate", "--model", str(numbers_bundle), "--device", "cpu", "-i", "in")
        assert command.process.stdout
        assert command.process.stdout.readline() == b"eins\n"
        command.process.stdout.close()
        assert command.process.stderr
        assert command.process.stderr.read() == b""
        assert command.process.wait(PATIENCE) == 0

    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "BUNDLE"], ["translate", "one"]])
    def test_a_reader_that_is_gone_already_ends_it_quietly(self, numbers_bundle: Path, arguments: list[str]) -> None:
        if arguments[0] == "translate":
            arguments = ["translate", "--device", "cpu", "--model", "BUNDLE", "one"]
        line = [*KVX, *(argument.replace("BUNDLE", str(numbers_bundle)) for argument in arguments)]
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as out:
            done = subprocess.run(
                line, stdout=out, stderr=subprocess.PIPE, timeout=PATIENCE, check=False, env=ENVIRONMENT
            )
        assert done.stderr == b""

    def test_ctrl_c_while_reading_keeps_what_was_printed(self, converse: Callable[..., Conversation]) -> None:
        command, answers = converse(), b""
        command.stdin.write(b"one\n" * 2000)
        command.stdin.flush()
        while chunk := command.read(PATIENCE if not answers else 1):
            answers += chunk
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(PATIENCE) == 130
        command.stdin.close()
        assert command.process.stdout
        assert command.process.stderr
        found = outcome(130, answers + command.process.stdout.read(), command.process.stderr.read())
        assert found.out == "eins\n" * found.out.count("\n")
        assert found.out
        assert found.err == ""

    def test_at_a_terminal_every_line_is_answered_at_once(self, converse: Callable[..., Conversation]) -> None:
        terminal, theirs = pty.openpty()
        command = converse(stdin=theirs)
        os.close(theirs)
        for text, answer in ((b"one\n", "eins\n"), (b"\n", "\n"), (b"twelve\n", "zwölf\n")):
            os.write(terminal, text)
            assert command.read(10).decode() == answer
        os.write(terminal, b"\x04")  # Ctrl-D
        found = command.end()
        os.close(terminal)
        assert (found.code, found.out) == (0, "")
        assert found.err == "kvx: reading standard input, a text a line, until Ctrl-D\n"


class TestExport:
    @pytest.fixture
    def small(self, tiny_checkpoint_folder: Path) -> list[str]:
        """What makes an export of the tiny model quick."""
        return ["export", str(tiny_checkpoint_folder / "model.pt"), "--format", "torchscript", "--no-verify"]

    def test_success_prints_nothing_but_our_own_lines(
        self, run: Run, tiny_checkpoint_folder: Path, tmp_path: Path
    ) -> None:
        found = run("export", tiny_checkpoint_folder / "model.pt", "-o", "bundles/tiny")
        assert (found.code, found.out) == (0, "bundles/tiny\n")
        assert [line for line in found.err.splitlines() if not OWN_LINE.match(line)] == []
        assert found.err.startswith("parity with eager PyTorch: passed")
        assert names_in(tmp_path / "bundles") == ["tiny"]
        assert {path.name for path in (tmp_path / "bundles" / "tiny").iterdir()} == {
            "manifest.json",
            "encoder.onnx",
            "decoder_step.onnx",
            "decoder_step.onnx.data",
            "encoder.onnx.data",
            "decoder_chunk.onnx",
            "decoder_beams.onnx",
            "encoder.ts",
            "decoder_step.ts",
            "model.pt",
            "source.model",
            "target.model",
        }

    def test_an_output_that_exists_is_replaced_only_where_asked_for(self, small: list[str], tmp_path: Path) -> None:
        output = tmp_path / "tiny"
        first = invoke(*small, "-o", output)
        assert (first.exit_code, first.stdout) == (0, f"{output}\n")
        assert "not proven" in first.stderr
        before = Manifest.read(output)
        again = invoke(*small, "-o", output)
        assert again.exit_code == 2
        assert "which exists" in again.stderr
        assert "--force" in again.stderr
        assert Manifest.read(output) == before
        assert invoke(*small, "-o", output, "--force").exit_code == 0
        assert Manifest.read(output).created > before.created
        assert names_in(tmp_path) == ["tiny"]

    def test_the_attention_of_a_layer_comes_where_asked_for(self, small: list[str], tmp_path: Path) -> None:
        alone = invoke(*small, "-o", tmp_path / "refused", "--attention-layer", "0")
        assert alone.exit_code == 2
        assert "--attention-layer 0 without --with-attention" in alone.stderr
        layers = []
        for name, more in (("last", []), ("first", ["--attention-layer", "0"])):
            assert invoke(*small, "-o", tmp_path / name, "--with-attention", *more).exit_code == 0
            layers.append(Manifest.read(tmp_path / name).features.attention)
        assert layers == [1, 0]

    def test_the_default_output_is_named_after_the_checkpoints_folder(
        self, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = f"artifacts/{Path(small[1]).parent.name}"
        assert invoke(*small).stdout == f"{folder}\n"
        assert Manifest.read(tmp_path / folder).formats == ("torchscript",)

    @pytest.mark.parametrize("force", [[], ["--force"]])
    @pytest.mark.parametrize("foreign", ["file", "folder", "empty", "link"])
    def test_what_is_no_bundle_is_never_replaced(
        self, small: list[str], numbers_bundle: Path, tmp_path: Path, foreign: str, force: list[str]
    ) -> None:
        output = tmp_path / foreign
        if foreign == "file":
            output.write_text("mine")
        elif foreign == "link":
            output.symlink_to(numbers_bundle)
        else:
            output.mkdir()
        if foreign == "folder":
            (output / "mine").write_text("mine")

        def state() -> dict[Path, tuple[int, int]]:
            return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")}

        before = state()
        found = invoke(*small, "-o", output, *force)
        assert found.exit_code == 2
        assert "never replaced" in found.stderr
        assert state() == before

    def test_the_checkpoints_own_folder_is_never_replaced(self, small: list[str], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(Path(small[1]).parent, tmp_path / "checkpoint"))
        (folder / "manifest.json").write_text("{}")
        found = invoke(small[0], folder / "model.pt", *small[2:], "-o", folder, "--force")
        assert found.exit_code == 2
        assert (folder / "model.pt").exists()

    @pytest.mark.parametrize(
        ("arguments", "mention"),
        [
            (["nowhere/model.pt"], "nowhere/model.pt"),
            (["CHECKPOINT", "--source-tokenizer", "nowhere"], "nowhere"),
            (["CHECKPOINT", "--max-new-tokens", "0"], "max_new_tokens 0"),
            (["CHECKPOINT", "--max-new-tokens", "21"], "max_new_tokens 21"),
            (["CHECKPOINT", "--heads", "3"], "heads"),
            (["CHECKPOINT", "--tolerance", "0"], "tolerance 0"),
            (["CHECKPOINT", "-o", "FILE/bundle"], "FILE/bundle"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_what_cannot_work_is_refused_and_leaves_nothing(
        self, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], mention: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "FILE").touch()
        arguments = [small[1] if argument == "CHECKPOINT" else argument for argument in arguments]
        found = invoke("export", *arguments, *small[2:])
        assert found.exit_code == 2
        assert found.stderr.startswith("kvx: error: ")
        assert mention in found.stderr
        assert names_in(tmp_path) == ["FILE"]

    def test_an_export_that_differs_from_eager_is_a_failure_and_leaves_nothing(
        self, tiny_checkpoint_folder: Path, tmp_path: Path
    ) -> None:
        options = ["--format", "onnx", "--tolerance", "1e-12"]
        found = invoke("export", tiny_checkpoint_folder / "model.pt", "-o", tmp_path / "tiny", *options)
        assert found.exit_code == 1
        assert "differs from eager PyTorch" in found.stderr
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["export", "model.pt"],
            ["verify", "bundle", "model.pt"],
            ["translate", "--backend", "torch", "one"],
            ["translate", "--backend", "torchscript", "one"],
        ],
        ids=" ".join,
    )
    def test_without_the_extra_the_way_to_it_is_named(
        self, numbers_bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *others: None if name == "torch" else find(name, *others)
        )
        if arguments[0] == "translate":
            arguments = [*arguments, "--model", str(numbers_bundle)]
        found = invoke(*arguments)
        assert (found.exit_code, found.stdout) == (2, "")
        assert "torch" in found.stderr
        assert "pip install 'kvx[export]'" in found.stderr

    def test_ctrl_c_leaves_no_half_bundle(self, converse: Callable[..., Conversation], tmp_path: Path) -> None:
        command = converse("export", str(NUMBERS), "-o", "bundles/numbers")
        deadline = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("bundles/.numbers.*/encoder.onnx")) and time.monotonic() < deadline:
            time.sleep(0.05)
        [partial] = names_in(tmp_path / "bundles")
        assert re.fullmatch(r"\.numbers\.[0-9a-f]+\.partial", partial)
        command.process.send_signal(signal.SIGINT)
        found = command.end()
        assert (found.code, found.out, found.err) == (130, "", "")
        assert names_in(tmp_path / "bundles") == []


class TestInspect:
    def test_it_shows_graphs_limits_and_parity(self, run: Run, numbers_bundle: Path) -> None:
        found = run("inspect", numbers_bundle)
        assert (found.code, found.err) == (0, "")
        manifest = Manifest.read(numbers_bundle)
        for text in (
            "past_key_values.1.encoder.value      float32  [B, 4, S, 16]",
            "logits                               float32  [B, 72]",
            "source positions 64, target positions 64",
            "new tokens by default 32",
            "per source token 1,024, per target token 1,024",
            "parity with eager PyTorch: passed",
            "ok   onnx: greedy on drawn ids",
            *manifest.files,
        ):
            assert text in found.out

    def test_json_is_the_manifest(self, run: Run, numbers_bundle: Path) -> None:
        found = run("inspect", "--json", numbers_bundle)
        assert (found.code, found.err) == (0, "")
        assert json.loads(found.out) == json.loads((numbers_bundle / "manifest.json").read_text())

    def test_a_bundle_without_a_proof_says_so(self, run: Run, bundle: Path) -> None:
        replace(Manifest.read(bundle), parity=None).write(bundle)
        assert "parity: not proven (exported without a proof)\n" in run("inspect", bundle).out

    @pytest.mark.parametrize(
        "garble",
        [
            lambda values: values.update(parity={}),
            lambda values: values["model"].pop("d_ff"),
            lambda values: values["files"].update({"a" * 300: {"bytes": 1, "sha256": "0"}}),
        ],
    )
    def test_a_garbled_manifest_is_refused(
        self, run: Run, bundle: Path, garble: Callable[[dict[str, Any]], Any]
    ) -> None:
        values = json.loads((bundle / "manifest.json").read_text())
        garble(values)
        (bundle / "manifest.json").write_text(json.dumps(values))
        refused(run("inspect", bundle))

    @pytest.mark.parametrize("arguments", [[], ["--json"]])
    def test_a_missing_bundle_is_refused(self, run: Run, arguments: list[str]) -> None:
        refused(run("inspect", "nowhere", *arguments), "nowhere")


class TestVerify:
    def test_a_good_bundle_is_proven(self, numbers_bundle: Path) -> None:
        found = invoke("verify", numbers_bundle, NUMBERS)
        assert (found.exit_code, found.stderr) == (0, "")
        assert found.stdout.startswith("parity with eager PyTorch: passed")
        assert "FAIL" not in found.stdout
        for name in ("files: sizes", "model: configuration and weights", "onnx: greedy", "torchscript: greedy"):
            assert f"  ok   {name}" in found.stdout

    def test_it_translates_a_text_too(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("one\n\ntwelve\n")
        found = invoke("verify", bundle, NUMBERS, "--verify-text", tmp_path / "text")
        assert found.exit_code == 0
        assert "greedy on the verification text: 2 of 2 sentences equal" in found.stdout

    @pytest.mark.parametrize("name", ["encoder.onnx", "decoder_step.ts", "target.model"])
    def test_an_altered_file_is_a_difference(self, bundle: Path, name: str) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)
        found = invoke("verify", bundle, NUMBERS)
        assert found.exit_code == 1
        assert f"FAIL files: sizes and sha256: {bundle} with {name}" in found.stdout

    def test_other_weights_are_a_difference(self, numbers_bundle: Path, tmp_path: Path) -> None:
        checkpoint = load_checkpoint(NUMBERS)
        with torch.no_grad():
            checkpoint.model.head.weight[0, 0] += 1e-3
        save_checkpoint(checkpoint, tmp_path / "model.pt")
        found = invoke("verify", numbers_bundle, tmp_path / "model.pt")
        assert found.exit_code == 1
        assert "FAIL model: configuration and weights: differing in head.weight" in found.stdout

    def test_other_weights_are_a_difference_without_the_bundles_own_checkpoint(
        self, bundle: Path, tmp_path: Path
    ) -> None:
        manifest = Manifest.read(bundle)
        replace(manifest, files={n: entry for n, entry in manifest.files.items() if n != "model.pt"}).write(bundle)
        checkpoint = load_checkpoint(NUMBERS)
        with torch.no_grad():
            checkpoint.model.head.weight[5] += 1e-2
        save_checkpoint(checkpoint, tmp_path / "other.pt")
        found = invoke("verify", bundle, tmp_path / "other.pt")
        assert found.exit_code == 1
        assert re.search(r"FAIL onnx: logits .* over 0\.0001", found.stdout)

    def test_another_model_is_a_difference(self, numbers_bundle: Path, tiny_checkpoint_folder: Path) -> None:
        found = invoke("verify", numbers_bundle, tiny_checkpoint_folder / "model.pt")
        assert found.exit_code == 1
        assert "FAIL model: configuration and weights: differing in d_model" in found.stdout

    def test_a_missing_bundle_is_refused(self, tmp_path: Path) -> None:
        found = invoke("verify", tmp_path / "nowhere", NUMBERS)
        assert (found.exit_code, found.stdout) == (2, "")
        assert "nowhere" in found.stderr

    def test_a_missing_checkpoint_is_refused(self, numbers_bundle: Path, tmp_path: Path) -> None:
        found = invoke("verify", numbers_bundle, tmp_path / "nowhere.pt")
        assert (found.exit_code, found.stdout) == (2, "")
        assert "nowhere.pt" in found.stderr
