"""`kvx translate`, from every kind of input to every kind of output."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kvx.runtime.bundle.manifest import Manifest
from kvx.tests.commands.running import (
    ENVIRONMENT,
    KVX,
    PATIENCE,
    Converse,
    Outcome,
    Run,
    invoke,
    names_in,
    outcome,
    refused,
    refused_usage,
)
from kvx.tests.conftest import Seed

LONG = " ".join(["one"] * 100)


def test_arguments(translate: Run) -> None:
    assert translate("one", "twelve") == Outcome(0, "eins\nzwölf\n", "")


def test_standard_input(translate: Run) -> None:
    assert translate(stdin=b"one\ntwelve\n") == Outcome(0, "eins\nzwölf\n", "")


def test_no_input_at_all(translate: Run) -> None:
    assert translate() == Outcome(0, "", "")


@pytest.mark.parametrize("option", ["-i", "--input"])
def test_a_file(translate: Run, tmp_path: Path, option: str) -> None:
    (tmp_path / "in").write_text("one\ntwelve")
    assert translate(option, "in", stdin=b"three\n") == Outcome(0, "eins\nzwölf\n", "")


@pytest.mark.parametrize(
    "backend",
    ["onnx", *(pytest.param(name, marks=pytest.mark.proof) for name in ("torchscript", "torch", "torch-no-cache"))],
)
def test_every_backend_says_the_same_and_nothing_else(translate: Run, backend: str) -> None:
    assert translate("--backend", backend, "twelve", "one") == Outcome(0, "zwölf\neins\n", "")


@pytest.mark.parametrize("text", ["-5 degrees", "--twelve", "--ba n"])
def test_a_text_that_begins_with_a_dash_says_how_to_give_it(numbers_bundle: Path, text: str) -> None:
    command = ("translate", "--model", numbers_bundle, "--device", "cpu")
    refused_usage(invoke(*command, text), "No such option: ", "Put -- before a text that begins with a dash")
    found = invoke(*command, "--", text)
    assert (found.code, found.out.count("\n")) == (0, 1)


def test_an_output_file_is_complete_and_alone(translate: Run, tmp_path: Path) -> None:
    assert translate("-o", "out", "one", "twelve") == Outcome(0, "", "")
    assert (tmp_path / "out").read_bytes() == "eins\nzwölf\n".encode()
    assert names_in(tmp_path) == ["out"]


def test_an_output_file_stays_as_it_was_after_an_error(translate: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("older")
    refused(translate("-o", "out", stdin=b"one\n\xff\n"), "Line 2")
    assert (tmp_path / "out").read_text() == "older"
    assert names_in(tmp_path) == ["out"]


def test_an_output_that_cannot_be_written(translate: Run) -> None:
    refused(translate("-o", "nowhere/out", "one"), "nowhere/out", "cannot be written")


def test_json_is_an_object_a_line(translate: Run) -> None:
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


def test_scores_stand_before_every_text(translate: Run) -> None:
    scored = translate("--scores", "one", "twelve").out.split("\n")[:-1]
    exact = [json.loads(line)["score"] for line in translate("--json", "--scores", "one", "twelve").out.splitlines()]
    assert [line.split("\t")[1] for line in scored] == ["eins", "zwölf"]
    assert [float(line.split("\t")[0]) for line in scored] == pytest.approx(exact, abs=1e-4)


def test_an_empty_line_keeps_the_column_of_scores(translate: Run) -> None:
    found = translate("--scores", stdin=b"one\n\ntwelve\n")
    assert [line.count("\t") for line in found.out.split("\n")[:-1]] == [1, 1, 1]


def test_stats_go_to_stderr(translate: Run) -> None:
    found = translate("--stats", "one", "twelve")
    assert (found.code, found.out) == (0, "eins\nzwölf\n")
    assert re.fullmatch(
        r"kvx: 2 sentences in [\d.]+ s: [\d.]+ sentences/s, \d+ tokens/s, \d+ steps, \d+% of the rows in use, "
        r"0 repacks, cache [\d.]+ MiB\n",
        found.err,
    )


@pytest.mark.parametrize("rows", ["1", "2", "100"])
def test_line_n_in_is_line_n_out_whatever_stands_in_it(translate: Run, rows: str) -> None:
    odd = ["a\u2028b", "c\u0085d", "e\x0bf\x0cg\x1ch", "i\rj", "", "   ", "\u2029", "\x00", "🎈", "\ufeff"]
    texts = [text for each in odd for text in (each, "twelve\r", each)]
    found = translate("--rows", rows, stdin="\n".join(texts).encode())
    lines = found.out.split("\n")
    assert found.code == 0
    assert len(lines) == len(texts) + 1
    assert lines[1:-1:3] == ["zwölf"] * len(odd)
    assert (lines[odd.index("") * 3], lines[odd.index("   ") * 3]) == ("", "")


def test_input_that_is_not_utf8_is_refused_by_its_line_after_those_before(translate: Run) -> None:
    found = translate(stdin=b"one\n\ntwelve\n\xe9t\xe9\nthree\n")
    assert found.out == "eins\n\nzwölf\n"
    refused(replace(found, out=""), "Line 4", "0xe9", "UTF-8")


def test_an_argument_that_is_no_text_is_refused(translate: Run) -> None:
    found = translate("one", os.fsdecode(b"\xff"))
    assert found.out == "eins\n"
    refused(replace(found, out=""), "Line 2")


def test_a_line_too_long_is_refused_by_its_number(translate: Run) -> None:
    found = translate(stdin=f"one\n{LONG}\ntwelve\n".encode())
    assert found.out == "eins\n"
    refused(replace(found, out=""), "Line 2", "102 tokens", "at most 64", "--on-long truncate")


def test_a_line_too_long_is_cut_where_asked_for_and_told(translate: Run) -> None:
    found = translate("--on-long", "truncate", stdin=f"one\n{LONG}\ntwelve\n".encode())
    lines = found.out.split("\n")
    assert (found.code, len(lines), lines[0], lines[2]) == (0, 4, "eins", "zwölf")
    assert lines[1]
    assert "kvx: line 2 was cut to the model's 64 positions\n" in found.err


def test_translations_that_stop_at_the_limit_are_told(translate: Run) -> None:
    found = translate("--max-new-tokens", "2", "one", "twelve thousand", "")
    assert found.code == 0
    assert found.err == "kvx: 2 translations stopped at the limit of new tokens (lines 1, 2)\n"


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["-i", "nowhere"], "nowhere"),
        (["-i", "."], "cannot be read"),
        (["-i", "in", "one"], "texts and --input"),
        (["--rows", "0", "one"], "--rows is 0"),
        (["--rows", "-3", "one"], "--rows is -3"),
        (["--threads", "0", "one"], "--threads is 0"),
        (["--threads", "-1", "one"], "--threads is -1"),
        (["--max-new-tokens", "0", "one"], "--max-new-tokens is 0"),
        (["--max-new-tokens", "65", "one"], "--max-new-tokens is 65"),
        (["--device", "tpu", "one"], "device 'tpu'"),
        (["--device", "cuda", "--backend", "torch", "one"], "cuda"),
        (["--rows", "1000000000000", "one"], "rows"),  # petabytes of cache
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused(
    numbers_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], mention: str
) -> None:
    model = numbers_bundle.absolute()
    monkeypatch.chdir(tmp_path)
    refused(invoke("translate", "--model", model, "--device", "cpu", *arguments), mention)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have CUDA")
def test_cuda_where_there_is_none_is_refused(translate: Run) -> None:
    refused(translate("--device", "cuda", "one"), "device cuda", "--device cpu")


def test_a_missing_model_is_refused() -> None:
    refused(invoke("translate", "--model", "nowhere", "one"), "nowhere", "manifest.json", "kvx export")


def test_a_damaged_bundle_is_refused(run: Run, bundle: Path) -> None:
    os.truncate(bundle / "decoder_step.onnx", 1000)
    refused(run("translate", "--model", bundle, "one"), "decoder_step.onnx", "1000 bytes")


def test_an_altered_bundle_is_refused(bundle: Path) -> None:
    content = bytearray((bundle / "encoder.onnx").read_bytes())
    content[-100] ^= 1
    (bundle / "encoder.onnx").write_bytes(content)
    refused(invoke("translate", "--model", bundle, "one"), "encoder.onnx", "sha256")


@pytest.mark.parametrize("folder", [".", "artifacts"])
def test_no_bundle_below_artifacts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    refused(invoke("translate", "one"), "no bundle below artifacts/", "--model")


def test_the_newest_bundle_is_taken_and_named(run: Run, numbers_bundle: Path, tmp_path: Path) -> None:
    for name, created in (("a", "2025-03"), ("b", "2025-02")):
        folder = Path(shutil.copytree(numbers_bundle, tmp_path / "artifacts" / name))
        replace(Manifest.read(folder), created=f"{created}-01T00:00:00.000000+00:00").write(folder)
    assert run("translate", "one") == Outcome(0, "eins\n", "kvx: artifacts/a on onnx, cpu\n")


@pytest.mark.parametrize("arguments", [[], ["-o", "/dev/full"]])
def test_a_full_disk_is_told(numbers_bundle: Path, arguments: list[str]) -> None:
    command = [*KVX, "translate", "--model", str(numbers_bundle), "--device", "cpu", "one", *arguments]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE, check=False, env=ENVIRONMENT
        )
    refused(outcome(done.returncode, b"", done.stderr), "No space left")


def test_a_closed_standard_input_is_told(numbers_bundle: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *KVX, "translate", "--model", str(numbers_bundle)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, env=ENVIRONMENT)
    refused(outcome(done.returncode, done.stdout, done.stderr))


class TestPipes:
    def test_the_first_answer_comes_while_a_large_input_is_still_being_written(self, converse: Converse) -> None:
        command, lines = converse(), 1100  # two windows and some, fewer bytes of answers than a buffer holds
        command.stdin.write(b"one\n" * lines)
        command.stdin.flush()
        answer = command.read(PATIENCE)
        assert answer.startswith(b"eins\n")
        assert command.process.poll() is None
        found = command.end(answer)
        assert (found.code, found.out) == (0, "eins\n" * lines)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
    def test_memory_does_not_grow_with_the_input(self, converse: Converse) -> None:
        command, line = converse(), b" " * 50_000 + b"one\n"
        reader = threading.Thread(target=lambda: all(iter(lambda: command.read(PATIENCE), b"")), daemon=True)
        reader.start()
        peaks = []
        for _ in range(10):
            for _ in range(120):
                command.stdin.write(line)
            command.stdin.flush()
            status = Path(f"/proc/{command.process.pid}/status").read_text()
            peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))  # type: ignore[index]
        command.stdin.close()
        reader.join(PATIENCE)
        assert command.process.wait(PATIENCE) == 0
        assert peaks[-1] - peaks[1] < 30_000  # kB, of 48 MB more that were read; two windows of them are held at a time

    def test_a_reader_that_has_seen_enough_ends_it_quietly(
        self, converse: Converse, numbers_bundle: Path, tmp_path: Path
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

    def test_ctrl_c_while_reading_keeps_what_was_printed(self, converse: Converse) -> None:
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

    def test_at_a_terminal_every_line_is_answered_at_once(self, converse: Converse) -> None:
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


def test_a_program_that_waits_for_each_answer_gets_it(converse: Converse) -> None:
    command = converse()
    for text, answer in (("one", "eins"), ("", ""), ("twelve", "zwölf")):
        command.stdin.write(f"{text}\n".encode())
        command.stdin.flush()
        assert command.read(PATIENCE).decode() == f"{answer}\n"
    assert command.end().code == 0


def test_the_reference_model_answers_line_by_line_too(converse: Converse, seed: Seed, seed_bundle: Path) -> None:
    command = converse("translate", "--model", str(seed_bundle.absolute()), "--device", "cpu")
    for text, line in zip(seed.sources[:3], seed.greedy, strict=False):
        command.stdin.write(f"{text}\n".encode())
        command.stdin.flush()
        assert command.read(PATIENCE).decode() == f"{line['text']}\n"
    assert command.end().code == 0
